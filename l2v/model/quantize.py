"""The frozen base in fewer bits: FP8 for faster matmuls, NF4 for small GPUs.

Adapters, embeddings, norms and head keep their precision. Weights are quantised once, after earlier adapters were merged
into them in full precision, and the full weights are freed. A quantised base cannot be saved or merged; adapters can be
saved, because they need only the base's configuration.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any, NoReturn

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from l2v.errors import RecipeError, UserError, first_line
from l2v.model.fused import FusedStack
from l2v.model.fused.spec import Group, base_of
from l2v.model.packed import PackedDecoder
from l2v.recipe import Base
from l2v_kernels.fp8 import ALIGN, Fp8Linears, Fp8Weight, obstacle

FP8_VARIABLE = "L2V_FP8"
USE_SAME = "use base.base_precision: same"
NF4_GAP = 0.16
"""Half of the widest gap between two values of NF4, which are at most 1 (QLoRA, appendix E), rounded up."""


def emulated() -> bool:
    """Whether FP8 is emulated: L2V_FP8=emulate, for tests and comparisons on a machine without FP8.

    Raises:
        UserError: L2V_FP8 has another value.
    """
    value = os.environ.get(FP8_VARIABLE, "")
    if value not in ("", "emulate"):
        raise UserError(f"{FP8_VARIABLE} is '{value}'; set it to emulate, or leave it unset")
    return value == "emulate"


def check_base_precision(base: Base, where: torch.device, dtype: torch.dtype) -> None:
    """Check, before weights are loaded, that this machine supports base.base_precision.

    Raises:
        UserError: it does not; the message says what to change.
    """
    if base.base_precision == "fp8" and not emulated():
        if reason := obstacle(where):
            raise UserError(f"base.base_precision: fp8 cannot run here: {reason}; {USE_SAME}")
        if dtype != torch.bfloat16:
            raise UserError(
                f"base.base_precision: fp8 gives bf16 results, and base.precision is {base.precision}; use bf16, or {USE_SAME}"
            )
    if base.base_precision == "nf4":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(
                f"base.base_precision: nf4 needs the package bitsandbytes: pip install 'l2v[nf4]', or {USE_SAME}"
            )
        try:
            importlib.import_module("bitsandbytes")
        except Exception as error:
            raise UserError(
                f"base.base_precision: nf4 needs bitsandbytes, which cannot be imported: {first_line(error)}; {USE_SAME}"
            ) from None


def check_fused(base: Base, model: PackedDecoder) -> None:
    """Check that an FP8 base has fused layers, the only ones that support FP8.

    Raises:
        RecipeError: the decoder's layers cannot be fused.
    """
    if base.base_precision == "fp8" and model.fused is None:
        raise RecipeError(f"base.base_precision: fp8 needs fused layers, and {model.unfused_reason}; {USE_SAME}")


def notice(base: Base) -> str | None:
    """One line to log about a quantised base, or None."""
    if base.base_precision == "fp8":
        slow = f"*** {FP8_VARIABLE}=emulate: FP8 is emulated in fp32, SLOWER than without; for tests and comparisons only ***"
        return slow if emulated() else "frozen linear layers run in FP8"
    if base.base_precision == "nf4" and not torch.cuda.is_available():
        return "*** an NF4 base on a CPU saves memory, and is SLOWER than without ***"
    return None


class Fp8Group(nn.Module):
    """The FP8 weights of linear layers with one input, as buffers that are not saved.

    They are stored as uint8, so that casting the model does not change them. Scales are powers of two, exact in bf16 too.
    """

    rows_NK: torch.Tensor
    columns_KN: torch.Tensor
    scale_N: torch.Tensor
    bias_N: torch.Tensor | None

    def __init__(self, weight: Fp8Weight, sizes: list[int], bias_N: torch.Tensor | None, *, emulate: bool) -> None:
        super().__init__()
        self.sizes, self.emulate = sizes, emulate
        self.register_buffer("rows_NK", weight.rows_OE.view(torch.uint8), persistent=False)
        self.register_buffer("columns_KN", weight.columns_EO.view(torch.uint8), persistent=False)
        self.register_buffer("scale_N", weight.scale_O, persistent=False)
        self.register_buffer("bias_N", bias_N, persistent=False)

    def linears(self) -> Fp8Linears:
        """The weights as the fused layer uses them."""
        e4m3 = torch.float8_e4m3fn
        weight = Fp8Weight(self.rows_NK.view(e4m3), self.columns_KN.view(e4m3), self.scale_N.float())
        return Fp8Linears(weight, self.sizes, self.bias_N, emulate=self.emulate)


def to_fp8(stack: FusedStack, decoder: nn.Module) -> None:
    """Quantise the linear layers of all fused layers on their device, group by group, and free their weights.

    Each `weight` keeps its shape, dtype and device but no memory: all elements share one NaN, so that code which still
    multiplies by it gets NaN.

    Raises:
        UserError: FP8 cannot hold the weights, or they are sharded by ZeRO-3.
    """
    emulate = emulated()
    for spec in stack.specs:
        for name, group in (("qkv", spec.qkv), ("o", spec.o), ("gate_up", spec.gate_up), ("down", spec.down)):
            held = _quantize_group(group, f"layer {spec.index}, {name}", emulate=emulate)
            spec.module.add_module(f"fp8_{name}", held)
            group.quantized = held
    _refuse_to_write(decoder, "FP8", "fp8")


def _quantize_group(group: Group, where: str, *, emulate: bool) -> Fp8Group:
    bases = [base_of(m) for m in group.modules]
    weights = [b.weight for b in bases]
    if any(hasattr(w, "ds_id") for w in weights):
        raise UserError(
            f"base.base_precision: fp8 does not support ZeRO stage 3 (zero.config); use a lower stage, or {USE_SAME}"
        )
    shapes = [tuple(w.shape) for w in weights]
    if not emulate and any(side % ALIGN for shape in shapes for side in shape):
        raise UserError(
            f"base.base_precision: fp8 needs weights whose sides are multiples of {ALIGN}, and {where} has {shapes}; {USE_SAME}"
        )
    weight = Fp8Weight.of([w.detach() for w in weights])
    if not weight.scale_O.isfinite().all():
        raise UserError(f"base.base_precision: fp8: the weights of {where} hold infinity or NaN; the base is damaged")
    bias_N = None
    if any(b.bias is not None for b in bases):
        zeros = (w.new_zeros(w.shape[0]) for w in weights)
        bias_N = torch.cat([z if b.bias is None else b.bias.detach() for b, z in zip(bases, zeros, strict=True)])
    for w in weights:
        w.data = w.data.new_full((1, 1), torch.nan).expand(w.shape)
    return Fp8Group(weight, [shape[0] for shape in shapes], bias_N, emulate=emulate)


def to_nf4(inner: PreTrainedModel, where: torch.device, dtype: torch.dtype) -> None:
    """Replace the linear layers of a decoder by 4-bit ones of bitsandbytes, one by one, on the device `where`.

    NF4 with quantised constants (QLoRA, Dettmers et al. 2023, arXiv 2305.14314). Biases stay; matmuls compute in dtype.

    Raises:
        UserError: the decoder has no nn.Linear, or bitsandbytes does not give its weights back.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    linears = [(name, module) for name, module in inner.named_modules() if type(module) is nn.Linear]
    if not linears:
        raise UserError(f"base.base_precision: nf4 finds no linear in {type(inner).__name__}; {USE_SAME}")
    checked: set[torch.Size] = set()
    for name, linear in linears:
        how = {"compress_statistics": True, "quant_type": "nf4"}
        small = Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, dtype, device="meta", **how
        )
        small.weight = Params4bit(linear.weight.detach(), requires_grad=False, module=small, **how)
        small.bias = linear.bias
        # On some CPUs an evaluation would repack the weights permanently, into a form without gradients.
        small.support_avx512bf16_for_cpu = False
        inner.set_submodule(name, small.to(where).eval())
        if linear.weight.shape not in checked:
            checked.add(linear.weight.shape)
            _check_nf4(name, linear.weight.detach().to(where), small.weight)
        linear.register_parameter("weight", None)
    inner.is_loaded_in_4bit = True  # PEFT then uses its LoRA class for 4-bit layers
    _refuse_to_write(inner, "NF4", "nf4")


def _check_nf4(name: str, weight: torch.Tensor, small: Any) -> None:
    """Check that every weight comes back within the rounding of NF4: half its widest gap, times the largest of its block.

    bitsandbytes 0.50.2 on a CPU loses this, without a word, where a row is no multiple of its blocks of 64.

    Raises:
        UserError: some do not.
    """
    from bitsandbytes.functional import dequantize_4bit

    state = small.quant_state
    wrong = (dequantize_4bit(small.data, state).float() - weight.float()).abs().flatten()
    flat = torch.nn.functional.pad(weight.float().abs().flatten(), (0, -weight.numel() % state.blocksize))
    largest = flat.view(-1, state.blocksize).amax(1)
    # The largest of each block are rounded too, to 8 bits of their range.
    bound = NF4_GAP * largest + (largest.max() - largest.min()) / 50
    if (wrong > bound.repeat_interleave(state.blocksize)[: len(wrong)] + 1e-6).any():
        raise UserError(
            f"base.base_precision: nf4: bitsandbytes does not give the weights of {name} {tuple(weight.shape)} back on "
            f"{weight.device.type}; it needs rows of a multiple of {state.blocksize} there; {USE_SAME}"
        )


def _refuse_to_write(decoder: nn.Module, what: str, key: str) -> None:
    """Make saving and merging raise, because a file would hold no weights and a merge would round them again."""

    def refuse(*_, **__) -> NoReturn:
        raise UserError(
            f"a base in {what} cannot be saved or merged: load it with base.base_precision: same instead of {key}; the "
            "adapter file is the same for both"
        )

    inner: Any = decoder
    if isinstance(decoder, PeftModel):
        inner = decoder.get_base_model()
        for owner in (decoder, decoder.base_model):
            owner.merge_adapter = owner.merge_and_unload = refuse
    inner.save_pretrained = refuse
