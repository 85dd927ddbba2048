"""Forward and backward without autograd, for layers that decide themselves what they keep.

No pass over y is spent on the sum of the adapters' share and the frozen product: whichever is second adds to the first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from l2v_kernels.dispatch import takes_triton
from l2v_kernels.lora_linear import reference
from l2v_kernels.lora_linear.frozen import FrozenLinears
from l2v_kernels.lora_linear.settings import MAX_ADAPTERS, Adapter, Noise, rank_slices
from l2v_kernels.spans import span, spanned


@dataclass(frozen=True)
class Kept:
    """What the backward needs beside x: xa [T, sum of ranks] in x's dtype, and, without Triton, the dropout masks."""

    xa_TR: torch.Tensor | None = None
    masks: tuple[torch.Tensor | None, ...] = ()

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """For save_for_backward."""
        return (self.xa_TR, *self.masks)

    @classmethod
    def of(cls, tensors: tuple[torch.Tensor | None, ...]) -> Kept:
        """From what `tensors` gave."""
        return cls(tensors[0], tuple(tensors[1:]))


@dataclass(frozen=True)
class Gradients:
    """dx [T, E], None unless wanted, and of each adapter dA [R, E] and dB [N, R], in the order of the adapters."""

    dx_TE: torch.Tensor | None
    da: list[torch.Tensor]
    db: list[torch.Tensor]


@spanned("lora")
def forward(
    x_TE: torch.Tensor, linears: FrozenLinears, adapters: tuple[Adapter, ...], noise: Noise
) -> tuple[torch.Tensor, Kept]:
    """y [T, N] of the group, and what its backward needs."""
    if not adapters:
        with span("gemm"):
            return linears.product(x_TE), Kept()
    kept = _down(x_TE, adapters, noise)
    if not linears.adds:
        with span("gemm"):
            y_TN = linears.product(x_TE)
        parts = y_TN.split(linears.sizes, 1)
        for adapter, columns in zip(adapters, rank_slices(adapters), strict=True):
            parts[adapter.part].addmm_(kept.xa_TR[:, columns], adapter.b_NR.t())
        return y_TN, kept
    y_TN = x_TE.new_empty((x_TE.shape[0], sum(linears.sizes)))
    parts = y_TN.split(linears.sizes, 1)
    columns = dict(zip((a.part for a in adapters), rank_slices(adapters), strict=True))
    b_of = {a.part: a.b_NR for a in adapters}
    for at, (y, bias) in enumerate(zip(parts, linears.biases, strict=True)):
        if at in columns:
            xa = kept.xa_TR[:, columns[at]]
            if bias is None:
                torch.mm(xa, b_of[at].t(), out=y)
            else:
                torch.addmm(bias, xa, b_of[at].t(), out=y)
        elif bias is None:
            y.zero_()
        else:
            y.copy_(bias.expand_as(y))
    with span("gemm"):
        linears.add_product_(y_TN, x_TE)
    return y_TN, kept


@spanned("lora")
def forward_apart(
    x_TE: torch.Tensor, linears: FrozenLinears, adapters: tuple[Adapter, ...], noise: Noise
) -> tuple[torch.Tensor, Kept]:
    """The frozen product y [T, N] alone, and what the backward needs: for an op that adds xa B^T where it reads y.

    `backward` is the same: it takes the gradient of y with the share.
    """
    kept = _down(x_TE, adapters, noise) if adapters else Kept()
    with span("gemm"):
        return linears.product(x_TE), kept


@spanned("lora")
def backward(
    dy_TN: torch.Tensor,
    x_TE: torch.Tensor,
    kept: Kept,
    linears: FrozenLinears,
    adapters: tuple[Adapter, ...],
    noise: Noise,
    *,
    want_dx: bool = True,
) -> Gradients:
    """Gradients of x and of the adapters; the frozen weights have none."""
    if not adapters:
        with span("gemm"):
            return Gradients(linears.gradient(dy_TN) if want_dx else None, [], [])
    dy_parts = dy_TN.split(linears.sizes, 1)
    dxa_TR = torch.empty_like(kept.xa_TR)
    db = []
    for adapter, columns in zip(adapters, rank_slices(adapters), strict=True):
        factor = adapter.scaling * noise.scale
        db.append(_up_backward(dy_parts[adapter.part], kept.xa_TR[:, columns], adapter, factor, dxa_TR[:, columns]))
    dx_TE = None
    if want_dx and not linears.adds:
        with span("gemm"):
            dx_TE = linears.gradient(dy_TN)
    dx_TE, da = _down_backward(x_TE, dxa_TR, adapters, kept, noise, dx_TE, want_dx=want_dx)
    if want_dx and linears.adds:
        with span("gemm"):
            linears.add_gradient_(dx_TE, dy_TN)
    return Gradients(dx_TE, da, db)


def _groups(adapters):
    """Where the kernels take fewer adapters at once than there are."""
    return [adapters[i : i + MAX_ADAPTERS] for i in range(0, len(adapters), MAX_ADAPTERS)]


def _down(x_TE, adapters, noise):
    if not takes_triton(x_TE):
        xa_TR, masks = reference.down(x_TE, adapters, noise)
        return Kept(xa_TR, tuple(masks))
    from l2v_kernels.lora_linear import launch

    parts = [launch.down(x_TE, group, noise) for group in _groups(adapters)]
    return Kept(parts[0] if len(parts) == 1 else torch.cat(parts, 1))


def _up_backward(dy_TN, xa_TR, adapter, factor, dxa_TR):
    if takes_triton(dy_TN):
        from l2v_kernels.lora_linear import launch

        if launch.takes_up_backward(adapter):
            return launch.up_backward(dy_TN, xa_TR, adapter.b_NR, factor, dxa_TR)
    return reference.up_backward(dy_TN, xa_TR, adapter.b_NR, factor, dxa_TR)


def _down_backward(x_TE, dxa_TR, adapters, kept, noise, dx_TE, *, want_dx):
    if not takes_triton(x_TE):
        return reference.down_backward(x_TE, dxa_TR, adapters, list(kept.masks), dx_TE, want_dx=want_dx)
    from l2v_kernels.lora_linear import launch

    da, at = [], 0
    for group in _groups(adapters):
        ranks = sum(a.rank for a in group)
        dx_TE, gradients = launch.down_backward(x_TE, dxa_TR[:, at : at + ranks], group, noise, dx_TE, want_dx=want_dx)
        da += gradients
        at += ranks
    return dx_TE, da
