"""The same training on one process and on two, under every ZeRO stage, with dropout on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

STAGES = ("mntp", "simcse", "supervised")
STEPS = 20
SETTINGS = {  # ranks, ZeRO stage, tokens a micro-batch: 160 makes several a step (and a gradient cache), 4096 makes one
    "zero1x1": (1, 1, 160),
    "uncached": (1, 1, 4096),
    "zero1x2": (2, 1, 160),
    "zero2x2": (2, 2, 160),
    "zero3x2": (2, 3, 160),
}


def start(recipe: Path, environment: dict, world: int, *overrides: str) -> None:
    """Ranks as a launcher starts them, without its twenty seconds."""
    processes = []
    for rank in range(world):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
        command = [sys.executable, "-m", "l2v.train", str(recipe), *overrides]
        processes.append(
            subprocess.Popen(
                command, env=environment | place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [p.returncode for p in processes] == [0] * world, "\n".join(outputs)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_recipe):
    """Every setting trained once; the folder of each run by name."""
    from helpers import free_port

    folder = tmp_path_factory.mktemp("parity")
    shared = {
        "steps": STEPS,
        "batch": 7,
        "save_every": 1,
        "keep": STEPS,
        "from": "base",
        "clip": 0.5,
    }
    changes = {f"stages.{name}.{key}": value for name in STAGES for key, value in shared.items()}
    # A loss near zero would be all rounding: a mild scale keeps it above 0.1.
    soft = {f"stages.{name}.{key}": value for name in STAGES[1:] for key, value in {"scale": 3, "lr": 1e-3}.items()}
    recipe = tiny_recipe(folder, **changes, **{"lora.dropout": 0.1, "stages.simcse.attention_dropout": 0.3, **soft})
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    out = {}
    for name, (world, zero, micro) in SETTINGS.items():
        out[name] = folder / name
        budget = [f"stages.{stage}.micro_tokens={micro}" for stage in STAGES]
        port = {"MASTER_PORT": str(free_port())}
        start(recipe, environment | port, world, f"out={out[name]}", f"zero.stage={zero}", *budget)
    return out


def losses(run: Path, stage: str) -> torch.Tensor:
    rows = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([row["loss"] for row in rows if "loss" in row], dtype=torch.float64)


def state(run: Path, stage: str, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / stage / "checkpoints" / f"step-{step:06d}" / "state.safetensors")


def part(tensors: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(kind + "."): v.double() for k, v in tensors.items() if k.startswith(kind + ".")}


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[k].flatten() for k in sorted(tensors)])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("setting", ["uncached", "zero1x2", "zero2x2", "zero3x2"])
def test_every_setting_equals_one_rank(runs, setting, stage):
    one, two = runs["zero1x1"], runs[setting]
    # After the first update Adam's first moment is 0.1 of the (clipped) gradient, so it shows the gradient of step 1.
    g1, g2 = (flat(part(state(run, stage, 1), "exp_avg")) for run in (one, two))
    assert g1.abs().max() > 0
    assert (g1 - g2).abs().max() <= 1e-5 * g1.abs().max()
    l1, l2 = losses(one, stage), losses(two, stage)
    assert len(l1) == STEPS
    torch.testing.assert_close(l1, l2, rtol=1e-5, atol=0)
    start_, end1 = (part(state(one, stage, step), "weight") for step in (1, STEPS))
    end2 = part(state(two, stage, STEPS), "weight")
    a = [k for k in start_ if "lora_A" in k]
    moved1 = torch.cat([(end1[k] - start_[k]).flatten() for k in a])
    moved2 = torch.cat([(end2[k] - start_[k]).flatten() for k in a])
    assert (moved1 - moved2).norm() <= 1e-3 * moved1.norm()


@pytest.mark.parametrize("stage", STAGES)
def test_training_changes_something(runs, stage):
    values = losses(runs["zero1x1"], stage)
    assert values[-5:].mean() < values[:5].mean()


def test_loss_is_the_mean_over_the_whole_batch(runs):
    """Seven examples a step and 24 in all: the fourth batch of an epoch has three, and no rank may weigh them double."""
    rows = [json.loads(line) for line in (runs["zero1x2"] / "supervised" / "metrics.jsonl").read_text().splitlines()]
    epochs = [row["epoch"] for row in rows]
    assert epochs[3] == 1.0 and epochs[7] == 2.0
