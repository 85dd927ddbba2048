"""SwiGLU and GeGLU as Triton kernels. Bound by memory: each operand is read once and written once."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from l2v_kernels.jit import jit
from l2v_kernels.launching import PRECISION, cdiv, on_device, unit_stride
from l2v_kernels.swiglu.reference import Activation, GateUpLora

CONFIG = {"BLOCK_T": 4, "BLOCK_F": 1024, "num_warps": 8}
"""16 elements a thread and operand, in accesses of 16 bytes. 1024 divides the widths of Llama, Mistral and Qwen."""
LORA_CONFIG = {
    2: {"BLOCK_T": 32, "BLOCK_F": 128, "num_warps": 8},
    4: {"BLOCK_T": 16, "BLOCK_F": 64, "num_warps": 8},
}
"""With the adapters' share, by bytes an element: every token block reads B again, from the cache, so blocks are taller."""

_TWICE = tl.constexpr(2 * math.sqrt(2 / math.pi))
_CUBIC = tl.constexpr(2 * math.sqrt(2 / math.pi) * 0.044715)
"""2 u = gate (_TWICE + _CUBIC gate ** 2), where u is what gelu_tanh takes the hyperbolic tangent of."""


@triton.jit
def _add_share(
    values,
    xa_ptr,
    b_ptr,
    token,
    column,
    n_tokens,
    n_columns,
    stride_xa,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """values [BLOCK_T, BLOCK_F] fp32 + xa B^T: the adapter's share."""
    BLOCK_R: tl.constexpr = 16 if RANK <= 16 else triton.next_power_of_2(RANK)
    r = tl.arange(0, BLOCK_R)
    xa_at = token * stride_xa + r[None, :]
    xa = tl.load(xa_ptr + xa_at, mask=(token < n_tokens) & (r < RANK)[None, :], other=0.0)
    b_at = r[:, None] + column.to(tl.int64) * RANK
    b = tl.load(b_ptr + b_at, mask=(column < n_columns) & (r < RANK)[:, None], other=0.0)
    return tl.dot(xa, b, values, input_precision=PRECISION)


@triton.jit
def _sigmoid(gate, GELU: tl.constexpr):
    """s with activation(gate) = gate * s. Of gelu_tanh it is sigmoid(2 u), since (1 + tanh(u)) / 2 is that."""
    return tl.sigmoid(gate * (_TWICE + _CUBIC * gate * gate) if GELU else gate)


@triton.jit
def _slope(gate, s, GELU: tl.constexpr):
    """activation'(gate) / s."""
    return 1.0 + gate * (1.0 - s) * (_TWICE + 3.0 * _CUBIC * gate * gate) if GELU else 1.0 + gate * (1.0 - s)


@jit(do_not_specialize=["n_tokens"])
def swiglu_forward_kernel(
    gate_up_ptr,
    product_ptr,
    n_tokens,
    n_columns,
    stride_gate_up,
    xa_gate_ptr,
    b_gate_ptr,
    xa_up_ptr,
    b_up_ptr,
    stride_xa_gate,
    stride_xa_up,
    RANK_GATE: tl.constexpr,
    RANK_UP: tl.constexpr,
    PRECISION: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """product [T, F], contiguous. Program (i, j) computes token block i of column block j. A rank of 0: not adapted."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    mask = (token < n_tokens) & (column < n_columns)
    gate_ptr = gate_up_ptr + token * stride_gate_up + column
    gate = tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + n_columns, mask=mask, other=0.0).to(tl.float32)
    if RANK_GATE > 0:
        gate = _add_share(
            gate, xa_gate_ptr, b_gate_ptr, token, column, n_tokens, n_columns, stride_xa_gate, RANK_GATE, PRECISION
        )
    if RANK_UP > 0:
        up = _add_share(up, xa_up_ptr, b_up_ptr, token, column, n_tokens, n_columns, stride_xa_up, RANK_UP, PRECISION)
    product = gate * _sigmoid(gate, GELU) * up
    tl.store(product_ptr + token * n_columns + column, product.to(product_ptr.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["n_tokens"])
def swiglu_backward_kernel(
    dproduct_ptr,
    gate_up_ptr,
    out_ptr,
    n_tokens,
    n_columns,
    stride_dproduct,
    stride_gate_up,
    stride_out,
    xa_gate_ptr,
    b_gate_ptr,
    xa_up_ptr,
    b_up_ptr,
    stride_xa_gate,
    stride_xa_up,
    RANK_GATE: tl.constexpr,
    RANK_UP: tl.constexpr,
    PRECISION: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """out [T, G] = (dgate, dup). A program reads all it needs before it writes: out may be gate_up."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    mask = (token < n_tokens) & (column < n_columns)
    gate_ptr = gate_up_ptr + token * stride_gate_up + column
    gate = tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + n_columns, mask=mask, other=0.0).to(tl.float32)
    dproduct = tl.load(dproduct_ptr + token * stride_dproduct + column, mask=mask, other=0.0).to(tl.float32)
    if RANK_GATE > 0:
        gate = _add_share(
            gate, xa_gate_ptr, b_gate_ptr, token, column, n_tokens, n_columns, stride_xa_gate, RANK_GATE, PRECISION
        )
    if RANK_UP > 0:
        up = _add_share(up, xa_up_ptr, b_up_ptr, token, column, n_tokens, n_columns, stride_xa_up, RANK_UP, PRECISION)
    if RANK_GATE + RANK_UP > 0:
        # The matmul moves elements between threads: without a barrier, one could overwrite what another has yet to read.
        tl.debug_barrier()
    s = _sigmoid(gate, GELU)
    dup = dproduct * s * gate
    dgate = dproduct * s * up * _slope(gate, s, GELU)
    out_ptr += token * stride_out + column
    tl.store(out_ptr, dgate.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + n_columns, dup.to(out_ptr.dtype.element_ty), mask=mask)


@on_device
def launch_forward(
    gate_up_TG: torch.Tensor,
    product_TF: torch.Tensor,
    lora: GateUpLora | None = None,
    activation: Activation = "silu",
) -> torch.Tensor:
    """Writes the product [T, F], contiguous, and returns it. Arguments as in `op.forward`."""
    T, F = product_TF.shape
    if product_TF.numel() == 0:
        return product_TF
    gate_up_TG, config = unit_stride(gate_up_TG), _config(gate_up_TG, lora)
    swiglu_forward_kernel[_grid(T, F, config)](
        gate_up_TG,
        product_TF,
        T,
        F,
        gate_up_TG.stride(0),
        **_share(gate_up_TG, lora),
        GELU=activation == "gelu_tanh",
        **config,
    )
    return product_TF


@on_device
def launch_backward(
    dproduct_TF: torch.Tensor,
    gate_up_TG: torch.Tensor,
    out_TG: torch.Tensor,
    lora: GateUpLora | None = None,
    activation: Activation = "silu",
) -> torch.Tensor:
    """Writes dgate_up into out [T, G] and returns it. Arguments as in `op.backward`."""
    T, F = dproduct_TF.shape
    if dproduct_TF.numel() == 0:
        return out_TG
    dproduct_TF, gate_up_TG = unit_stride(dproduct_TF), unit_stride(gate_up_TG)
    target_TG = out_TG if out_TG.stride(1) == 1 else torch.empty_like(out_TG, memory_format=torch.contiguous_format)
    strides, config = (dproduct_TF.stride(0), gate_up_TG.stride(0), target_TG.stride(0)), _config(gate_up_TG, lora)
    swiglu_backward_kernel[_grid(T, F, config)](
        dproduct_TF,
        gate_up_TG,
        target_TG,
        T,
        F,
        *strides,
        **_share(gate_up_TG, lora),
        GELU=activation == "gelu_tanh",
        **config,
    )
    return out_TG if target_TG is out_TG else out_TG.copy_(target_TG)


def _config(gate_up_TG: torch.Tensor, lora: GateUpLora | None) -> dict[str, int]:
    return CONFIG if lora is None else LORA_CONFIG[gate_up_TG.element_size()]


def _grid(T: int, F: int, config: dict[str, int]) -> tuple[int, int]:
    return cdiv(T, config["BLOCK_T"]), cdiv(F, config["BLOCK_F"])


def _share(gate_up_TG: torch.Tensor, lora: GateUpLora | None) -> dict[str, object]:
    """Arguments of the kernels. Those of a half that is not adapted are never read, but an argument must be a tensor."""
    found: dict[str, object] = {"PRECISION": PRECISION}
    for name, pair in {"gate": lora and lora.gate, "up": lora and lora.up}.items():
        xa_TR, b_FR = (unit_stride(pair[0]), pair[1].contiguous()) if pair else (gate_up_TG, gate_up_TG)
        found |= {f"xa_{name}_ptr": xa_TR, f"b_{name}_ptr": b_FR, f"stride_xa_{name}": xa_TR.stride(0)}
        found[f"RANK_{name.upper()}"] = b_FR.shape[1] if pair else 0
    return found
