"""Loading, encoding, exporting and searching print nothing of other libraries."""

import json
import subprocess
import sys

from support.made_run import make_run
from support.processes import training_environment

SCRIPT = """
import sys
from l2v import Encoder
encoder = Encoder.from_pretrained(sys.argv[1])
encoder.encode(["Hunden løber.", "Katten sover."])
encoder.save(sys.argv[2])
from l2v.commands.main import main
assert main(["search", sys.argv[2], "hund", "--texts", sys.argv[3], "--json"]) == 0
"""


def test_a_process_of_its_own_is_quiet(tmp_path, tiny_recipe, base):
    """With every warning of Python switched on, and DeepSpeed left to find its accelerator."""
    given = {"base.model": str(base), "base.init": "pretrained", "base.config": None, "base.tokenizer": None}
    run = make_run(tiny_recipe(tmp_path, **given), stages=("mntp", "simcse", "supervised"))
    (tmp_path / "t.txt").write_text("Hunden løber.\nKatten sover.\n", encoding="utf-8")
    environment = {key: value for key, value in training_environment().items() if key != "DS_ACCELERATOR"}
    command = [sys.executable, "-W", "default::FutureWarning", "-W", "default::UserWarning", "-c", SCRIPT]
    done = subprocess.run(
        [*command, str(run), str(tmp_path / "out"), str(tmp_path / "t.txt")], env=environment, text=True,
        capture_output=True, timeout=300, check=True,
    )  # fmt: skip
    assert [json.loads(line)["rank"] for line in done.stdout.splitlines()] == [1, 2]
    said = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip() and "text/s]" not in line]
    assert said[0] == "searching 2 texts", done.stderr
    assert len(said) == 2 and said[1].startswith(f"next: l2v search {tmp_path / 'out'} "), done.stderr
