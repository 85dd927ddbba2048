"""PackedBatch: many texts in one sequence without padding. This module imports nothing else of l2v."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

_MASK = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """A 63-bit hash of integers: splitmix64 (Steele et al. 2014), applied to one argument after another."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ (number & _MASK)) & _MASK
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


@dataclass
class Segment:
    """One text to be packed.

    ids: int64 [n]. pool_start: tokens from this index on are pooled. example, column: identify the text (column: query 0,
    positive 1, negatives from 2; view 0 and 1; document 0.. within a block). text_key: equal for equal texts, 0 to 2^63 - 1;
    None: `pack` takes a hash of the tokens that are pooled, so the header before them does not count. group: equal for texts
    of one group, -1 for none.
    """

    ids: np.ndarray
    pool_start: int = 0
    example: int = 0
    column: int = 0
    text_key: int | None = None
    group: int = -1

    def __len__(self) -> int:
        return len(self.ids)


def _text_key(segment: Segment) -> int:
    if segment.text_key is not None:
        return segment.text_key
    pooled = np.ascontiguousarray(segment.ids[segment.pool_start :], dtype="<i8")
    return int.from_bytes(hashlib.blake2b(pooled.tobytes(), digest_size=8).digest(), "little") >> 1


@dataclass
class PackedBatch:
    """S segments, concatenated to T tokens.

    input_ids_T, position_ids_T: int64; positions restart in every segment.
    cu_seqlens: int32 [S+1], cumulative lengths; lengths: the segments' lengths, on the host.
    pool_mask_T: bool. pool_index_P int64: the tokens that it holds; pool_borders int32 [S+1]: the segments' borders among
    them; pooled_lengths: how many each segment has, on the host.
    example_ids_S, columns_S, text_keys_S, groups_S: int64, see `Segment`.
    seeds_S: int64; a segment's dropout depends on its seed and on nothing else in the batch.
    label_index_L, labels_L: int64; the hidden state at label_index predicts the label.
    """

    input_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    cu_seqlens: torch.Tensor
    pool_mask_T: torch.Tensor
    pool_index_P: torch.Tensor
    pool_borders: torch.Tensor
    example_ids_S: torch.Tensor
    columns_S: torch.Tensor
    text_keys_S: torch.Tensor
    groups_S: torch.Tensor
    seeds_S: torch.Tensor
    label_index_L: torch.Tensor
    labels_L: torch.Tensor
    lengths: list[int]
    pooled_lengths: list[int]

    @property
    def tokens(self) -> int:
        """T, without waiting for the device."""
        return sum(self.lengths)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        there: dict[str, Any] = {k: moved(v, device) for k, v in tensors.items() if isinstance(v, torch.Tensor)}
        return replace(self, **there)


def moved(x: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """x on `device`, without waiting for it: to a GPU through pinned memory, because a copy from pageable memory waits."""
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def pack(
    segments: Sequence[Segment],
    *,
    seed: int = 0,
    step: int = 0,
    label_index: Sequence[int] | np.ndarray = (),
    labels: Sequence[int] | np.ndarray = (),
) -> PackedBatch:
    """Concatenate segments; the dropout seed of each is a hash of (seed, step, example, column).

    Raises:
        ValueError: no segments, or a pool_start outside its segment.
    """
    if not segments:
        raise ValueError("pack() needs at least one segment")
    lengths = [len(s) for s in segments]
    ends = np.cumsum(lengths)
    for s in segments:
        if not 0 <= s.pool_start <= len(s):
            raise ValueError(f"pool_start {s.pool_start} lies outside a segment of {len(s)} tokens")
    pool = np.concatenate([np.arange(len(s)) >= s.pool_start for s in segments])
    pooled = [len(s) - s.pool_start for s in segments]
    positions = np.concatenate([np.arange(n) for n in lengths])

    def int64(values) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64))

    return PackedBatch(
        input_ids_T=int64(np.concatenate([s.ids for s in segments])),
        position_ids_T=int64(positions),
        cu_seqlens=torch.as_tensor(np.concatenate([[0], ends]).astype(np.int32)),
        pool_mask_T=torch.as_tensor(pool),
        pool_index_P=int64(np.flatnonzero(pool)),
        pool_borders=torch.as_tensor(np.concatenate([[0], np.cumsum(pooled)]).astype(np.int32)),
        example_ids_S=int64([s.example for s in segments]),
        columns_S=int64([s.column for s in segments]),
        text_keys_S=int64([_text_key(s) for s in segments]),
        groups_S=int64([s.group for s in segments]),
        seeds_S=int64([mix(seed, step, s.example, s.column) for s in segments]),
        label_index_L=int64(label_index),
        labels_L=int64(labels),
        lengths=lengths,
        pooled_lengths=pooled,
    )
