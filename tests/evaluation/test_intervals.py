"""Intervals and paired comparisons: against theory, and through mteb's results and the kept ones of the next run."""

import json

import numpy as np
import pytest

from l2v.commands.main import main
from l2v.evaluation import remarks
from l2v.evaluation.baselines import Tfidf
from l2v.evaluation.intervals import PIECE, bootstrap_interval, compare, comparisons, interval, paired
from l2v.evaluation.local import local_benchmark
from l2v.evaluation.run import Row, Score, run_model


def test_pieces_change_no_number(monkeypatch):
    values = np.random.default_rng(3).random(70)
    whole = bootstrap_interval(values)
    monkeypatch.setattr("l2v.evaluation.intervals.PIECE", 700)
    assert bootstrap_interval(values) == whole and PIECE > 700
    direct = np.random.default_rng(0)
    means = values[direct.integers(0, 70, (10_000, 70))].mean(axis=1)  # what the pieces replace
    assert whole == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))


def test_large_sets_take_fewer_draws_and_agree_with_the_normal(monkeypatch):
    monkeypatch.setattr("l2v.evaluation.intervals.MAX_DRAWN", 2_000_000)
    values = np.random.default_rng(1).normal(0.5, 1, 1500)
    low, high = bootstrap_interval(values)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(1500), rel=0.1)


def test_cells_are_drawn_apart():
    """The mean of two cells: the variances add up, however different the sizes are."""
    generator = np.random.default_rng(2)
    small, large = generator.normal(0, 1, 50), generator.normal(4, 1, 800)
    low, high = bootstrap_interval([small, large])
    assert low < (small.mean() + large.mean()) / 2 < high
    error = np.sqrt(small.var() / 50 + large.var() / 800) / 2
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_interval([small, small[:0]])


def test_a_paired_difference_is_surer_than_two_intervals():
    generator = np.random.default_rng(4)
    hard = generator.random(200)
    first, second = hard + 0.05 + generator.normal(0, 0.01, 200), hard
    found = compare(first, second)
    assert found["low"] > 0.04 and found["difference"] == pytest.approx((first - second).mean())
    one, other = bootstrap_interval(first), bootstrap_interval(second)
    assert one[0] < other[1]  # alone, the intervals overlap


def test_only_the_same_queries_are_compared():
    first = {"test/da": {"b": 1.0, "a": 0.5}}
    assert paired(first, {"test/da": {"a": 0.5, "b": 0.5}})["difference"] == pytest.approx(0.25)
    assert paired(first, {"test/da": {"a": 0.5}}) is None and paired(first, {}) is None

    def row(name, cells, score):
        return Row(name, {}, {"t": Score(score, {}, "ndcg_at_10", "Retrieval", "r", 0.0, False, cells)})

    rows = [row("x", first, 0.75), row("y", {"test/da": {"a": 0.5, "b": 0.5}}, 0.5), row("z", {}, 0.9)]
    [found] = comparisons(rows, "t")
    assert (found["better"], found["than"]) == ("x", "y")


@pytest.fixture
def pairs(tmp_path, sentences, write_jsonl):
    folder = tmp_path / "mine"
    folder.mkdir()
    # a question shares its first word with several texts, so some are found and some are not
    rows = [
        {"query": f"{t.split()[0]} {t[-6:-1][::-1]} {at}", "positive": t} for at, t in enumerate(sentences[::3][:60])
    ]
    write_jsonl(folder / "pairs.jsonl", rows)
    write_jsonl(folder / "bitext.jsonl", [{"da": t, "en": t.replace("en", "ena")} for t in sentences[:40]])
    return folder


def test_the_scores_of_queries_are_kept_and_their_mean_is_the_score(pairs, tmp_path):
    tasks = local_benchmark(pairs).tasks

    def scores(again=False):
        return run_model(Tfidf(), tasks, tmp_path / "out", log=lambda _: None, again=again).scores

    first = scores()
    found = first["mine-pairs"]
    values = [*found.queries["test/default"].values()]
    assert len(values) == len({*found.queries["test/default"]}) >= 30
    assert np.mean(values) == pytest.approx(found.score, abs=2e-5)
    low, high = interval(found.queries)
    assert low < found.score < high
    assert first["mine-bitext"].queries == {}  # F1 is no mean over queries
    second = scores()
    assert second["mine-pairs"].cached and second["mine-pairs"].queries == found.queries
    [file] = (tmp_path / "out" / "queries").rglob("*.json")
    kept = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(kept | {"cells": {"test/default": {"q0": 0.1}}}), encoding="utf-8")
    assert scores()["mine-pairs"].queries == {}  # not the queries of this score
    file.write_text("{", encoding="utf-8")
    assert scores()["mine-pairs"].queries == {} and scores(again=True)["mine-pairs"].queries == found.queries


def test_the_table_has_own_tasks_first_intervals_and_tfidf(pairs, tiny_base, tmp_path, capsys):
    out = tmp_path / "scores"
    command = ["eval", str(tiny_base), "--baselines", "tfidf", "--benchmark", f"local:{pairs}", "--out", str(out)]
    assert main(command) == 0
    said, found = capsys.readouterr().out, json.loads((out / "results.json").read_text(encoding="utf-8"))
    tfidf, encoder = (row["scores"]["mine-pairs"] for row in found["rows"])
    assert tfidf["low"] < tfidf["score"] < tfidf["high"] and tfidf["queries"] == encoder["queries"]
    assert "low" not in found["rows"][0]["scores"]["mine-bitext"]
    [compared] = found["comparisons"]["mine-pairs"]
    assert compared["difference"] == pytest.approx(tfidf["score"] - encoder["score"], abs=5e-5)
    table = (out / "table.md").read_text(encoding="utf-8")
    score, limits = 100 * tfidf["score"], remarks.interval(tfidf)
    assert f"**{score:.2f}** ({limits})" in table and table in said
    assert "TF-IDF, which compares words, scores higher: " in table
    assert f"pairs {score:.2f} against {100 * encoder['score']:.2f} of models/tiny" in table.replace(
        found["rows"][1]["name"], "models/tiny"
    )
    assert f"(paired bootstrap, 95%: {100 * compared['low']:+.2f} to " in table
    assert (out / "own.png").read_bytes()[:4] == b"\x89PNG"
    assert said.rstrip().splitlines()[-1] == f"Next: l2v search {tiny_base} QUERY --texts FILE"


def test_own_tasks_are_run_and_shown_before_those_of_mteb(pairs):
    from l2v.evaluation.report import markdown
    from l2v.evaluation.select import select

    found = select(["DKHateClassification", f"local:{pairs}", "AngryTweetsClassification"])
    names = [task.metadata.name for task in found.tasks]
    assert names == ["mine-bitext", "mine-pairs", "DKHateClassification", "AngryTweetsClassification"]

    def score(value, kind):
        return {"score": value, "cells": {}, "metric": "accuracy", "type": kind}

    rows = [
        {"name": name, "identity": {}, "failed": {}, "means": {"seb_da": None, "task": value, "task_type": value},
         "scores": {n: score(value, "STS" if n.startswith("mine") else "Classification") for n in names}}
        for name, value in (("a", 0.5), ("b", 0.25))
    ]  # fmt: skip
    text = markdown({"tasks": names, "rows": rows, "local": found.local})
    assert text.startswith("|  | bitext | pairs |\n|-|-:|-:|\n| a | **50.00** | **50.00** |\n| b | 25.00 | 25.00 |\n")
    assert "|  | Mean of tasks | Mean of types | DKHate | Tweets |\n" in text
    assert remarks.best({"rows": rows[:1]}, "mine-pairs") == []  # one row is no contest


def test_what_the_intervals_are_worth():
    def row(name, queries):
        return {
            "name": name,
            "identity": {},
            "scores": {"x-faq": {"score": 0.5, "queries": queries}, "x-sts": {"score": 0.5}},
        }

    report = {"rows": [row("a", 1200)], "tasks": ["x-faq", "x-sts"], "local": ["x"]}
    assert remarks.counts(report, report["tasks"]) == "95% intervals: bootstrap over queries (faq: 1,200)."
    assert remarks.counts(report, ["x-sts"]) is None
    report["rows"] = [row("a", 20)]
    assert remarks.counts(report, ["x-faq"]).endswith("(faq: 20). Fewer than 30 queries make an interval too narrow.")
    same = {"better": "a", "than": "b", "difference": 0.0, "low": 0.0, "high": 0.0}
    report |= {"rows": [row("a", 20), row("b", 20)], "comparisons": {"x-faq": [same, same | {"than": "gone"}]}}
    assert remarks.comparisons(report, ["x-faq"]) == ["faq: a and b score the same on every query."]
