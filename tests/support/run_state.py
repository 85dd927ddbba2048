"""What a run has written, as tensors: numbers of its metrics, and its checkpoints."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


def column(run: Path, stage: str, key: str = "loss") -> torch.Tensor:
    """A number of every step, as it stands in the metrics."""
    rows = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([row[key] for row in rows if key in row], dtype=torch.float64)


def state(run: Path, stage: str, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / stage / "checkpoints" / f"step-{step:06d}" / "state.safetensors")


def part(tensors: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(kind + "."): v.double() for k, v in tensors.items() if k.startswith(kind + ".")}


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[k].flatten() for k in sorted(tensors)])
