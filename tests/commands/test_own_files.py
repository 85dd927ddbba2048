"""A folder with one file of each readable form, through every command that reads data: the same rows are counted everywhere."""

import json

import pytest
from support.forms import FORMS, ROWS, put

from l2v.commands.main import main

COUNT = len(FORMS) * len(ROWS)


@pytest.fixture
def folder(tmp_path):
    """The files; their names also tell `l2v eval` that they are pairs."""
    folder = tmp_path / "filer"
    folder.mkdir()
    for name in FORMS:
        put(tmp_path, name).rename(folder / f"pairs-{name}")
    return folder


def test_the_same_rows_are_counted_everywhere(folder, base, run_here, capfd, tmp_path):
    assert main(["data", "check", "filer", "--base", str(base)]) == 0
    checked = capfd.readouterr().out
    assert f"filer: {COUNT} pairs" in checked and f"same twice: {COUNT - len(ROWS)} " in checked

    assert main(["init", "alt", "--data", "filer", "--base", str(base)]) == 0
    assert f"filer: {COUNT} pairs" in capfd.readouterr().out
    quick = ("mntp.steps=4", "supervised.steps=4", "base.precision=fp32", "tracking.tensorboard=false")
    trained = run_here("alt.yaml", *quick)
    assert f"mntp: {COUNT} documents" in trained and f"supervised: {COUNT} pairs" in trained
    assert "done, adapter in runs/alt/supervised" in trained

    benchmark = ["--benchmark", "local:filer", "--prompts", "off", "--out", "scores"]
    assert main(["eval", "runs/alt", *benchmark]) == 0
    scores = json.loads((tmp_path / "scores" / "results.json").read_text(encoding="utf-8"))
    assert len(scores["rows"][0]["scores"]) == len(FORMS)  # a task a file, each of all its rows:
    said = capfd.readouterr().out
    assert f"{len(FORMS)} results, 0 skipped" in said and "rows skipped" not in said

    assert main(["search", "runs/alt", "Må man få øl?", "--texts", "filer", "--top", str(COUNT), "--json"]) == 0
    found = capfd.readouterr()
    hits = [json.loads(line) for line in found.out.splitlines()]
    assert len(hits) == COUNT and f"searching {COUNT} texts" in found.err
    assert {hit["file"] for hit in hits} == {f"filer/pairs-{name}" for name in FORMS}
    assert sorted(hit["row"] for hit in hits if hit["file"] == "filer/pairs-g.xlsx") == [2, 3, 4]
