"""Killed after a checkpoint and started again: the same bits as if nothing had happened."""

import signal
import time
from pathlib import Path

import pytest
from support.processes import finish, start_ranks

STAGES = ("mntp", "simcse", "supervised")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "zero", "precision"), [(1, 1, "fp32"), (2, 2, "bf16")], ids=["one-rank-fp32", "two-ranks-zero2-bf16"]
)
def test_resume_is_bitwise(tmp_path, tiny_recipe, world, zero, precision):
    changes = {
        f"stages.{name}.{k}": v for name in STAGES for k, v in {"steps": 30, "save_every": 4, "from": "base"}.items()
    }
    recipe = tiny_recipe(tmp_path, **changes, **{"base.precision": precision, "zero.stage": zero})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start_ranks([[recipe, f"out={whole}"]] * world))

    started = start_ranks([[recipe, f"out={broken}"]] * world)
    deadline = time.monotonic() + 300
    while not list(broken.glob("simcse/checkpoints/step-*")):  # in the middle of the second stage
        assert time.monotonic() < deadline and all(p.poll() is None for p in started)
        time.sleep(0.01)
    for process in started:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert (broken / "mntp" / "adapter").is_dir() and not (broken / "simcse" / "adapter").is_dir()

    said = finish(start_ranks([[recipe, f"out={broken}"]] * world))[0]
    assert "mntp: already trained" in said and "simcse: continues after step" in said
    for stage in STAGES:
        file = Path(stage) / "adapter" / "adapter_model.safetensors"
        assert (whole / file).read_bytes() == (broken / file).read_bytes(), stage
        rows = (broken / stage / "metrics.jsonl").read_text().splitlines()
        assert len(rows) == 30, "every step stands in the metrics once"
