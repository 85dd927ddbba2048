"""Tiny decoders of every family that the fused layer supports, plain and fused, and one gradient through either."""

import zlib

import numpy as np
import torch

from l2v.batch import Segment, pack
from l2v.model.load import inner_model, load_model, output_head
from l2v.model.lora import add_lora, trainable
from l2v.model.packed import PackedDecoder
from l2v.recipe import Base, Lora

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
OWN_SHAPES = {
    "gemma2": {"query_pre_attn_scalar": 20, "sliding_window": 4, "attn_logit_softcapping": 3.0},
    "gemma3_text": {
        "query_pre_attn_scalar": 20, "sliding_window": 8, "num_key_value_heads": 1,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}  # fmt: skip
"""What a family has of its own, small enough to show: windows that the texts exceed, a scale that is not that of head_dim."""
LENGTHS = (7, 1, 19, 5, 7)


def build(
    family: str, layers: str, *, lora: Lora | None = None, dtype=torch.float32, shape=(), recompute="cheap", **kwargs
):
    """A decoder whose norms, biases and LoRA B are not at their start, so that each of them matters."""
    config = SHAPE | {"model_type": family} | OWN_SHAPES.get(family, {}) | dict(shape)
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][: config["num_hidden_layers"]]
    base = Base(
        model=family, init="random", config=config, attention="causal" if kwargs.get("causal") else "bidirectional"
    )
    model = load_model(base, head=True, dtype=dtype, seed=3)
    if dtype != torch.float32:  # some versions of torch draw other numbers in half precision
        exact = load_model(base, head=True, dtype=torch.float32, seed=3)
        with torch.no_grad():
            for parameter, other in zip(model.parameters(), exact.parameters(), strict=True):
                parameter.copy_(other)
    decoder = inner_model(model)
    if lora is not None:
        decoder = add_lora(decoder, lora, base_name=family, seed=1)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            torch.manual_seed(
                zlib.crc32(name.removeprefix("base_model.model.").replace(".base_layer", "").encode())
            )  # the same with LoRA and without
            if "norm" in name:  # around what stands for 1
                parameter.copy_((0 if family.startswith("gemma") else 1) + 0.2 * torch.randn(parameter.shape))
            elif name.endswith("bias") or "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    packed = PackedDecoder(decoder, head=output_head(model), layers=layers, **kwargs)
    packed.set_recompute(recompute)
    return packed


def batch(seed: int = 0, lengths=LENGTHS):
    """A pack whose segments have lengths that repeat and one of a single token."""
    generator = np.random.default_rng(seed)
    parts = [Segment(generator.integers(3, 96, n), min(1, n - 1), example=i) for i, n in enumerate(lengths)]
    return pack(parts, seed=7, step=2)


def gradients(model: PackedDecoder, what=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states of a training step, and the gradient of a fixed random projection of them."""
    model.train()
    what = what or batch()
    hidden_TE = model(what, "hidden")
    weight = torch.randn(hidden_TE.shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    parameters = trainable(model)
    found = torch.autograd.grad((hidden_TE.double() * weight).sum(), list(parameters.values()))
    return hidden_TE.detach(), dict(zip(parameters, found, strict=True))


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest difference of two gradients, by the largest entry of the second."""
    assert found.keys() == wanted.keys()
    largest = max(g.abs().max() for g in wanted.values())
    return float(max((found[k].double() - wanted[k].double()).abs().max() for k in wanted) / largest)
