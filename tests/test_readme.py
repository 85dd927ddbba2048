"""The README is short, its Python and its commands work, and its numbers are those of the committed run."""

import argparse
import importlib
import itertools
import json
import re
import tomllib

import pytest
import torch
from support.documents import ROOT, Parsed, blocks, commands, paragraphs, words
from support.versions import need_smollm2

from l2v.data.corpus.config import load_config
from l2v.quickstart.table import markdown
from l2v.recipe.load import load_recipe

DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = DOCS / "results" / "quickstart"
REPORT = json.loads((RESULTS / "quickstart.json").read_text(encoding="utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MAIN = PROJECT["scripts"]["l2v"]
PYTHON = {
    "README.md": ["(2, 576) float32"],
    "docs/python.md": ["(2, 576) float32\n(256,)", "torch.Size([12, 576]) torch.Size([4, 576])\n2.13 15.69"],
}
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
COMMANDS = [
    pytest.param(command, id=f"{page.name}: {' '.join(command)[:70]}")
    for page in PAGES
    for command in commands(page.read_text(encoding="utf-8"))
]


def test_it_is_short_and_shows_python_early():
    lines = README.splitlines()
    assert len(lines) <= 120
    begin = lines.index("```python")
    assert lines.index("```", begin) < 40
    lengths = [words(paragraph) for paragraph in paragraphs(README)]
    assert len(lengths) > 10
    assert sum(lengths) / len(lengths) < 30


@pytest.mark.parametrize(("page", "at"), [(page, at) for page, printed in PYTHON.items() for at in range(len(printed))])
def test_python_blocks_run(page, at, tmp_path, monkeypatch, capsys):
    need_smollm2()
    code = blocks((ROOT / page).read_text(encoding="utf-8"), "python")
    assert len(code) == len(PYTHON[page])
    monkeypatch.chdir(tmp_path)
    made: dict = {}
    exec(compile(code[at], page, "exec"), made)
    printed = capsys.readouterr().out
    assert PYTHON[page][at] in printed
    shown = re.findall(r"^print\(.*\)  # (.+)$", code[at], flags=re.MULTILINE)
    assert shown and all(comment in printed.splitlines() for comment in shown)
    if "pairs" in made:  # the low-level example, whose losses are those of torch
        queries, documents = torch.nn.functional.normalize(made["vectors_SE"]).view(2, 2, -1).unbind(1)
        expected = torch.nn.functional.cross_entropy(20 * queries @ documents.T, torch.arange(2))
        assert made["pairs"].item() == pytest.approx(expected.item(), rel=1e-4) and expected > 1
        words = torch.nn.functional.cross_entropy(made["logits_LV"], made["batch"].labels_L)
        assert made["words"].item() == pytest.approx(words.item(), rel=1e-4)


@pytest.fixture
def parse(monkeypatch):
    """Hand a command line to the real program, up to the point where its arguments are parsed."""

    def program(entry: str, arguments: list[str]) -> argparse.Namespace:
        for name in ("parse_args", "parse_intermixed_args"):
            original = getattr(argparse.ArgumentParser, name)

            def stop(self, args=None, namespace=None, original=original):
                raise Parsed(original(self, args, namespace))

            monkeypatch.setattr(argparse.ArgumentParser, name, stop)
        module, _, function = entry.partition(":")
        try:
            code = getattr(importlib.import_module(module), function)(arguments)
        except Parsed as parsed:
            return parsed.arguments
        raise AssertionError(f"{entry} {arguments} parsed nothing and returned {code}")

    return program


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_accepted_by_their_programs(command, parse, monkeypatch):
    monkeypatch.chdir(ROOT)
    for word in command:
        if word.startswith(("launch/", "benchmarks/")):
            assert (ROOT / word).exists(), f"{word} does not exist"
    program, arguments = command[0].removeprefix(".venv/bin/"), command[1:]
    if program == "l2v":
        check_values(parse(MAIN, arguments))
    elif "launch/train.py" in command:
        arguments = command[command.index("launch/train.py") + 1 :]
        check_values(parse("l2v.train:main", arguments))
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE)
        variables = [word.partition("=")[0] for word in arguments if "=" in word]
        assert {word for word in arguments if "=" not in word} <= set(targets)
        assert all(f"$({variable})" in makefile for variable in variables)
    elif program == "pip":
        check_packages(arguments)
    elif program == "python" and arguments[0] == "-c":
        compile(arguments[1], "page", "exec")
    elif program == "python":
        assert arguments[0] == "-m"
        assert importlib.util.find_spec(arguments[1])
    elif program in ("docker", "torchrun") and "l2v" in arguments:
        check_values(parse(MAIN, arguments[arguments.index("l2v") + 1 :]))
    else:
        assert program in {"bash", "cp", "docker", "export", "hf", "kubectl", "mkdir", "sbatch", "source"}


def check_values(arguments: argparse.Namespace) -> None:
    """The recipe with its overrides, and files of this repository, are what the command says."""
    recipe = getattr(arguments, "recipe", None)
    if recipe and not recipe.isupper() and recipe[0] != "$" and not recipe.endswith(("mine.yaml", "faq.yaml")):
        load_recipe(recipe, getattr(arguments, "overrides", []), getattr(arguments, "stage", None))
    config = getattr(arguments, "config", None)
    if config:
        load_config(config, [override.replace("FOLDER", str(ROOT)) for override in arguments.overrides])
    for benchmark in getattr(arguments, "benchmark", None) or []:
        if benchmark.endswith(".yaml"):
            assert (ROOT / benchmark.removeprefix("local:")).is_file()


def check_packages(arguments: list[str]) -> None:
    """Extras exist, and a pinned package has the version that the Makefile installs."""
    assert arguments[0] == "install"
    for word in arguments[1:]:
        if extras := re.fullmatch(r"(?:\.|l2v)\[(.+)\]", word):
            assert set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"])
        elif "==" in word and not word.startswith("gt-all"):
            assert word in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_a_prediction_runs_as_written(monkeypatch, capsys):
    command = next(c for c in commands(README) if c[:2] == ["l2v", "plan"])
    monkeypatch.chdir(ROOT)
    module, _, function = MAIN.partition(":")
    assert getattr(importlib.import_module(module), function)(command[1:]) == 0
    assert "supervised" in capsys.readouterr().out


def test_own_data_in_three_commands(tmp_path, monkeypatch):
    """`l2v init` as written gives a recipe that loads; the two commands after it name its file, run and texts."""
    init, train, search = (c[1:] for c in commands(README) if c[1] == "init" or any("faq" in word for word in c))
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"Hvad er nummer {n}?;Det er svar nummer {n}.\n" for n in range(20))
    (tmp_path / "faq.csv").write_text("Spørgsmål;Svar\n" + rows, encoding="utf-8")
    module, _, function = MAIN.partition(":")
    assert getattr(importlib.import_module(module), function)(init) == 0
    recipe = load_recipe(train[1])
    assert search[1] == f"runs/{recipe.name}" and search[-2:] == ["--texts", "faq.csv"]
    assert {source.path for source in recipe.stages["supervised"].data} == {"faq.csv"}


def test_the_recipe_that_extends_another_loads(tmp_path, monkeypatch):
    (block,) = blocks((DOCS / "training.md").read_text(encoding="utf-8"), "yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "support-da.yaml").write_text(block, encoding="utf-8")
    recipe = load_recipe("support-da.yaml")
    assert (recipe.name, list(recipe.stages)) == ("support-da", ["mntp", "simcse", "supervised"])


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_table_is_the_committed_run(page):
    written = (RESULTS / "quickstart.md").read_text(encoding="utf-8")
    assert markdown(REPORT) == written
    table, _, facts = written.partition("\n\n")
    text = (ROOT / page).read_text(encoding="utf-8")
    assert table in text
    if page == "docs/quickstart.md":
        assert set(re.findall(r"\d+\.\d+", facts)) <= set(re.findall(r"\d+\.\d+", text))


def test_the_committed_run_meets_what_is_said_of_it():
    assert REPORT["machine"]["cores"] == 2 and REPORT["base"] == "gemma-3-270m"
    assert REPORT["steps"] == {name: stage.steps for name, stage in load_recipe("gemma-3-270m-da").stages.items()}
    held_out = REPORT["mntp_held_out"]
    assert held_out["before"] - held_out["after"] >= 3
    paired = {(p["better"], p["than"]): p for p in REPORT["paired"]}
    stages = ("untrained, bidirectional", "mntp", "crops", "supervised")
    for before, stage in itertools.pairwise(stages):
        assert paired[stage, before]["low"] > 0
    fused = paired["TF-IDF + supervised", "TF-IDF (characters)"]
    assert fused["low"] < 0 < fused["high"], "level"
    rows = {row["name"]: row for row in REPORT["rows"]}
    assert max(rows, key=lambda name: rows[name]["ndcg_at_10"]) == "TF-IDF (characters)"
    assert max(rows, key=lambda name: rows[name]["ndcg_disjoint"]) == "supervised"


def test_extras_are_those_of_the_package():
    named = re.search(r"^Extras: (.*?)\.", README, flags=re.MULTILINE)[1]
    assert set(re.findall(r"`([\w-]+)`", named)) == set(PROJECT["optional-dependencies"])
