"""Gemma 3 trains fused as plain, on one rank and on two, under every ZeRO stage, with dropout, on texts beyond its window."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.processes import finish, start_ranks

SHAPE = {
    "model_type": "gemma3_text", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "max_position_embeddings": 512,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
STAGES = ("mntp", "simcse")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_recipe):
    """trained(layers, zero, ranks) -> the folder of a run of both stages, and what it said."""
    folder, ready = tmp_path_factory.mktemp("gemma3"), {}
    shared = {"steps": 3, "save_every": 1, "keep": 3, "batch": 7, "clip": 0.5, "micro_tokens": 128, "from": "base"}
    changes = {f"stages.{stage}.{key}": value for stage in STAGES for key, value in shared.items()}
    more = {"lora.dropout": 0.1, "stages.simcse.attention_dropout": 0.3, "stages.simcse.scale": 3}
    recipe = tiny_recipe(folder, **changes | more, **{"base.config": SHAPE, "base.model": "gemma3"})
    sharded = folder / "sharded.json"  # the tiny weights would all count as too small to be sharded
    sharded.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))

    def train(layers, zero, ranks):
        if (layers, zero, ranks) not in ready:
            out = folder / f"{layers}-{zero}-{ranks}"
            for stage in STAGES:
                arguments = [recipe, f"out={out}", f"base.layers={layers}", f"zero.stage={zero}", "--stage", stage]
                finish(start_ranks([[*arguments, f"zero.config={sharded}"]] * ranks))
            ready[layers, zero, ranks] = out
        return ready[layers, zero, ranks]

    return train


def first_gradient(run, stage):
    """Adam's first moment after a step: 0.1 of the clipped gradient, by name."""
    tensors = load_file(run / stage / "checkpoints" / "step-000001" / "state.safetensors")
    return torch.cat([tensors[k].double().flatten() for k in sorted(tensors) if k.startswith("exp_avg.")])


def column(run, stage, key):
    rows = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([row[key] for row in rows if key in row], dtype=torch.float64)


SETTINGS = [("fused", zero, ranks) for zero in range(4) for ranks in (1, 2)]


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param(x, id=f"zero{x[1]}x{x[2]}", marks=[] if x == ("fused", 3, 2) else pytest.mark.slow)
        for x in SETTINGS
    ],
)
def test_fused_layers_train_as_plain_ones(trained, setting):
    plain, fused = trained("plain", 1, 1), trained(*setting)
    for stage in STAGES:
        want, found = first_gradient(plain, stage), first_gradient(fused, stage)
        assert want.abs().max() > 0 and (found - want).abs().max() <= 1e-5 * want.abs().max()
        for key in ("loss", "gradient_norm"):
            values = column(plain, stage, key)
            assert len(values) == 3
            torch.testing.assert_close(column(fused, stage, key), values, rtol=1e-4, atol=0)
