"""Frozen weights: the same bits on every rank, before and after training, with fused layers on."""

import json
import re

import pytest
import torch
from support.processes import finish, start_ranks
from torch import nn

from l2v.training.frozen import frozen_checksum


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 5)).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_bit_and_any_place_counts(dtype):
    found = {frozen_checksum(model(dtype))}
    assert found == {frozen_checksum(model(dtype))}
    for change in (
        lambda m: m[1].bias[-1].mul_(-1),
        lambda m: m[0].weight.copy_(m[0].weight.flip(0)),
        lambda m: m[0].weight.data.view(torch.uint8)[0, 0].bitwise_xor_(1),
    ):
        changed = model(dtype)
        change(changed)
        found.add(frozen_checksum(changed))
    assert len(found) == 4


def test_what_trains_does_not_count():
    half = model()
    half[1].requires_grad_(True)
    before = frozen_checksum(half)
    with torch.no_grad():
        half[1].weight.add_(1)
    assert frozen_checksum(half) == before


@pytest.mark.parametrize("zero", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_training_leaves_frozen_weights_alone_on_every_rank(zero, tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("L2V_CHECK", "1")
    recipe = tiny_recipe(tmp_path)
    sharded = tmp_path / "sharded.json"
    sharded.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    arguments = [recipe, "--stage", "mntp", "base.layers=fused", f"zero.stage={zero}", f"zero.config={sharded}"]
    said = [
        re.search(r"frozen weights ([0-9a-f]{16}) before, ([0-9a-f]{16}) after", x)
        for x in finish(start_ranks([arguments] * 2))
    ]
    assert all(said)
    assert len({digest for found in said for digest in found.groups()}) == 1
