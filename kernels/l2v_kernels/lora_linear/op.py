"""A group of LoRA linears with autograd, and without it for layers that decide themselves what they keep.

The adapters' share and the frozen matmul take no pass over y to be added: whichever comes second adds to the first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from l2v_kernels.dispatch import takes_triton
from l2v_kernels.lora_linear import reference
from l2v_kernels.lora_linear.frozen import AccumulatingLinears, FrozenLinears, accumulates
from l2v_kernels.lora_linear.settings import Adapter, Adapters, InputDropout, PendingSum
from l2v_kernels.spans import span, spanned


@dataclass(frozen=True)
class Kept:
    """What the backward needs besides x: xa [T, sum of ranks] in x's dtype, and without Triton the masks' bytes [T, E]."""

    xa_TR: torch.Tensor | None = None
    """None without adapters."""
    masks: tuple[torch.Tensor | None, ...] = ()

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """For save_for_backward."""
        return (self.xa_TR, *self.masks)

    @classmethod
    def of(cls, tensors: tuple[torch.Tensor | None, ...]) -> Kept:
        """From what `tensors` returned."""
        return cls(tensors[0], tuple(tensors[1:]))


@dataclass(frozen=True)
class MatrixGradients:
    """The gradients of a group's adapters: dA one below the other [sum of ranks, E], and all dB, flat, in their order.

    pending: may hold the last addition of dA after `backward`, to be added with another group's or by `finish`.
    """

    da_RE: torch.Tensor
    db: torch.Tensor
    pending: PendingSum | None = None

    @classmethod
    def empty(cls, adapters: Adapters, like: torch.Tensor) -> MatrixGradients:
        """Memory for them, not initialised, of the dtype and device of x [T, E]."""
        return cls(like.new_empty((adapters.ranks, like.shape[1])), like.new_empty(sum(adapters.sizes[1])))

    def split(self, adapters: Adapters) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """dA [R, E] and dB [O, R] of each adapter."""
        db = [part.view_as(a.b_OR) for part, a in zip(self.db.split(adapters.sizes[1]), adapters, strict=True)]
        return [self.da_RE[rows] for rows in adapters.slices], db


@dataclass(frozen=True)
class Gradients:
    """dx [T, E], None unless wanted, and of each adapter dA [R, E] and dB [O, R], in the order of the adapters.

    The lists are empty where the matrices' gradients were written to memory of the caller's.
    """

    dx_TE: torch.Tensor | None
    da: list[torch.Tensor]
    db: list[torch.Tensor]


@spanned("lora")
def forward(
    x_TE: torch.Tensor, linears: FrozenLinears, adapters: tuple[Adapter, ...], dropout: InputDropout
) -> tuple[torch.Tensor, Kept]:
    """y [T, O] of the group, and what its backward needs."""
    if not adapters:
        with span("gemm"):
            return linears.matmul(x_TE), Kept()
    adapters = Adapters.of(adapters)
    kept, xa_TR = _down(x_TE, adapters, dropout)
    if accumulates(linears):
        y_TO = _shares(x_TE, xa_TR, linears, adapters)
        with span("gemm"):
            linears.add_matmul_(y_TO, x_TE)
        return y_TO, kept
    with span("gemm"):
        y_TO = linears.matmul(x_TE)
    parts = y_TO.split(linears.sizes, 1)
    for adapter, columns in zip(adapters, adapters.slices, strict=True):
        parts[adapter.part].addmm_(xa_TR[:, columns], adapter.b_OR.t())
    return y_TO, kept


@spanned("lora")
def forward_frozen(
    x_TE: torch.Tensor, linears: FrozenLinears, adapters: tuple[Adapter, ...], dropout: InputDropout
) -> tuple[torch.Tensor, Kept]:
    """y [T, O] of the frozen linears alone, and what the backward needs: for an op that adds xa B^T where it reads y.

    `backward` is the same: it takes the gradient of y with the share added.
    """
    kept = _down(x_TE, Adapters.of(adapters), dropout)[0] if adapters else Kept()
    with span("gemm"):
        return linears.matmul(x_TE), kept


@spanned("lora")
def backward(
    dy_TO: torch.Tensor,
    x_TE: torch.Tensor,
    kept: Kept,
    linears: FrozenLinears,
    adapters: tuple[Adapter, ...],
    dropout: InputDropout,
    *,
    want_dx: bool = True,
    into: MatrixGradients | None = None,
) -> Gradients:
    """Gradients of x and of the adapters; the frozen weights have none.

    into: where to write the gradients of the matrices; all of it is overwritten.
    """
    if kept.xa_TR is None:
        with span("gemm"):
            return Gradients(linears.input_gradient(dy_TO) if want_dx else None, [], [])
    adapters = Adapters.of(adapters)
    of_matrices = into or MatrixGradients.empty(adapters, x_TE)
    dxa_TR = _up_backward(dy_TO, kept.xa_TR, linears.sizes, adapters, dropout, of_matrices)
    dx_TE = None
    if want_dx and not accumulates(linears):
        with span("gemm"):
            dx_TE = linears.input_gradient(dy_TO)
    dx_TE = _down_backward(x_TE, dxa_TR, adapters, kept, dropout, dx_TE, of_matrices, want_dx=want_dx)
    if dx_TE is not None and accumulates(linears):
        with span("gemm"):
            linears.add_input_gradient_(dx_TE, dy_TO)
    return Gradients(dx_TE, *(([], []) if into else of_matrices.split(adapters)))


class LoraLinear(torch.autograd.Function):
    """y [T, O]. The adapters' matrices come last, A and B of each in turn, so that autograd returns their gradients.

    Kept: x, xa and, without Triton, the dropout masks.
    """

    @staticmethod
    def forward(
        ctx,
        x_TE: torch.Tensor,
        linears: FrozenLinears,
        adapters: tuple[Adapter, ...],
        dropout: InputDropout,
        *matrices: torch.Tensor,
    ) -> torch.Tensor:
        y_TO, kept = forward(x_TE, linears, adapters, dropout)
        ctx.linears, ctx.dropout = linears, dropout
        # Adapters without their matrices: those go through save_for_backward.
        ctx.parts = [(a.part, a.scaling, a.stream) for a in adapters]
        ctx.save_for_backward(x_TE, *matrices, *kept.tensors())
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TO: torch.Tensor):
        x_TE, *tensors = ctx.saved_tensors
        n = len(ctx.parts)
        pairs = zip(tensors[: 2 * n : 2], tensors[1 : 2 * n : 2], strict=True)
        adapters = tuple(
            Adapter(part, a_RE, b_OR, scaling, stream)
            for (part, scaling, stream), (a_RE, b_OR) in zip(ctx.parts, pairs, strict=True)
        )
        kept = Kept.of(tuple(tensors[2 * n :]))
        found = backward(
            dy_TO.contiguous(), x_TE, kept, ctx.linears, adapters, ctx.dropout, want_dx=ctx.needs_input_grad[0]
        )
        of_matrices = [gradient for pair in zip(found.da, found.db, strict=True) for gradient in pair]
        return found.dx_TE, None, None, None, *of_matrices


def _shares(x_TE, xa_TR, linears: AccumulatingLinears, adapters: Adapters) -> torch.Tensor:
    """y [T, O] with the adapters' shares and the biases, to which the frozen matmul is then added."""
    y_TO = x_TE.new_empty((x_TE.shape[0], sum(linears.sizes)))
    adapted = {a.part: (xa_TR[:, at], a.b_OR.t()) for a, at in zip(adapters, adapters.slices, strict=True)}
    for part, (y, bias) in enumerate(zip(y_TO.split(linears.sizes, 1), linears.biases, strict=True)):
        share = adapted.get(part)
        if bias is None:
            torch.mm(*share, out=y) if share else y.zero_()
        elif share:
            torch.addmm(bias, *share, out=y)
        else:
            y.copy_(bias.expand_as(y))
    return y_TO


def _down(x_TE, adapters: Adapters, dropout) -> tuple[Kept, torch.Tensor]:
    """What the backward needs, and the xa [T, sum of ranks] in it."""
    if not takes_triton(x_TE):
        xa_TR, masks = reference.down(x_TE, adapters, dropout)
        return Kept(xa_TR, tuple(masks)), xa_TR
    from l2v_kernels.lora_linear import launch

    parts = [launch.down(x_TE, group, dropout) for group in adapters.triples]
    xa_TR = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return Kept(xa_TR), xa_TR


def _up_backward(dy_TO, xa_TR, sizes, adapters: Adapters, dropout, of_matrices: MatrixGradients) -> torch.Tensor:
    """dxa [T, sum of ranks]; writes dB."""
    dxa_TR = torch.empty_like(xa_TR, memory_format=torch.contiguous_format)
    ranks = elements = 0
    for run in adapters.runs:
        columns, n = slice(ranks, ranks + run.ranks), sum(run.sizes[1])
        whole = len(run) == len(adapters)
        xa, dxa = (xa_TR, dxa_TR) if whole else (xa_TR[:, columns], dxa_TR[:, columns])
        db = of_matrices.db if whole else of_matrices.db[elements : elements + n]
        ranks, elements = columns.stop, elements + n
        if takes_triton(dy_TO):
            from l2v_kernels.lora_linear import launch

            if launch.takes_up_backward(run):
                launch.up_backward(dy_TO, xa, sizes, run, dropout, dxa, db, of_matrices.pending)
                continue
        parts = dy_TO.split(sizes, 1)
        for a, at, out in zip(run, run.slices, db.split(run.sizes[1]), strict=True):
            factor = a.scaling * dropout.scale
            reference.up_backward(parts[a.part], xa[:, at], a.b_OR, factor, dxa[:, at], out.view_as(a.b_OR))
    return dxa_TR


def _down_backward(x_TE, dxa_TR, adapters: Adapters, kept, dropout, dx_TE, of_matrices: MatrixGradients, *, want_dx):
    """dx [T, E] or None; writes dA [sum of ranks, E]."""
    da_RE, pending = of_matrices.da_RE, of_matrices.pending
    if not takes_triton(x_TE):
        return reference.down_backward(x_TE, dxa_TR, adapters, list(kept.masks), dropout, dx_TE, da_RE, want_dx=want_dx)
    from l2v_kernels.lora_linear import launch

    if pending is not None:
        launch.finish(pending)  # of a group whose rank is too high for the launch that would have added it
    if len(adapters.triples) == 1:
        return launch.down_backward(x_TE, dxa_TR, adapters, dropout, dx_TE, da_RE, want_dx=want_dx, pending=pending)
    at = 0
    for group in adapters.triples:
        rows = slice(at, at + group.ranks)
        dx_TE = launch.down_backward(x_TE, dxa_TR[:, rows], group, dropout, dx_TE, da_RE[rows], want_dx=want_dx)
        at = rows.stop
    return dx_TE


def finish(pending: PendingSum) -> None:
    """Add what a backward's last group has left to add."""
    if pending:
        from l2v_kernels.lora_linear import launch

        launch.finish(pending)
