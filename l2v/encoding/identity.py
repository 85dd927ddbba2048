"""A hash of a loaded encoder: everything that decides its vectors."""

from __future__ import annotations

import hashlib

import torch

from l2v.encoder import Encoder


def encoder_key(encoder: Encoder) -> str:
    """A hash of the weights, their precision, the tokenizer, the template, the length, the attention and the pooling.

    It reads every weight, so two exports that differ in one layer have two keys; equal weights have one, on any device.
    """
    digest = hashlib.sha256(encoder.tokenizer.fingerprint().encode())
    digest.update(f"{encoder.model.pooling} {encoder.model.causal} {encoder.tokenizer.pooled}".encode())
    for name, weight in encoder.model.state_dict().items():
        # Integer sums are the same in any order, on any device. The second one detects swapped rows.
        bits = weight.detach().contiguous().view(torch.uint8).flatten()
        whole = bits[: len(bits) // 4 * 4].view(torch.int32).to(torch.int64)
        place = torch.arange(len(whole), device=whole.device) % 65521
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} {whole.sum()} {(whole * place).sum()}".encode())
    return digest.hexdigest()[:16]


def precision_of(encoder: Encoder) -> str:
    """`bf16` or `fp32` (or torch's name of another dtype): that of its weights."""
    name = str(next(encoder.model.parameters()).dtype).removeprefix("torch.")
    return {"bfloat16": "bf16", "float32": "fp32"}.get(name, name)
