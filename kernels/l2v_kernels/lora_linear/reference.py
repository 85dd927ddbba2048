"""LoRA on a group of linears in plain PyTorch: the definition of the op, and the adapters' path without Triton."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from l2v_kernels.dropout.reference import dropout_reference
from l2v_kernels.lora_linear.settings import Adapter, Adapters, InputDropout
from l2v_kernels.philox import DOMAIN_DROPOUT, keep_bytes


def lora_linear_reference(
    x_TE: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    adapters: tuple[Adapter, ...],
    dropout: InputDropout,
) -> torch.Tensor:
    """y [T, sum of O]. Arguments as in `l2v_kernels.lora_linear`, which checks them."""
    parts = [F.linear(x_TE, w, b) for w, b in zip(weights, biases, strict=True)]
    for adapter in adapters:
        x = x_TE
        if dropout.active:
            x = dropout_reference(x_TE, dropout.p, *dropout.keys, adapter.stream)
        xa_TR = F.linear(x, adapter.a_RE)
        parts[adapter.part] = parts[adapter.part] + F.linear(xa_TR, adapter.b_OR) * adapter.scaling
    return torch.cat(parts, 1)


def down(
    x_TE: torch.Tensor, adapters: Adapters, dropout: InputDropout
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """xa [T, sum of ranks], each adapter's scaling * dropout(x) A^T; and the masks' bytes, uint8 [T, E], dropped where below
    the dropout's threshold.

    On a CPU a mask costs more to recompute than to keep.
    """
    if not dropout.active:  # all read the same numbers: one matmul
        xa_TR = x_TE @ adapters.stacked_a().t()
        for columns, factor in _scales(adapters):
            xa_TR[:, columns].mul_(factor)
        return xa_TR, [None] * len(adapters)
    xa_TR = x_TE.new_empty((x_TE.shape[0], adapters.ranks))
    masks: list[torch.Tensor | None] = []
    kept_TE = torch.empty_like(x_TE, memory_format=torch.contiguous_format)
    for adapter, columns in zip(adapters, adapters.slices, strict=True):
        bytes_TE = keep_bytes(*dropout.keys, x_TE.shape[1], adapter.stream, DOMAIN_DROPOUT)
        masks.append(bytes_TE)
        _ones_where_kept(bytes_TE, dropout, kept_TE).mul_(x_TE)
        torch.mul(kept_TE @ adapter.a_RE.t(), adapter.scaling * dropout.scale, out=xa_TR[:, columns])
    return xa_TR, masks


def _ones_where_kept(bytes_TE: torch.Tensor, dropout: InputDropout, out_TE: torch.Tensor) -> torch.Tensor:
    """1 where kept, else 0, in the dtype of `out`. Multiplying by numbers takes a fourth of filling by a mask, and a number
    made of a byte a third of one made of a bool: PyTorch has vector instructions for neither fill nor bool."""
    return torch.ge(bytes_TE, dropout.threshold, out=out_TE)


def _scales(adapters: Adapters) -> list[tuple[slice, float]]:
    """What columns of xa [T, sum of ranks] are multiplied by; one pass where all adapters have the same factor."""
    factors = {a.scaling for a in adapters}
    if len(factors) == 1:
        (factor,) = factors
        return [] if factor == 1 else [(slice(None), factor)]
    return [(columns, a.scaling) for a, columns in zip(adapters, adapters.slices, strict=True)]


def up_backward(
    dy_TO: torch.Tensor,
    xa_TR: torch.Tensor,
    b_OR: torch.Tensor,
    factor: float,
    dxa_TR: torch.Tensor,
    db_OR: torch.Tensor,
) -> None:
    """Gradients of xa B^T: writes dB [O, R], and factor * dy B into dxa [T, R], as `down_backward` takes it."""
    # Not written into the slice directly: a GEMM library that cannot do that would copy it twice.
    dxa_TR.copy_((dy_TO @ b_OR).mul_(factor))
    db_OR.copy_((xa_TR.t() @ dy_TO).t())  # half the time of dy^T xa, whose rows are long and few numbers wide


def down_backward(
    x_TE: torch.Tensor,
    dxa_TR: torch.Tensor,
    adapters: Adapters,
    masks: list[torch.Tensor | None],
    dropout: InputDropout,
    dx_TE: torch.Tensor | None,
    da_RE: torch.Tensor,
    *,
    want_dx: bool,
) -> torch.Tensor | None:
    """Gradients of `down`: dx [T, E] (None unless wanted), added to the given one; writes dA [sum of ranks, E].

    dxa_TR: the gradient of what `down` scaled and masked; scaling and the dropout's scale are in it already.
    """
    if all(mask is None for mask in masks):
        torch.mm(dxa_TR.t(), x_TE, out=da_RE)
        if not want_dx:
            return dx_TE
        a_RE = adapters.stacked_a()
        return dxa_TR @ a_RE if dx_TE is None else dx_TE.addmm_(dxa_TR, a_RE)
    ones_TE, kept_TE = (torch.empty_like(x_TE, memory_format=torch.contiguous_format) for _ in range(2))
    for adapter, columns, bytes_TE in zip(adapters, adapters.slices, masks, strict=True):
        assert bytes_TE is not None  # one probability for all adapters
        dxa = dxa_TR[:, columns]
        torch.mul(x_TE, _ones_where_kept(bytes_TE, dropout, ones_TE), out=kept_TE)
        torch.mm(dxa.t(), kept_TE, out=da_RE[columns])
        if want_dx:
            part_TE = torch.mm(dxa, adapter.a_RE, out=kept_TE)  # in memory that is at hand
            dx_TE = part_TE * ones_TE if dx_TE is None else dx_TE.addcmul_(part_TE, ones_TE)
    return dx_TE
