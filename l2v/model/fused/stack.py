"""All layers of a decoder, fused. The residual stream is passed on as a sum and the last delta, added in the next norm."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from l2v.model.fused.flat import Collector, FlatAdapters
from l2v.model.fused.functions import Call, GatedMlp, GroupLinear, ProjectHeads
from l2v.model.fused.norm import Norm
from l2v.model.fused.spec import LayerSpec, Unsupported, base_of, supported
from l2v.model.read import PickRows
from l2v_kernels import attention, rms_norm, segment_pool
from l2v_kernels.integrations.transformers import PackedAttention, window_of
from l2v_kernels.lora_linear import InputDropout, stack_weights
from l2v_kernels.spans import span

Recompute = Literal["none", "cheap", "layer"]


class FusedStack:
    """Runs a decoder's layers with fused forward and backward.

    It holds no parameters: each module of the decoder keeps its own and is called as a module, so that module hooks (ZeRO-3
    gathers weights in them) still run. The decoder's own `forward` does not change.
    recompute: `cheap` keeps what one pass over memory cannot recompute; `none` also keeps norm and SwiGLU outputs; `layer`
    keeps each layer's input and runs the layer again. gathered: an engine gathers the parameters of a layer when it runs.
    """

    def __init__(self, decoder: nn.Module, recompute: Recompute = "cheap") -> None:
        """Install the fused forward in the decoder's layers and final norm.

        Raises:
            Unsupported: a layer's family or its LoRA is not supported.
        """
        inner: Any = decoder.get_base_model() if isinstance(decoder, PeftModel) else decoder
        self.inner, self.recompute = inner, recompute
        self.gathered = False
        self.flat: FlatAdapters | None = None
        if not hasattr(inner, "layers") or not hasattr(inner, "norm"):
            raise Unsupported(f"it is a {type(inner).__name__}, and the fused layer supports those of {supported()}")
        self.specs = [LayerSpec.of(layer) for layer in inner.layers]
        norm = Norm.of(inner.norm)
        for spec in self.specs:
            _install_fused_forward(
                spec.module, lambda residual, delta, run, spec=spec: self._layer(spec, residual, delta, run)
            )
        _install_fused_forward(
            inner.norm, lambda residual, delta, pooling: _final_norm(norm, residual, delta, *pooling)
        )

    def stack_weights(self) -> None:
        """Store weights with the same input in one buffer, for a single matmul.

        Call it once the model is on its device; not with ZeRO-3, which owns the storage of parameters, nor if an engine trains
        the weights, which owns it too. Layer by layer: never
        more than one layer's weights exist twice, also in what CUDA's allocator holds for later.
        """
        for spec in self.specs:
            for group in (spec.qkv, spec.gate_up):
                stack_weights([base_of(m) for m in group.modules])
            if base_of(spec.linears[0]).weight.is_cuda:
                # No later layer fits into what the separate weights leave behind: a third of the model stayed reserved.
                torch.cuda.empty_cache()

    def flatten_adapters(self) -> FlatAdapters | None:
        """Make all adapters parts of one trainable parameter; None if there are none. Not with ZeRO-3, which gathers each."""
        groups = [group for spec in self.specs for group in spec.groups]
        if any(group.adapters() for group in groups):
            self.flat = FlatAdapters(groups)
        return self.flat

    def __call__(
        self,
        input_ids_T: torch.Tensor,
        position_ids_T: torch.Tensor,
        packed: PackedAttention,
        seeds_T: torch.Tensor,
        rows_T: torch.Tensor,
        pooling: tuple[torch.Tensor, torch.Tensor] | None = None,
        read_R: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_TE after the final norm, in the model's dtype; dropout only in training mode.

        read_R: the tokens that the last layer computes after its attention, int64, each once; others give keys and values.
        The result has their rows. Their queries stay in the one matmul of q, k and v: apart from it they would save .2% of
        a step of 8B, and cost a dozen launches.
        pooling: weights (float32 [T] or [R]) and borders (int32 [S+1]) of the segments among the rows of the result; gives
        each segment's weighted mean of the hidden states, float32 [S, E], without storing the normalised tokens.
        """
        embedded_TE = self.inner.embed_tokens(input_ids_T.unsqueeze(0))
        rotary = {kind: self._rotary(embedded_TE, position_ids_T, kind) for kind in {s.rotary for s in self.specs}}
        if self.gathered and torch.is_grad_enabled():
            # ZeRO-3 reduces a layer's gradients once its input has a gradient; without one it would do so too early.
            embedded_TE.requires_grad_()
        collector = None
        if not self.gathered:
            for spec in self.specs:
                for group in spec.groups:
                    group.bind()
            if self.flat is not None and torch.is_grad_enabled():
                collector = self.flat.collector()
        run = _Run(packed, seeds_T, rows_T, rotary, collector)
        sum_TE, delta_TE = embedded_TE[0], None
        for spec in self.specs:
            if read_R is not None and spec is self.specs[-1]:
                run = run.of_read(read_R)
            sum_TE, delta_TE = spec.module(sum_TE, delta_TE, fused=run)
        return self.inner.norm(sum_TE, delta_TE, fused=pooling or ())

    def _rotary(self, embedded_TE, position_ids_T, kind: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [T, D], of a kind of layers where they differ."""
        cos, sin = self.inner.rotary_emb(embedded_TE, position_ids_T.unsqueeze(0), *([kind] if kind else []))
        return cos[0], sin[0]

    def _layer(self, spec, residual_TE, delta_TE, run):
        if self.recompute == "layer" and torch.is_grad_enabled():
            if delta_TE is not None:
                residual_TE, delta_TE = residual_TE + delta_TE, None  # kept as one tensor instead of two
            # Dropout is counter-based (Philox), so there is no generator state to restore.
            return checkpoint(
                self._layer_once, spec, residual_TE, delta_TE, run, use_reentrant=False, preserve_rng_state=False
            )
        return self._layer_once(spec, residual_TE, delta_TE, run)

    def _layer_once(self, spec: LayerSpec, residual_TE, delta_TE, run):
        dropout = run.dropout(spec.dropout())
        cos_TD, sin_TD = run.rotary[spec.rotary]
        call = Call(spec, dropout, cos_TD, sin_TD, self.recompute == "none", run.collector)
        sum_TE, q, k, v = ProjectHeads.apply(
            residual_TE, delta_TE, call, *call.matrices(spec.qkv, norms=spec.attention_norms)
        )
        packed, training = run.packed, spec.module.self_attn.training
        o_THD = attention(
            q, k, v, packed.cu_seqlens, scale=spec.scale, dropout_p=packed.dropout_p if training else 0.0,
            seeds_S=packed.seeds_S, stream=spec.index, causal=packed.causal, softcap=spec.softcap, plan=packed.plan,
            window=window_of(spec.module.self_attn, spec.window, packed.causal),
        )  # fmt: skip
        o_TE = o_THD.flatten(1)
        if run.read_R is not None:
            o_TE, sum_TE = (PickRows.apply(x_TN, run.read_R) for x_TN in (o_TE, sum_TE))
            call = replace(call, dropout=run.dropout_of_read(dropout.p))
        a_TE = GroupLinear.apply(o_TE, spec.o, call, *call.matrices(spec.o))
        return GatedMlp.apply(sum_TE, a_TE, call, *call.matrices(spec.gate_up, spec.down, norms=spec.mlp_norms))


class _Run:
    """What all layers of one forward share."""

    def __init__(self, packed, seeds_T, rows_T, rotary: dict[str | None, Any], collector: Collector | None) -> None:
        self.packed, self.seeds_T, self.rows_T = packed, seeds_T, rows_T
        self.rotary, self.collector = rotary, collector
        self._dropout = InputDropout(0.0, seeds_T, rows_T)
        self.read_R: torch.Tensor | None = None

    def of_read(self, read_R: torch.Tensor) -> _Run:
        """For a layer after whose attention only these tokens are wanted. Other layers keep theirs for the backward."""
        found = copy(self)
        found.read_R = read_R
        return found

    def dropout(self, p: float) -> InputDropout:
        """LoRA dropout of a layer; all layers have the same unless a user has changed some."""
        if p != self._dropout.p:
            self._dropout = InputDropout(p, self.seeds_T, self.rows_T)
        return self._dropout

    def dropout_of_read(self, p: float) -> InputDropout:
        """The same for the rows of the tokens that are read."""
        if p == 0:
            return InputDropout(0.0)
        return InputDropout(p, self.seeds_T[self.read_R], self.rows_T[self.read_R])


def _final_norm(norm: Norm, residual_TE, delta_TE, *pooling: torch.Tensor):
    weight_E, eps, offset = norm.weight, norm.eps, norm.offset
    if pooling and weight_E.requires_grad:  # the pooling kernel has no gradient for it
        weights, borders = pooling
        return segment_pool(_final_norm(norm, residual_TE, delta_TE), weights, borders)
    if pooling:
        with span("pooling"):
            sum_TE = residual_TE if delta_TE is None else residual_TE + delta_TE
            weights, borders = pooling
            return segment_pool(sum_TE, weights, borders, weight_E, eps, offset=offset)
    if delta_TE is None:
        return rms_norm(residual_TE, weight_E, eps, offset=offset)
    return rms_norm(residual_TE, weight_E, eps, residual_TE=delta_TE, offset=offset)[1]


def _install_fused_forward(module: Any, fused_forward) -> None:
    """Make a module run the fused forward when called with `fused=`, and its original forward otherwise."""
    original = type(module).forward

    def forward(*args, fused=None, **kwargs):
        return original(module, *args, **kwargs) if fused is None else fused_forward(*args, fused)

    module.forward = forward
