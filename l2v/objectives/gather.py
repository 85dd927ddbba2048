"""Gather the rows of all ranks on every rank; the backward returns the gradients to the ranks that the rows came from.

Why communication does not overlap with computation here: one row of a Llama-3-8B embedding is 4096 x 4 B = 16 KiB, and
encoding its text of 128 tokens once takes 2 x 8e9 x 128 = 2 TFLOP, 5 ms at 400 TFLOP/s. Each of eight ranks receives
7 x 16 KiB for every text that it encodes: 0.7 us at 150 GB/s inside a node, 5 us at 25 GB/s between nodes. Overlapping the
gather with the encoding would save a thousandth of a step; the same holds for the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

# PyTorch 2.13 has the names with `_single` and deprecates the older ones; 2.11 has only the older ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather_rows(parts: Sequence[torch.Tensor], counts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, ...]:
    """For each part [rows of this rank, E], the rows of all ranks [rows of all, E], rank by rank.

    counts: for each part, its rows on every rank, 0 allowed; the same on all ranks and known on the host, so nothing waits
    for the device. The gradient of a row is the sum over all ranks. All ranks must call this, and the backward, equally
    often; the gradients of all parts are returned together, in the same order on every rank.

    Raises:
        ValueError: a part's number of rows differs from `counts`.
    """
    rank = dist.get_rank()
    for part, share in zip(parts, counts, strict=True):
        if len(part) != share[rank]:
            raise ValueError(f"rank {rank} holds {len(part)} rows and was announced with {share[rank]}")
    return _GatherRows.apply([list(share) for share in counts], *parts)


def gather_labels(parts: Sequence[torch.Tensor], counts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Like `gather_rows` for int64 labels [rows] or [rows, K], in one collective and without gradients."""
    shapes = [part.shape[1:] for part in parts]
    widths = [shape.numel() for shape in shapes]
    flat = torch.cat([part.reshape(-1) for part in parts])
    totals = [sum(n * w for n, w in zip(rows, widths, strict=True)) for rows in zip(*counts, strict=True)]
    shares = _padded_gather(flat, totals).unbind()
    cut = [
        share[:total].split([n * w for n, w in zip(rows, widths, strict=True)])
        for share, total, rows in zip(shares, totals, zip(*counts, strict=True), strict=True)
    ]
    return [torch.cat(part).view(-1, *shape) for part, shape in zip(zip(*cut, strict=True), shapes, strict=True)]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, counts: list[list[int]], *parts: torch.Tensor):
        ctx.counts = counts
        return tuple(_rows(_padded_gather(part, share), share) for part, share in zip(parts, counts, strict=True))

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor):
        return None, *(_scatter(g, share) for g, share in zip(gradients, ctx.counts, strict=True))


def _padded_gather(rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """[ranks, largest, ...]: collectives need equal shapes, so every share is padded to the largest."""
    largest = max(counts)
    if len(rows) < largest:
        rows = torch.cat([rows, rows.new_zeros((largest - len(rows), *rows.shape[1:]))])
    out = rows.new_empty((len(counts) * largest, *rows.shape[1:]))
    _all_gather(out, rows.contiguous())
    return out.view(len(counts), largest, *rows.shape[1:])


def _rows(padded: torch.Tensor, counts: list[int]) -> torch.Tensor:
    if min(counts) == padded.shape[1]:
        return padded.flatten(0, 1)
    return torch.cat([share[:count] for share, count in zip(padded, counts, strict=True)])


def _scatter(gradient: torch.Tensor, counts: list[int]) -> torch.Tensor:
    largest = max(counts)
    if min(counts) < largest:
        padded = gradient.new_zeros((len(counts), largest, *gradient.shape[1:]))
        for share, part in zip(padded, gradient.split(counts), strict=True):
            share[: len(part)] = part
        gradient = padded.flatten(0, 1)
    out = gradient.new_empty((largest, *gradient.shape[1:]))
    _reduce_scatter(out, gradient.contiguous())
    return out[: counts[dist.get_rank()]]
