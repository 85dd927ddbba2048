"""A checksum of the frozen weights: it must be the same on every rank, and before and after training."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

_CHUNK = 1 << 24


@torch.no_grad()
def frozen_checksum(model: nn.Module) -> str:
    """16 hex digits over the bits of all frozen parameters and buffers, in order of name. A collective call under ZeRO-3.

    Every 32-bit word is weighted by its position, modulo 2**64, so both changed and swapped words change the checksum.
    """
    total = 0
    trained = {p.untyped_storage().data_ptr() for p in model.parameters() if p.requires_grad} - {
        0
    }  # 0: ZeRO-3 holds it
    frozen = [(n, p) for n, p in model.named_parameters() if not p.requires_grad]
    # Matrices that are views of a trainable parameter (`FlatAdapters`) are not frozen.
    frozen = [(n, p) for n, p in frozen if hasattr(p, "ds_id") or p.untyped_storage().data_ptr() not in trained]
    named = frozen + list(model.named_buffers())
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        with _whole(tensor):
            salt = int.from_bytes(name.encode()[-7:], "big") | 1
            total = (total * 3 + salt * _bits(tensor.detach())) % (1 << 64)
    return f"{total:016x}"


def _bits(tensor: torch.Tensor) -> int:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    raw = nn.functional.pad(raw, (0, -len(raw) % 4)).view(torch.int32)
    found = torch.zeros((), dtype=torch.int64, device=raw.device)
    for start in range(0, len(raw), _CHUNK):
        words = raw[start : start + _CHUNK].to(torch.int64) & 0xFFFFFFFF
        place = torch.arange(start, start + len(words), device=raw.device)
        found += (words * (2 * place + 1)).sum()  # wraps around, as a checksum may
    return int(found) % (1 << 64)


def _whole(tensor: torch.Tensor):
    """A context in which a parameter that ZeRO-3 has sharded is complete."""
    if not hasattr(tensor, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor])
