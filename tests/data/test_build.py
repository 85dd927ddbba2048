import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict

import psutil
import pytest
from support.build_cases import configure, danish, files, make, rows, source, write_lines
from support.processes import training_environment

from benchmarks.data.corpus import Corpus, judge
from l2v.data.corpus import near
from l2v.data.corpus.config import Near
from l2v.data.corpus.grams import word_hashes
from l2v.data.corpus.run import Run
from l2v.data.sources import open_rows
from l2v.errors import UserError
from l2v.recipe import Source

QUICK = {"chunk": 50, "language": None}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """1,500 documents with planted copies, near copies and leaks, and their configuration."""
    folder = tmp_path_factory.mktemp("corpus")
    made = Corpus(1500)
    made.write(folder)
    return made, made.config(folder, **QUICK, shard=700)


@pytest.fixture(scope="module")
def built(corpus, tmp_path_factory):
    """The corpus built by one worker: report and folder."""
    out = tmp_path_factory.mktemp("built") / "out"
    return make(corpus[1], out), out


def test_every_planted_leak_and_copy_is_found_and_nothing_else_is_lost(corpus, built):
    report, out = built
    verdict = judge(corpus[0], out)
    assert verdict.planted["leak"] == 6 and verdict.left["leak"] == 0
    assert verdict.planted["copy"] > 50 and verdict.left["copy"] == 0
    assert verdict.left["own"] >= verdict.planted["own"] - report["dropped"]["near-duplicate"] and not verdict.twice
    assert not verdict.gone["lost"] and sum(verdict.gone.values()) == sum(report["dropped"].values())


def test_near_duplicate_recall_on_planted_pairs(corpus, built):
    verdict = judge(corpus[0], built[1])
    assert verdict.dropped("near 0.97") == 1 and verdict.dropped("near 0.85") == 1
    assert verdict.dropped("near 0.81") >= 0.9 and verdict.dropped("near 0.73") <= 0.1


def test_bands_meet_as_often_as_the_formula_says():
    settings = Near()
    assert near.found_share(0.8, settings) > 0.98 and near.found_share(0.4, settings) < 0.05
    signer, words = near.Signer(settings), [f"ord{i}" for i in range(60)]
    (bands, shingles), (other, more) = signer(word_hashes(words)), signer(word_hashes([*words[:-1], "andet"]))
    assert len(shingles) == 58 and near.jaccard(shingles, more) == 57 / 59 and (bands == other).any()


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_number_of_workers_changes_no_byte(corpus, built, tmp_path, workers):
    make(corpus[1], tmp_path / "out", workers)
    assert files(tmp_path / "out") == files(built[1])


@pytest.mark.parametrize("chunk", [pytest.param(7, marks=pytest.mark.slow), 1500])
def test_the_size_of_a_chunk_changes_no_row(corpus, built, tmp_path, chunk):
    make(corpus[1], tmp_path / "out", overrides=(f"chunk={chunk}",))
    assert rows(tmp_path / "out") == rows(built[1])


def command(config, out) -> list[str]:
    return [
        sys.executable,
        "-m",
        "l2v.commands.main",
        "data",
        "build",
        str(config),
        "--out",
        str(out),
        "--workers",
        "2",
    ]


def killed(config, out, at: int) -> None:
    """Start a build in processes of its own and kill it when `at` chunks are there."""
    process = subprocess.Popen(command(config, out), env=training_environment(), stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while len(list((out / ".work" / "chunks").glob("*.parquet"))) < at:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    below = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    _, alive = psutil.wait_procs(below, timeout=30)
    assert not alive, "workers outlived the process that started them"


@pytest.mark.slow
def test_killed_and_started_again_the_files_are_the_same(corpus, built, tmp_path):
    out = tmp_path / "out"
    killed(corpus[1], out, 3)
    assert not list(out.glob("*.parquet"))
    before = {p.name: p.stat().st_mtime_ns for p in (out / ".work" / "chunks").glob("*.parquet")}
    killed(corpus[1], out, len(before) + 5)
    after = {p.name: p.stat().st_mtime_ns for p in (out / ".work" / "chunks").glob("*.parquet")}
    assert before.items() <= after.items(), "an existing chunk was written again"
    subprocess.run(command(corpus[1], out), env=training_environment(), check=True, stderr=subprocess.DEVNULL)
    assert files(out) == files(built[1])


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("at", ["gather", "find", "plan", "write", "make"])
def test_a_stop_between_the_steps_loses_nothing(corpus, built, tmp_path, monkeypatch, at):
    from l2v.data.corpus import duplicates, report, shards

    module = {"gather": duplicates, "find": duplicates, "plan": shards, "write": shards, "make": report}[at]
    real, calls = getattr(module, at), []

    def stop(*arguments):
        calls.append(at)
        if at == "write" and len(calls) < 3:
            return real(*arguments)
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(module, at, stop)
        with pytest.raises(Interrupted):
            make(corpus[1], tmp_path / "out")
    make(corpus[1], tmp_path / "out")
    assert files(tmp_path / "out") == files(built[1])


def test_a_finished_build_is_left_alone_and_another_is_refused(corpus, built, tmp_path):
    _, out = built
    before = files(out)
    assert make(corpus[1], out)["already"] and files(out) == before
    with pytest.raises(UserError, match="holds a build with other keys or other sources; use --fresh"):
        make(corpus[1], out, overrides=("seed=1",))
    (tmp_path / "mine.txt").write_text("min egen fil")
    with pytest.raises(UserError, match="the folder is not empty and holds no build"):
        make(corpus[1], tmp_path)


def test_an_edited_source_is_noticed_and_fresh_builds_again(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": danish(0)}])
    config = configure(tmp_path, "documents", [source("a.jsonl")], **QUICK)
    make(config, tmp_path / "out")
    write_lines(tmp_path / "a.jsonl", [{"text": danish(1)}, {"text": danish(2)}])
    with pytest.raises(UserError, match="--fresh"):
        make(config, tmp_path / "out")
    assert make(config, tmp_path / "out", fresh=True)["splits"] == {"train": 2}


def test_a_source_that_was_missing_is_taken_up_by_the_same_command(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": danish(i)} for i in range(120)])
    config = configure(tmp_path, "documents", [source("a.jsonl"), source("b.jsonl")], **QUICK, near=None)
    assert make(config, tmp_path / "out")["sources"][1]["error"]
    write_lines(tmp_path / "b.jsonl", [{"text": danish(1000 + i)} for i in range(60)])
    report = make(config, tmp_path / "out")
    assert report["splits"] == {"train": 180} and not report["sources"][1]["error"]
    make(config, tmp_path / "whole")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_two_builds_do_not_write_to_one_folder(corpus, tmp_path):
    run = Run.__new__(Run)
    run.out, run.work = tmp_path, tmp_path / ".work"
    run.work.mkdir()
    with run._locked():
        with pytest.raises(UserError, match="another build is writing there"):
            make(corpus[1], tmp_path)


def test_groups_stay_together_and_splits_have_their_shares(tmp_path):
    lines = [{"query": f"Spørgsmål {i}", "positive": danish(i), "group": f"g{i // 4}"} for i in range(2000)]
    write_lines(tmp_path / "a.jsonl", lines)
    shares = {"train": 0.8, "dev": 0.1, "test": 0.1}
    config = configure(tmp_path, "pairs", [source("a.jsonl")], **QUICK, near=None, splits=shares)
    report = make(config, tmp_path / "out")
    splits = defaultdict(set)
    for split, share in shares.items():
        found = rows(tmp_path / "out", split)
        assert abs(len(found) / 2000 - share) < 0.05 and len(found) == report["splits"][split]
        for row in found:
            splits[row["group"]].add(split)
    assert len(splits) == 500 and all(len(s) == 1 for s in splits.values())


def test_empty_positives_and_negatives_never_become_texts(tmp_path):
    pair = {
        "query": "Hvor ligger Skagen henne?",
        "positive": "Skagen ligger øverst i Jylland.",
        "negatives": ["", "Nej da."],
    }
    again = "Skagen ligger øverst i Jylland."
    other = pair | {"query": "Hvad?", "negatives": [again]}
    write_lines(
        tmp_path / "a.jsonl", [pair, pair | {"positive": ""}, pair | {"positive": None}, pair | {"query": " "}, other]
    )
    report = make(configure(tmp_path, "pairs", [source("a.jsonl")], **QUICK, near=None), tmp_path / "out")
    assert report["dropped"] == {"empty positive": 2, "empty query": 1}
    assert [r["negatives"] for r in rows(tmp_path / "out")] == [["Nej da."], []]


def test_leaks_of_every_kind_in_every_field(tmp_path):
    held = "Hvor mange mennesker bor der egentlig på den lille ø Anholt midt i Kattegat om vinteren?"
    short, tiny = "Den korte sætning om sild", "Hej med dig"
    write_lines(tmp_path / "eval.jsonl", [{"text": held}, {"text": short + " her"}, {"text": tiny}])
    run = " ".join(held.split()[2:])
    leaks = [
        (held, "Et svar."), (held.upper().replace("?", "!!"), "Et svar."), ("Spørgsmål", f"Først noget. {run} Så mere."),
        ("Spørgsmål", f"Her står: »{short}« her, ja."), ("hej, MED dig", "Et svar."), ("Kun negativet", "Et svar."),
    ]  # fmt: skip
    fine = [("Hvor mange mennesker bor der?", "Et svar."), ("Jeg siger hej med dig", "Et andet svar."),
            ("Spørgsmål", " ".join(held.split()[:12]))]  # fmt: skip
    lines = [{"query": q, "positive": p, "negatives": [held] if q == "Kun negativet" else []} for q, p in leaks + fine]
    write_lines(tmp_path / "a.jsonl", lines)
    keys = {"decontaminate": {"sources": [{"path": "eval.jsonl"}]}, "length": {"positive": [1, 100]}}
    report = make(configure(tmp_path, "pairs", [source("a.jsonl")], **QUICK, near=None, **keys), tmp_path / "out")
    assert [(r["query"], r["positive"]) for r in rows(tmp_path / "out")] == fine
    assert report["dropped"] == {"leak, exact": 5, "leak, n-gram": 1}


def test_a_split_named_by_its_source_is_not_held_against_itself(tmp_path):
    write_lines(tmp_path / "dev.jsonl", [{"text": danish(1)}])
    write_lines(tmp_path / "train.jsonl", [{"text": danish(1)}, {"text": danish(2)}])
    keys = {"decontaminate": {"sources": [{"path": "dev.jsonl"}]}}
    config = configure(tmp_path, "documents", [source("train.jsonl"), source("dev.jsonl", into="dev")], **QUICK, **keys)
    report = make(config, tmp_path / "out")
    assert report["splits"] == {"train": 1, "dev": 1} and report["dropped"] == {"leak, exact": 1}


def test_lengths_and_languages(tmp_path):
    texts = [
        "To ord.",
        danish(1),
        "Hva slags vær blir det i morgen på Vestlandet, og hvor kaldt blir det?",
        danish(2) * 9,
    ]
    write_lines(tmp_path / "a.jsonl", [{"text": t} for t in texts])
    config = configure(tmp_path, "documents", [source("a.jsonl")], near=None, length={"text": [3, 100]})
    assert make(config, tmp_path / "out")["dropped"] == {"language": 1, "too short": 1, "too long": 1}
    config = configure(tmp_path, "documents", [source("a.jsonl", languages=["no"])], near=None)
    assert make(config, tmp_path / "norsk")["splits"] == {"train": 1}
    config = configure(tmp_path, "documents", [source("a.jsonl", languages=[])], near=None)
    assert make(config, tmp_path / "alle")["dropped"] == {"too short": 1}


def test_counts_add_up_and_the_report_shows_examples(corpus, built):
    report, out = built
    (only,) = report["sources"]
    assert report["records"] == 1500 == sum(report["dropped"].values()) + sum(report["splits"].values())
    text = (out / "report.md").read_text(encoding="utf-8")
    for reason in ("leak, n-gram", "duplicate", "near-duplicate"):
        assert f"### {reason}" in text and 1 <= len(only["examples"][reason]) <= 3
    where, _ = only["examples"]["duplicate"][0]
    gone, stays = (int(part.removeprefix("synthetic/")) for part in where.split(" repeats "))
    assert gone % 25 == 20 and corpus[0].earlier(gone) == stays
    assert json.loads((out / "report.json").read_text(encoding="utf-8")) == report
    assert str(out.parent) not in text


def test_a_recipe_reads_the_shards_and_the_hubs_library_the_card(built):
    import datasets

    report, out = built
    total = report["splits"]["train"]
    assert len(list(out.glob("train-*.parquet"))) == -(-total // 700)
    texts = open_rows([Source(str(out / "train-*.parquet"))], "documents")
    assert len(texts) == total and texts[0]["text"] == rows(out)[0]["text"]
    loaded = datasets.load_dataset(str(out))  # by the card's front matter
    assert {name: len(part) for name, part in loaded.items()} == report["splits"]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert (
        card.startswith("---\nlanguage:\n- da\nlicense: cc0-1.0\n")
        and "| synthetic | documents.jsonl | cc0-1.0 |" in card
    )


def test_a_folder_of_shards_is_a_source_of_a_recipe(tmp_path):
    import datasets

    for name in ("b", "a"):
        datasets.Dataset.from_dict({"text": [name]}).to_parquet(str(tmp_path / f"{name}.parquet"))
    assert open_rows([Source(str(tmp_path))], "documents")["text"][:] == ["a", "b"]
    for path, says in ((tmp_path / "*.txt", "no readable file matches"), (tmp_path / "c", "file not found")):
        with pytest.raises(UserError, match=says):
            open_rows([Source(str(path))], "documents")
    assert open_rows([Source(str(tmp_path), limit=1)], "documents")["text"][:] == ["a"]
