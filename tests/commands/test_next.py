"""The last line of a verb names the command that comes next, and nothing of a library is on the screen."""

import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from l2v.commands import completion, data_build, data_check, data_mine, main, report, tune
from l2v.commands.parser import next_step, quoted

PARSERS = dict(completion.parsers())


def last(capsys) -> str:
    return capsys.readouterr().out.rstrip().splitlines()[-1]


def test_alternatives_and_words_with_spaces():
    assert next_step(quoted("l2v", "report", "mine løb"), "l2v doctor") == "Next: l2v report 'mine løb'; or l2v doctor"


def test_a_built_data_set_is_trained_on_by_its_kind_and_split():
    done = {"kind": "pairs", "splits": {"train": 0, "alt": 7}}
    assert data_build._next(done, Path("ud af"), False) == (
        "Next: l2v train RECIPE stages.supervised.data='ud af/alt-*.parquet'"
    )
    done = {"kind": "documents", "splits": {"train": 3}}
    assert data_build._next(done, Path("d"), False).endswith("stages.mntp.data='d/train-*.parquet'")
    assert "the same command" in data_build._next(done, Path("d"), True)


def test_a_checked_folder(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "passages.jsonl").touch()
    for ok, code, says in (
        (True, 0, "Next: l2v init NAME --data FILE"),
        (False, 1, "Next: correct what was found, then l2v data check mine"),
    ):
        found = SimpleNamespace(ok=ok, render=lambda most: "fund")
        monkeypatch.setattr("l2v.data.check.report.check_folder", lambda folder, found=found: found)
        assert data_check.main(["mine"]) == code and last(capsys) == says


def test_mined_negatives(monkeypatch, capsys):
    monkeypatch.setattr("l2v.mining.mine.mine_negatives", lambda args: print("note: x"))
    assert data_mine.main(["base", "pairs.jsonl", "--out", "ny fil.jsonl"]) == 0
    assert last(capsys) == "Next: l2v train RECIPE --stage supervised data='ny fil.jsonl'"


def test_tuned_settings(monkeypatch, capsys, tiny_recipe, tmp_path):
    entry = {"settings": {"micro_tokens": 1, "recompute": "auto", "backend": "l2v", "kernels": "default"}}
    monkeypatch.setattr("l2v.tuning.search.tune_stage", lambda *_: entry)
    path = tiny_recipe(tmp_path)
    assert tune.main([str(path), "stages.mntp.steps=2", "--processes", "1"]) == 0
    assert last(capsys) == f"Next: l2v train {path} stages.mntp.steps=2"


def test_a_report_leads_to_scores_and_then_to_an_export():
    run = SimpleNamespace(folder=Path("runs/x"), last=None, evaluation=None)
    assert "resumes" in report._next(run)
    run.last = object()
    assert report._next(run) == "Next: l2v eval runs/x --stages --baselines tfidf --benchmark local:FOLDER"
    run.evaluation = {}
    assert report._next(run) == "Next: l2v export runs/x FOLDER; or l2v push runs/x OWNER/NAME"


@pytest.mark.parametrize("line", [
    "l2v eval runs/x --stages --baselines tfidf --benchmark local:FOLDER", "l2v export runs/x FOLDER", "l2v report x",
    "l2v push runs/x OWNER/NAME", "l2v search x QUERY --texts FILE", "l2v init NAME --data FILE", "l2v data check x",
    "l2v train RECIPE --stage supervised data=x",
])  # fmt: skip
def test_what_comes_next_is_a_command(line):
    words = line.split()[1:]
    verb = " ".join(words[:2]) if words[0] == "data" else words[0]
    PARSERS[verb].parse_intermixed_args(words[len(verb.split()) :])


def test_libraries_are_quiet_but_for_training_that_reads_its_data(monkeypatch):
    for reading, expected in ((False, "1"), (True, None)):
        monkeypatch.delenv("HF_DATASETS_DISABLE_PROGRESS_BARS", raising=False)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            main.quiet_libraries(reading=reading)
            warnings.warn("is_gradient_checkpointing is deprecated", FutureWarning, stacklevel=1)
        assert os.environ.get("HF_DATASETS_DISABLE_PROGRESS_BARS") == expected and not said
        monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "0")  # the user's word
        main.quiet_libraries(reading=reading)
        assert os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] == "0"


def test_every_verb_but_training_silences_them(monkeypatch):
    seen = {}
    for verb in ("plan", "eval", "report", "data", "tune", "train", "quickstart"):
        monkeypatch.setattr(main, "quiet_libraries", lambda verb=verb, **how: seen.__setitem__(verb, how["reading"]))
        monkeypatch.setattr(main.importlib, "import_module", lambda name: SimpleNamespace(main=lambda argv: 0))
        assert main.main([verb, "x"]) == 0
    assert [verb for verb, reading in seen.items() if reading] == ["train", "quickstart"]
