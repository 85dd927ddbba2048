"""Every example runs on a tiny base, and the numbers that it prints are checked."""

import csv
import json
import re
import runpy
import subprocess
import sys

import pytest
from support.documents import ROOT, links
from support.program import Program

from l2v.recipe.load import load_recipe

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """The program `l2v` on a path of its own."""
    program = Program(tmp_path_factory.mktemp("bin"))
    yield program
    program.close()


def bash(script, folder, program, *arguments, **environment):
    """The output of a script that ends with exit code 0."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", str(EXAMPLES / script), *arguments], cwd=folder, text=True, timeout=300,
        env=program.environment(**environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def python(script, monkeypatch, capsys, *arguments):
    """What a script prints, in this process."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    return capsys.readouterr().out


def found(output):
    """The scores and texts of a search at the end of an output."""
    return [(float(score), text) for score, text in re.findall(r"^(-?[01]\.\d{3})  (.+)$", output, flags=re.MULTILINE)]


@pytest.fixture(scope="session")
def own_data(tmp_path_factory, program, base):
    """A folder in which the CSV example has run, and what it printed."""
    folder = tmp_path_factory.mktemp("own-data")
    steps = ["mntp.steps=2", "mntp.log_every=1", "supervised.steps=3", "supervised.warmup=1", "supervised.log_every=1"]
    quick = [*steps, "base.precision=fp32", "tracking.tensorboard=false"]
    return folder, bash("own_data/train_on_csv.sh", folder, program, *quick, BASE=str(base))


def answers():
    with open(EXAMPLES / "own_data" / "faq.csv", newline="", encoding="utf-8") as file:
        return [row["Svar"] for row in csv.DictReader(file, delimiter=";")]


def losses(stage):
    rows = map(json.loads, (stage / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def test_the_table_names_every_example():
    named = {path for path, _ in links(EXAMPLES / "README.md")}
    files = [path for path in EXAMPLES.rglob("*") if path.suffix in {".py", ".sh", ".ipynb", ".csv"}]
    assert len(files) >= 7 and set(files) <= named


def test_encode_and_search(base, monkeypatch, capsys):
    shape, *ranking = python("encode_and_search.py", monkeypatch, capsys, base).splitlines()
    assert shape == "(4, 32) float32"
    scores = [score for score, _ in found("\n".join(ranking))]
    assert len(scores) == 4 and scores == sorted(scores, reverse=True) and scores[0] > scores[-1]


def test_the_csv_is_trained_on_and_searched(own_data):
    folder, output = own_data
    rows = answers()
    assert len(rows) == 40 and any("\n" in row for row in rows)
    assert "faq.csv: 40 pairs, delimiter semicolon" in output
    assert "read as query: Spørgsmål, positive: Svar" in output
    assert load_recipe(str(folder / "faq.yaml")).order() == ["mntp", "supervised"]
    for stage, steps in (("mntp", 2), ("supervised", 3)):
        assert len(losses(folder / "runs" / "faq" / stage)) == steps
        assert all(loss > 0.01 for loss in losses(folder / "runs" / "faq" / stage))
    scores = [score for score, _ in found(output)]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    assert all(any(answer.startswith(text) for answer in rows) for _, text in found(output))


def test_negatives_are_mined_and_trained_on(own_data, program):
    folder, _ = own_data
    quick = ["steps=3", "warmup=1", "log_every=1", "base.precision=fp32", "tracking.tensorboard=false"]
    output = bash("mine_and_train_again.sh", folder, program, *quick)
    rows = [json.loads(line) for line in (folder / "mined.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = {" ".join(answer.split()) for answer in answers()}
    mined = [negative for row in rows for negative in row.get("negatives", ())]
    assert len(rows) == 40 and mined and {" ".join(text.split()) for text in mined} <= texts
    assert all(row["positive"] not in row.get("negatives", ()) for row in rows)
    again = losses(folder / "runs" / "faq-mined" / "supervised")
    # The same start and the same seed: what differs is the negatives.
    assert len(again) == 3 and min(again) > 0.01 and again != losses(folder / "runs" / "faq" / "supervised")
    assert len(found(output)) == 3


def test_kernels_alone(monkeypatch, capsys):
    output = python("kernels_alone.py", monkeypatch, capsys)
    assert float(re.search(r"largest difference (\S+)", output)[1]) < 1e-5
    pairs = re.findall(r"info_nce: \w+ (\S+), plain PyTorch (\S+)", output)
    assert len(pairs) == 2
    for ours, plain in pairs:
        assert float(ours) == pytest.approx(float(plain), rel=1e-4) and float(ours) > 0.01


def test_sentence_transformers_loss(base, monkeypatch, capsys):
    pytest.importorskip("sentence_transformers")
    monkeypatch.setenv("STEPS", "3")
    output = python("sentence_transformers_loss.py", monkeypatch, capsys, base)
    steps, first, last = re.search(r"(\d+) steps, loss (\S+) to (\S+)", output).groups()
    assert steps == "3" and float(first) > 0.01 and float(last) != float(first)


@pytest.mark.slow
def test_the_notebook_is_executed(base, program, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in code)
    for key, value in program.environment(BASE=str(base), STEPS="2").items():
        monkeypatch.setenv(key, value)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    encoded, trained, scored, searched = ("".join(o.get("text", "") for o in cell.outputs) for cell in code)
    assert "(2, 32) float32" in encoded
    assert "done, adapter in runs/notebook/supervised" in trained
    for stage in ("mntp", "simcse", "supervised"):
        logged = losses(tmp_path / "runs" / "notebook" / stage)
        assert logged and min(logged) > 0.01
    scores = re.findall(r"(\w+): nDCG@10 (\S+), margin (\S+)", scored)
    assert [name for name, _, _ in scores] == ["untrained", "trained"]
    assert scores[0][1:] != scores[1][1:] and all(0 <= float(ndcg) <= 1 for _, ndcg, _ in scores)
    assert len(found(searched)) == 3
