"""The contributor kit: the word check, the workflow, the changelog and the citation say what the repository holds."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

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
