"""The README's Python runs, and its numbers are those of the committed run."""

import json
import re
from pathlib import Path

import pytest

from l2v.errors import UserError
from l2v.model.embedded import SMOLLM2, resolve
from l2v.quickstart import markdown

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=["encoder", "parts"])
def test_python_blocks_run(block, tmp_path, monkeypatch, capsys):
    try:
        resolve(SMOLLM2)
    except UserError:
        pytest.skip("the embedded base is not installed")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "(2, 576) float32" in printed or "torch.Size([12, 576]) torch.Size([4, 576])" in printed


def test_the_table_is_the_committed_run():
    report = json.loads((ROOT / "docs" / "quickstart" / "quickstart.json").read_text(encoding="utf-8"))
    assert markdown(report) == (ROOT / "docs" / "quickstart" / "quickstart.md").read_text(encoding="utf-8")
    assert markdown(report).strip() in README


def test_the_committed_run_meets_what_is_said_of_it():
    report = json.loads((ROOT / "docs" / "quickstart" / "quickstart.json").read_text(encoding="utf-8"))
    assert report["seconds"]["all"] < 600 and report["machine"]["cores"] == 2
    held_out = report["mntp_held_out"]
    assert held_out["before"] - held_out["after"] >= 3
    paired = {(p["better"], p["than"]): p for p in report["paired"]}
    for stage in ("simcse", "supervised"):
        assert paired[stage, "mntp"]["low"] > 0


def test_every_named_file_is_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
