"""The autograd functions of a fused layer.

Only what the backward needs is kept. Norm outputs and SwiGLU outputs are recomputed in the backward; matmuls with weights
never are.

Adapter matrices are arguments, so that autograd sees them; or, where they are parts of one flat parameter, its collector's
token is. So are the layer's own weights where a stage trains them. Weights are read from the modules, in the forward and again in
the backward, because ZeRO-3 gathers them for each.
A norm also returns the residual sum that it reads, so the residual is added without another pass over memory. Where a layer has
norms after its blocks too (Gemma), the one after attention is computed together with the addition and the next norm, and the
layer returns its last sum, so that it needs no parameters of another layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from l2v.model.fused.flat import Collector
from l2v.model.fused.norm import Norm
from l2v.model.fused.spec import Group, LayerSpec
from l2v.model.fused.weights import of_linears, of_norm, trained_norms
from l2v_kernels.dispatch import takes_triton
from l2v_kernels.lora_linear import Adapters, InputDropout
from l2v_kernels.lora_linear import op as lora
from l2v_kernels.rope import op as rope
from l2v_kernels.sandwich_norm import op as sandwich_norm
from l2v_kernels.swiglu import op as swiglu


@dataclass(frozen=True)
class Call:
    """One forward of one layer."""

    spec: LayerSpec
    dropout: InputDropout
    cos_TD: torch.Tensor
    sin_TD: torch.Tensor
    keep_all: bool
    """Also keep norm and SwiGLU outputs (recompute: none)."""
    collector: Collector | None = None
    """Where gradients of adapters go that are parts of one parameter."""

    def matrices(self, *groups: Group, norms: tuple[Any, ...] = ()) -> list[torch.Tensor]:
        """What autograd must see: A and B of the groups' adapters in turn, or the collector's token; then the groups' own
        weights and those of the norms, where they are trained."""
        own = [weight for group in groups for weight in group.trained()] + trained_norms(*norms)
        if self.collector is not None:
            return [self.collector.token, *own]
        return [matrix for group in groups for a in group.adapters() for matrix in (a.a_RE, a.b_OR)] + own

    def into(self, group: Group) -> lora.MatrixGradients | None:
        """Where the group's gradients are written; None if they are returned to autograd."""
        return self.collector.of(group) if self.collector is not None and group.adapters() else None

    def returned(self, *found: lora.Gradients, own: Sequence[torch.Tensor] = ()) -> list[torch.Tensor | None]:
        """The gradients of `matrices`. own: those of the groups' weights and of the norms."""
        if self.collector is not None:
            return [None, *own]
        return [*(x for each in found for pair in zip(each.da, each.db, strict=True) for x in pair), *own]


class GroupLinear(torch.autograd.Function):
    """A group whose input is kept by another function anyway: the output projection, on attention's output."""

    @staticmethod
    def forward(ctx, x_TE: torch.Tensor, group: Group, call: Call, *matrices: torch.Tensor) -> torch.Tensor:
        y_TN, kept = lora.forward(x_TE, group.linears(), group.adapters(), call.dropout)
        ctx.group, ctx.call = group, call
        ctx.save_for_backward(x_TE, *kept.tensors())
        return y_TN

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TN: torch.Tensor):
        x_TE, *kept = ctx.saved_tensors
        group, call = ctx.group, ctx.call
        found = lora.backward(
            dy_TN, x_TE, lora.Kept.of(tuple(kept)), group.linears(), group.adapters(), call.dropout,
            want_dx=ctx.needs_input_grad[0], into=call.into(group),
        )  # fmt: skip
        own = of_linears(group, dy_TN, x_TE) if group.trained() else ()
        return found.dx_TE, None, None, *call.returned(found, own=own)


class ProjectHeads(torch.autograd.Function):
    """Residual sum, norm, q, k and v with LoRA, norms per head (Qwen3, Gemma 3), RoPE.

    (residual [T, E], delta [T, E] or None) -> (sum [T, E], q [T, H, D], k [T, K, D], v [T, K, D]). Without delta the sum is
    the residual itself, returned so that both of its gradients meet in the norm's backward.
    """

    @staticmethod
    def forward(ctx, residual_TE: torch.Tensor, delta_TE: torch.Tensor | None, call: Call, *matrices: torch.Tensor):
        spec, group = call.spec, call.spec.qkv
        sum_TE, x_TE, rstd_T = spec.input_norm.forward(residual_TE, delta_TE)
        linears = group.linears()
        added_in_rope = _added_in_rope(x_TE, spec)
        project = lora.forward_frozen if added_in_rope else lora.forward
        qkv_TN, kept = project(x_TE, linears, group.adapters(), call.dropout)
        q, k, v = (part.unflatten(1, (-1, spec.head_dim)) for part in qkv_TN.split(linears.sizes, 1))
        before: tuple[torch.Tensor, ...] = ()
        if added_in_rope:
            assert kept.xa_TR is not None  # there are adapters
            b_NR, heads = group.adapters().stacked_b(), (q.shape[1], k.shape[1])
            rope.add_and_rotate(qkv_TN, kept.xa_TR, b_NR, call.cos_TD, call.sin_TD, heads)
        elif spec.head_norms is None:
            _rotate_in_place(qkv_TN, spec, linears.sizes, call)
        else:
            # The backward needs the norms' inputs, so RoPE overwrites their outputs instead.
            q, q_rstd = _norm_heads(q, spec.head_norms[0])
            k, k_rstd = _norm_heads(k, spec.head_norms[1])
            q, k = (
                rope.rotate(x, call.cos_TD, call.sin_TD, out=x if takes_triton(x) else None) for x in (q, k)
            )  # in place where that costs no copy
            before = (qkv_TN, q_rstd, k_rstd)
        ctx.call, ctx.n_before, ctx.has_delta = call, len(before), delta_TE is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(sum_TE, rstd_T, x_TE if call.keep_all else None, *before, *kept.tensors())
        return sum_TE, q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx, dsum_TE, dq_THD, dk_TKD, dv_TKD):
        sum_TE, rstd_T, x_TE, *rest = ctx.saved_tensors
        before, kept = rest[: ctx.n_before], lora.Kept.of(tuple(rest[ctx.n_before :]))
        call, spec = ctx.call, ctx.call.spec
        linears = spec.qkv.linears()
        dqkv_TN = _side_by_side(dq_THD, dk_TKD, dv_TKD, only_values=spec.head_norms is not None)
        of_head_norms: list[torch.Tensor] = []
        if spec.head_norms is None:
            _rotate_in_place(dqkv_TN, spec, linears.sizes, call, inverse=True)
        else:
            parts = [part.unflatten(1, (-1, spec.head_dim)) for part in dqkv_TN.split(linears.sizes, 1)]
            qkv_TN, *rstds = before
            inputs = [part.unflatten(1, (-1, spec.head_dim)) for part in qkv_TN.split(linears.sizes, 1)]
            for part, x, rstd, norm, gradient in zip(
                parts, inputs, rstds, spec.head_norms, (dq_THD, dk_TKD), strict=False
            ):
                turned = rope.rotate(gradient, call.cos_TD, call.sin_TD, inverse=True)
                of_head_norms += of_norm(norm, turned, x, rstd)
                norm.backward(turned, x, rstd, out=part)
        norm = spec.input_norm
        if x_TE is None:
            x_TE = spec.input_norm.normalize(sum_TE, rstd_T)
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        found = lora.backward(
            dqkv_TN, x_TE, kept, linears, spec.qkv.adapters(), call.dropout, into=call.into(spec.qkv),
            want_dx=wanted or norm.weight.requires_grad,
        )  # fmt: skip
        own = of_linears(spec.qkv, dqkv_TN, x_TE) if spec.qkv.trained() else []
        own += of_norm(norm, found.dx_TE, sum_TE, rstd_T) + of_head_norms
        dx_TE = norm.backward(found.dx_TE, sum_TE, rstd_T, dsum_TE) if wanted else None
        return dx_TE, (dx_TE if ctx.has_delta else None), None, *call.returned(found, own=own)


def _rotate_in_place(qkv_TN: torch.Tensor, spec: LayerSpec, sizes: Any, call: Call, *, inverse: bool = False) -> None:
    """Rotates queries and keys where they lie, next to each other in a row, in one launch."""
    heads = qkv_TN[:, : sizes[0] + sizes[1]].unflatten(1, (-1, spec.head_dim))
    rope.rotate(heads, call.cos_TD, call.sin_TD, inverse=inverse, out=heads)


def _side_by_side(
    dq_THD: torch.Tensor, dk_TKD: torch.Tensor, dv_TKD: torch.Tensor, *, only_values: bool
) -> torch.Tensor:
    """Gradients of queries, keys and values as one [T, N]; copied only if they do not lie so in memory.

    only_values: the columns of queries and keys are then left for the caller to write.
    """
    parts = [d.flatten(1) for d in (dq_THD, dk_TKD, dv_TKD)]
    T, N = len(dq_THD), sum(p.shape[1] for p in parts)
    at = dq_THD.data_ptr()
    for d, flat in zip((dq_THD, dk_TKD, dv_TKD), parts, strict=True):
        # flatten gives a view of heads that lie in a row. Rows of other buffers can have this distance only by being far away.
        if (
            flat.stride() != (N, 1)
            or d.data_ptr() != at
            or d.untyped_storage().data_ptr() != dq_THD.untyped_storage().data_ptr()
        ):
            if not only_values:
                return torch.cat(parts, 1)
            whole_TN = dq_THD.new_empty((T, N))
            whole_TN[:, N - parts[2].shape[1] :] = parts[2]
            return whole_TN
        at += flat.shape[1] * flat.element_size()
    return dq_THD.as_strided((T, N), (N, 1))


def _norm_heads(heads_THD: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised heads, contiguous [T, H, D], and rstd [T, H]."""
    _, y_THD, rstd_TH = norm.forward(heads_THD)
    return y_THD, rstd_TH


def _added_in_rope(x_TE: torch.Tensor, spec: LayerSpec) -> bool:
    """Whether RoPE's kernel adds LoRA's part of q, k and v. Not on PyTorch's path, where it would save nothing."""
    adapters = spec.qkv.adapters()
    complete = len(adapters) == 3 and len({a.rank for a in adapters}) == 1
    return (
        complete
        and spec.head_norms is None
        and takes_triton(x_TE)
        and rope.takes_shares(spec.head_dim, adapters[0].rank)
    )


def _added_in_swiglu(x_TE: torch.Tensor, adapters: Adapters) -> bool:
    """Whether SwiGLU adds LoRA's part of gate and up; that saves writing it and reading it again in the frozen matmul.

    Not on PyTorch's path in fp32, where the frozen matmul adds to it at no cost, and SwiGLU would compute it three times. In half
    precision it saves a rounding there.
    """
    wins = takes_triton(x_TE) or x_TE.element_size() < 4
    return bool(adapters) and wins and max(a.rank for a in adapters) <= swiglu.MAX_RANK


def _share(x_TE: torch.Tensor, kept: lora.Kept, adapters: Adapters) -> swiglu.GateUpLora | None:
    """What SwiGLU adds to the frozen matmul of gate and up; None if there is no LoRA or the matmul has added it already."""
    if not _added_in_swiglu(x_TE, adapters):
        return None
    assert kept.xa_TR is not None  # there are adapters
    pairs: dict[int, tuple[Any, Any]] = {
        a.part: (kept.xa_TR[:, at], a.b_OR) for a, at in zip(adapters, adapters.slices, strict=True)
    }
    none = (None, None)
    return swiglu.GateUpLora(*pairs.get(0, none), *pairs.get(1, none))


class GatedMlp(torch.autograd.Function):
    """Residual sum, norm, gate and up with LoRA, SwiGLU or GeGLU, down with LoRA.

    (residual [T, E], delta [T, E]) -> (sum [T, E], the layer's last delta [T, E]); with norms after the blocks (the residual
    plus all of the layer [T, E], None).
    """

    @staticmethod
    def forward(ctx, residual_TE: torch.Tensor, delta_TE: torch.Tensor, call: Call, *matrices: torch.Tensor):
        spec = call.spec
        sum_TE, x_TE, delta_rstd_T, rstd_T = _add_and_norm(spec, residual_TE, delta_TE)
        of_gate_up, of_down = spec.gate_up.adapters(), spec.down.adapters()
        project = lora.forward_frozen if _added_in_swiglu(x_TE, of_gate_up) else lora.forward
        gate_up_TG, kept_gate_up = project(x_TE, spec.gate_up.linears(), of_gate_up, call.dropout)
        product_TF = swiglu.forward(gate_up_TG, _share(x_TE, kept_gate_up, of_gate_up), spec.activation)
        y_TE, kept_down = lora.forward(product_TF, spec.down.linears(), of_down, call.dropout)
        after: tuple[torch.Tensor | None, ...] = (None,) * 4
        out: tuple[torch.Tensor, torch.Tensor | None] = sum_TE, y_TE
        if spec.after is not None:
            out_TE, y_rstd_T = _add_last(spec.after[1], sum_TE, y_TE)
            out, after = (out_TE, None), (delta_TE, delta_rstd_T, y_TE, y_rstd_T)
        saved = kept_gate_up.tensors()
        ctx.call, ctx.n_gate_up = call, len(saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            sum_TE, rstd_T, gate_up_TG, x_TE if call.keep_all else None, product_TF if call.keep_all else None,
            *after, *saved, *kept_down.tensors(),
        )  # fmt: skip
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dsum_TE: torch.Tensor | None, dy_TE: torch.Tensor | None):
        sum_TE, rstd_T, gate_up_TG, x_TE, product_TF, delta_TE, delta_rstd_T, y_TE, y_rstd_T, *rest = ctx.saved_tensors
        kept_gate_up = lora.Kept.of(tuple(rest[: ctx.n_gate_up]))
        kept_down = lora.Kept.of(tuple(rest[ctx.n_gate_up :]))
        call, spec = ctx.call, ctx.call.spec
        if spec.after is not None:
            assert dsum_TE is not None  # its one output
            dy_TE = spec.after[1].backward(dsum_TE, y_TE, y_rstd_T)
        assert dy_TE is not None
        of_gate_up = spec.gate_up.adapters()
        share = _share(sum_TE, kept_gate_up, of_gate_up)
        if product_TF is None:
            product_TF = swiglu.forward(gate_up_TG, share, spec.activation)
        of_down = lora.backward(
            dy_TE, product_TF, kept_down, spec.down.linears(), spec.down.adapters(), call.dropout,
            into=call.into(spec.down),
        )  # fmt: skip
        own = of_linears(spec.down, dy_TE, product_TF) if spec.down.trained() else []
        del product_TF
        dgate_up_TG = swiglu.backward(of_down.dx_TE, gate_up_TG, lora=share, activation=spec.activation)
        of_down = replace(of_down, dx_TE=None)
        if x_TE is None:
            x_TE = spec.mlp_norm.normalize(sum_TE, rstd_T)
        found = lora.backward(
            dgate_up_TG, x_TE, kept_gate_up, spec.gate_up.linears(), of_gate_up, call.dropout,
            into=call.into(spec.gate_up),
        )  # fmt: skip
        if spec.gate_up.trained():
            own = of_linears(spec.gate_up, dgate_up_TG, x_TE) + own
        norm = spec.mlp_norm
        own += of_norm(norm, found.dx_TE, sum_TE, rstd_T)
        if spec.after is None:
            dresidual_TE = ddelta_TE = norm.backward(found.dx_TE, sum_TE, rstd_T, dsum_TE)
        else:
            dresidual_TE, ddelta_TE = sandwich_norm.backward(
                found.dx_TE, dsum_TE, sum_TE, rstd_T, norm.weight, delta_TE, delta_rstd_T, spec.after[0].weight,
                norm.offset,
            )  # fmt: skip
            # The residual and what attention's own norm returns are added: one gradient is that of both.
            own += of_norm(spec.after[0], dresidual_TE, delta_TE, delta_rstd_T)
            assert dsum_TE is not None
            own += of_norm(spec.after[1], dsum_TE, y_TE, y_rstd_T)
        return dresidual_TE, ddelta_TE, None, *call.returned(found, of_down, own=own)


def _add_and_norm(
    spec: LayerSpec, residual_TE: torch.Tensor, delta_TE: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Attention's output added, after its own norm if there is one, and the MLP's norm: (sum, y, rstd of delta, rstd)."""
    norm = spec.mlp_norm
    if spec.after is None:
        sum_TE, x_TE, rstd_T = norm.forward(residual_TE, delta_TE)
        return sum_TE, x_TE, None, rstd_T
    sum_TE, x_TE, delta_rstd_T, rstd_T = sandwich_norm.forward(
        delta_TE, residual_TE, spec.after[0].weight, norm.weight, norm.eps, norm.offset
    )
    assert x_TE is not None and rstd_T is not None  # there is a second norm
    return sum_TE, x_TE, delta_rstd_T, rstd_T


def _add_last(norm: Norm, sum_TE: torch.Tensor, y_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum + norm(y), rstd of y): the MLP's output added after its own norm."""
    out_TE, _, y_rstd_T, _ = sandwich_norm.forward(y_TE, sum_TE, norm.weight, None, norm.eps, norm.offset)
    return out_TE, y_rstd_T
