"""The contributor kit: the word check, the workflow, the changelog and the citation say what the repository holds."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import l2v

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / ".ci" / "words.py"


def words():
    spec = importlib.util.spec_from_file_location("words", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WORDS = words()
WORDINGS = [wording for phrase in WORDS.WORDS for wording in WORDS.examples(phrase)]


@pytest.mark.parametrize("wording", WORDINGS)
def test_the_word_check_finds_a_planted_phrase(wording):
    first, *rest = wording.split()
    assert WORDS.check(f"Fine.\nIt says {wording} here.") == [(2, wording, WORDS.check(wording)[0][2])]
    assert [line for line, _, _ in WORDS.check(wording.capitalize())] == [1]
    if rest:
        assert WORDS.check(f"x = 1  # {first}\n    # {' '.join(rest)}")[0][:2] == (1, wording)


def test_the_word_check_leaves_ordinary_uses():
    text = "An inner product; there is a mean; amend it; it goes on top; an address; finite; ValueErrors: none; told."
    assert WORDS.check(text, python=True) == []
    heading = "    Err" + "ors: ValueError"
    assert WORDS.check(heading) == [] and WORDS.check(heading, python=True)[0][2] == "Raises:"


def test_the_word_check_names_file_line_and_replacement(tmp_path):
    bad, fine = tmp_path / "bad.md", tmp_path / "fine.md"
    bad.write_text(f"# Title\n\nIt is {WORDINGS[0]} it.\n")
    fine.write_text("# Title\n")
    run = [sys.executable, SCRIPT]
    found = subprocess.run([*run, bad, fine], capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert found.stdout == f"{bad}:3: '{WORDINGS[0]}'; write: {WORDS.check(WORDINGS[0])[0][2]}\n"
    assert subprocess.run([*run, fine], capture_output=True, text=True, check=False).returncode == 0
    assert {"README.md", "pyproject.toml"} <= set(WORDS.tracked())


def read_yaml(name):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_workflow_calls_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    workflow = read_yaml(".github/workflows/ci.yml")
    (job,) = workflow["jobs"].values()
    rows = job["strategy"]["matrix"]["include"]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make ${{ matrix.target }}"]
    called = {target for row in rows for target in row["target"].split()}
    assert called <= targets and called >= {"lint", "types", "test", "docs", "wheel-test"}
    assert {row["python"] for row in rows if row["target"] == "test"} == {"3.11", "3.12", "3.13"}
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]) for step in job["steps"] if "uses" in step)


def test_every_file_that_the_guide_names_exists():
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", guide)
    named = [n for n in re.findall(r"`([\w./-]+)`", guide) if n.count("/") and not n.startswith("git/")]
    assert len(links) > 10 and len(named) > 10
    for name in {*links, *named}:
        assert (ROOT / name).exists(), name


def test_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\]", changelog, re.MULTILINE)
    assert headings[:2] == ["Unreleased", project["version"]]
    assert read_yaml("CITATION.cff")["version"] == l2v.__version__ == project["version"]


def test_the_citation_holds_what_its_format_requires():
    citation = read_yaml("CITATION.cff")
    assert citation.keys() >= {"cff-version", "message", "title", "authors"} and citation["cff-version"] == "1.2.0"
    assert all(reference.keys() >= {"type", "title", "authors"} for reference in citation["references"])
    for author in [*citation["authors"], *(a for r in citation["references"] for a in r["authors"])]:
        assert author.keys() in ({"name"}, {"family-names", "given-names"})


def test_templates_and_hooks_parse():
    for file in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = read_yaml(file)
        if file.name == "config.yml":
            continue
        assert form.keys() >= {"name", "description", "body"}
        fields = [field for field in form["body"] if field["type"] != "markdown"]
        assert (
            len({field["id"] for field in fields})
            == len({field["attributes"]["label"] for field in fields})
            == len(fields)
        )
    for hook in read_yaml(".pre-commit-config.yaml")["repos"][0]["hooks"]:
        assert hook.keys() >= {"id", "name", "entry", "language"}
        if hook["entry"].startswith(".venv/bin/python "):
            assert (ROOT / hook["entry"].split()[1]).is_file()


def test_packages_say_that_they_are_typed():
    assert (ROOT / "l2v" / "py.typed").is_file() and (ROOT / "kernels" / "l2v_kernels" / "py.typed").is_file()
