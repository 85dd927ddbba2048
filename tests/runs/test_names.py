"""A mistyped name of a model is answered at once, with what is there; the Hub is asked for its own names, once."""

import json
import time

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError

from l2v import Encoder
from l2v.commands import main as cli
from l2v.errors import UserError
from l2v.model import hub
from l2v.runs.names import check_model, near


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with two runs of two stages each."""
    for run in ("kunder", "opskrifter"):
        for stage in ("mntp", "supervised"):
            (tmp_path / "runs" / run / stage).mkdir(parents=True)
            (tmp_path / "runs" / run / stage / "stage.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def asked(monkeypatch):
    """The addresses that the Hub is asked for; it has none of them."""
    found: list = []

    def answer(url, **_):
        found.append(url)
        raise OSError("no route")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_hf_file_metadata", answer)
    return found


RUNS = "runs in runs/: kunder, opskrifter"
COMMANDS = {
    "search": ["search", "{}", "hund"],
    "export": ["export", "{}", "out"],
    "data mine": ["data", "mine", "{}", "pairs.jsonl", "--out", "mined.jsonl"],
    "data synthesize": ["data", "synthesize", "p.txt", "--out", "o.jsonl", "--model", "x", "--filter", "{}"],
    "push": ["push", "{}", "mig/x"],
    "report": ["report", "{}"],
    "eval": ["eval", "{}", "--benchmark", "local:sample", "--out", "scores"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_the_nearest_run_at_once(place, asked, command, capsys):
    assert cli.main([word.format("runs/kundr") for word in COMMANDS[command]]) == 1
    said = "".join(capsys.readouterr()).replace("\n", " ")
    assert f"no such folder; {RUNS}; did you mean runs/kunder?" in said
    assert "runs/kundr" in said and "base.init" not in said and asked == []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("runs/opskrift", f"{RUNS}; did you mean runs/opskrifter?"),
        ("runs/kunder/supervized", "stages in runs/kunder/: mntp, supervised; did you mean runs/kunder/supervised?"),
        ("runs/kundr/mntp", f"{RUNS}; did you mean runs/kunder?"),
        (
            "runs/zzz",
            f"{RUNS}; give a run, a stage of it (runs/NAME/STAGE), an export or a base: a folder, or owner/name on",
        ),
        ("./kunder", f"{RUNS}; did you mean runs/kunder?"),
        ("/no/where/at/all", f"{RUNS}; give a run"),
    ],
)
def test_paths(place, asked, name, says):
    for check in (check_model, Encoder.from_pretrained, Encoder.identity):
        with pytest.raises(UserError) as error:
            check(name)
        assert str(error.value).startswith(f"{name} was not found: no such folder; {says}")
    assert asked == []


def test_many_runs_are_counted_and_none_is_said(place, tmp_path, monkeypatch):
    for at in range(9):
        (tmp_path / "runs" / f"r{at}" / "mntp").mkdir(parents=True)
        (tmp_path / "runs" / f"r{at}" / "mntp" / "stage.json").write_text("{}")
    assert near("runs/q").startswith(
        "; runs in runs/: kunder, opskrifter, r0, r1, r2, r3, r4, r5 and 3 more; give a run"
    )
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert near("runs/q").startswith("; runs/ holds no run; give a run")


@pytest.mark.parametrize("name", ["nogen/kunder", "kundr"])
def test_names_of_the_hub_are_asked_for_once(place, asked, name):
    began = time.perf_counter()
    with pytest.raises(UserError) as error:
        Encoder.from_pretrained(name)
    assert asked == [huggingface_hub.hf_hub_url(name, "config.json")] and time.perf_counter() - began < 5
    says = f"{name} was not found: no such folder, and the Hub cannot be reached (OSError); {RUNS}; did you mean runs/kunder?"
    assert str(error.value) == says


def test_what_the_hub_answers_is_said(place, asked, monkeypatch):
    class Answer:
        status_code, headers, request = 404, {}, None

    def none(url, **_):
        raise RepositoryNotFoundError("404", response=Answer())

    monkeypatch.setattr(hub, "get_hf_file_metadata", none)
    assert hub.why_missing("nogen/x", "f") == "the Hub has no such repository, or it is private (hf auth login)"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.why_missing("nogen/x", "f") == "it is not in the Hub's cache, and HF_HUB_OFFLINE forbids to ask"
    with pytest.raises(
        UserError, match="the adapter 'nogen/x' is neither a folder nor on the hub: it is not in the Hub's"
    ):
        Encoder.from_pretrained("smollm2-135m-instruct", ["nogen/x"], base_only=True)


def test_a_run_whose_base_is_gone(tmp_path, asked, base, tiny_recipe):
    from support.made_run import make_run

    given = {"base.model": str(base), "base.init": "pretrained", "base.config": None, "base.tokenizer": None}
    run = make_run(tiny_recipe(tmp_path, **given), stages=("mntp",))
    file = run / "mntp" / "stage.json"
    facts = json.loads(file.read_text())
    facts["recipe"]["base"]["model"] = "/gone/base"
    file.write_text(json.dumps(facts))
    with pytest.raises(UserError, match=rf"^the base of {run}: /gone/base was not found: no such folder") as error:
        Encoder.from_pretrained(run)
    assert asked == [] and "base.init" not in str(error.value)
