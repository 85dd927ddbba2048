"""Examples to PackedBatch, and the masking of MNTP."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from l2v.batch import PackedBatch, Segment, pack
from l2v.data.examples import Examples
from l2v_kernels.philox import DOMAIN_MASKING, philox4x32


@dataclass(frozen=True)
class Masking:
    """How MNTP hides tokens: which share, and what replaces them (mask token, random token, or the token itself)."""

    probability: float
    split: tuple[float, float, float]
    mask_id: int
    vocabulary: int
    special_ids: frozenset[int]


def collate(
    examples: Examples, chosen: list[int], *, seed: int, step: int, masking: Masking | None = None
) -> PackedBatch:
    """The micro-batch of these examples; with none chosen, one token without a loss, so that ranks stay in step."""
    segments = [segment for i in chosen for segment in segments_of(examples, i, seed, step)]
    if not segments:
        return pack([Segment(np.zeros(1, dtype=np.int64), example=-1, column=-1, text_key=0)], seed=seed, step=step)
    batch = pack(segments, seed=seed, step=step)
    return mask(batch, masking) if masking else batch


def segments_of(examples: Examples, index: int, seed: int, step: int) -> list[Segment]:
    """The segments of an example; with `swap` on its source, query and positive are exchanged in half of the steps."""
    segments, mixture = examples[index], getattr(examples, "mixture", None)
    if mixture is None or not mixture.swapped(index, seed, step):
        return segments
    query, positive, *negatives = segments
    return [replace(positive, column=0), replace(query, column=1), *negatives]


def mask(batch: PackedBatch, masking: Masking) -> PackedBatch:
    """Hide tokens of a packed batch. Token r of a segment is drawn from Philox at (segment seed, r), independent of the pack.

    Special tokens are never hidden. Neither is a segment's first token: no token before it could predict it.
    """
    lengths = torch.tensor(batch.lengths)
    seeds_T = batch.seeds_S.repeat_interleave(lengths)
    words = philox4x32(
        seeds_T & 0xFFFFFFFF,
        seeds_T >> 32,
        torch.zeros_like(seeds_T),
        batch.position_ids_T,
        torch.zeros_like(seeds_T),
        torch.full_like(seeds_T, DOMAIN_MASKING),
    )
    hide, choice, token = (word.numpy() for word in words[:3])
    ids = batch.input_ids_T.numpy()
    special = np.isin(ids, list(masking.special_ids))
    hidden = (hide < masking.probability * 2**32) & ~special & (batch.position_ids_T.numpy() > 0)
    share = choice / 2**32
    masked, random, _ = masking.split
    shown = np.where(
        share < masked, masking.mask_id, np.where(share < masked + random, token % masking.vocabulary, ids)
    )
    index = np.flatnonzero(hidden)
    return replace(
        batch,
        input_ids_T=torch.from_numpy(np.where(hidden, shown, ids)),
        label_index_L=torch.from_numpy(index - 1),
        labels_L=torch.from_numpy(ids[index]),
    )
