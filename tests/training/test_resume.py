"""Killed after a checkpoint and started again: the same bits as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STAGES = ("mntp", "simcse", "supervised")


def processes(recipe: Path, environment: dict, world: int, *overrides: str) -> list[subprocess.Popen]:
    from helpers import free_port

    port = str(free_port())
    return [
        subprocess.Popen(
            [sys.executable, "-m", "l2v.train", str(recipe), *overrides],
            env=environment
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_PORT": port},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]


def finish(started: list[subprocess.Popen]) -> str:
    outputs = [p.communicate(timeout=600)[0] for p in started]
    assert all(p.returncode == 0 for p in started), "\n".join(outputs)
    return outputs[0]


@pytest.fixture
def environment():
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1"}
    return os.environ | own


@pytest.mark.parametrize(
    ("world", "zero", "precision"), [(1, 1, "fp32"), (2, 2, "bf16")], ids=["one-rank-fp32", "two-ranks-zero2-bf16"]
)
def test_resume_is_bitwise(tmp_path, tiny_recipe, environment, world, zero, precision):
    changes = {
        f"stages.{name}.{k}": v for name in STAGES for k, v in {"steps": 30, "save_every": 4, "from": "base"}.items()
    }
    recipe = tiny_recipe(tmp_path, **changes, **{"base.precision": precision, "zero.stage": zero})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(processes(recipe, environment, world, f"out={whole}"))

    started = processes(recipe, environment, world, f"out={broken}")
    deadline = time.monotonic() + 300
    while not list(broken.glob("simcse/checkpoints/step-*")):  # in the middle of the second stage
        assert time.monotonic() < deadline and all(p.poll() is None for p in started)
        time.sleep(0.01)
    for process in started:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert (broken / "mntp" / "adapter").is_dir() and not (broken / "simcse" / "adapter").is_dir()

    said = finish(processes(recipe, environment, world, f"out={broken}"))
    assert "mntp: already trained" in said and "simcse: going on after step" in said
    for stage in STAGES:
        file = Path(stage) / "adapter" / "adapter_model.safetensors"
        assert (whole / file).read_bytes() == (broken / file).read_bytes(), stage
        rows = (broken / stage / "metrics.jsonl").read_text().splitlines()
        assert len(rows) == 30, "every step stands in the metrics once"
