"""SwiGLU as Triton kernels. Bound by memory: each operand is read once and written once."""

import torch
import triton
import triton.language as tl

CONFIG = {"BLOCK_T": 4, "BLOCK_F": 1024, "num_warps": 8}
"""16 elements a thread and operand, in accesses of 16 bytes. 1024 divides the widths of Llama, Mistral and Qwen."""


@triton.jit(do_not_specialize=["n_tokens"])
def swiglu_forward_kernel(
    gate_up_ptr,
    product_ptr,
    n_tokens,
    n_columns,
    stride_gate_up,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """product [T, F], contiguous. Program (i, j) does token block i of column block j."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    mask = (token < n_tokens) & (column < n_columns)
    gate_ptr = gate_up_ptr + token * stride_gate_up + column
    gate = tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + n_columns, mask=mask, other=0.0).to(tl.float32)
    product = gate * tl.sigmoid(gate) * up
    tl.store(product_ptr + token * n_columns + column, product.to(product_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_tokens"])
def swiglu_backward_kernel(
    dproduct_ptr,
    gate_up_ptr,
    out_ptr,
    n_tokens,
    n_columns,
    stride_dproduct,
    stride_gate_up,
    stride_out,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """out [T, 2 F] = (dgate, dup). A thread reads all it needs before it writes there: out may be gate_up."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    mask = (token < n_tokens) & (column < n_columns)
    gate_ptr = gate_up_ptr + token * stride_gate_up + column
    gate = tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + n_columns, mask=mask, other=0.0).to(tl.float32)
    dproduct = tl.load(dproduct_ptr + token * stride_dproduct + column, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    dup = dproduct * s * gate
    dgate = dproduct * s * up * (1.0 + gate * (1.0 - s))
    out_ptr += token * stride_out + column
    tl.store(out_ptr, dgate.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + n_columns, dup.to(out_ptr.dtype.element_ty), mask=mask)


def launch_forward(gate_up_TG: torch.Tensor, product_TF: torch.Tensor) -> torch.Tensor:
    """Writes the product [T, F], contiguous, and returns it. See `functional.forward`."""
    T, F = product_TF.shape
    if product_TF.numel() == 0:
        return product_TF
    gate_up_TG = _rows(gate_up_TG)
    swiglu_forward_kernel[_grid(T, F)](gate_up_TG, product_TF, T, F, gate_up_TG.stride(0), **CONFIG)
    return product_TF


def launch_backward(dproduct_TF: torch.Tensor, gate_up_TG: torch.Tensor, out_TG: torch.Tensor) -> torch.Tensor:
    """Writes dgate_up into out [T, 2 F] and returns it. See `functional.backward`."""
    T, F = dproduct_TF.shape
    if dproduct_TF.numel() == 0:
        return out_TG
    dproduct_TF, gate_up_TG = _rows(dproduct_TF), _rows(gate_up_TG)
    target_TG = out_TG if out_TG.stride(1) == 1 else torch.empty_like(out_TG, memory_format=torch.contiguous_format)
    strides = (dproduct_TF.stride(0), gate_up_TG.stride(0), target_TG.stride(0))
    swiglu_backward_kernel[_grid(T, F)](dproduct_TF, gate_up_TG, target_TG, T, F, *strides, **CONFIG)
    return out_TG if target_TG is out_TG else out_TG.copy_(target_TG)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _grid(T: int, F: int) -> tuple[int, int]:
    return triton.cdiv(T, CONFIG["BLOCK_T"]), triton.cdiv(F, CONFIG["BLOCK_F"])
