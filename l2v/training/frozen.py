"""A checksum of frozen weights: they must be the same on every rank, before and after training."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

_CHUNK = 1 << 24


@torch.no_grad()
def frozen_checksum(model: nn.Module) -> str:
    """16 hex digits over the bits of all parameters that train not, and of buffers, by name; a collective call under ZeRO-3.

    Every 32-bit word counts with a weight of its place, modulo 2**64, so that words that change or change places show.
    """
    total = 0
    named = [(n, p) for n, p in model.named_parameters() if not p.requires_grad] + list(model.named_buffers())
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
    """The parameter with all its elements, where ZeRO-3 has cut it up."""
    if not hasattr(tensor, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor])
