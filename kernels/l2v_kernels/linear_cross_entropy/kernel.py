"""Losses, hits and gradient of a chunk of logits as a Triton kernel. Bound by memory: fp32 logits are read twice."""

import torch
import triton.language as tl

from l2v_kernels.jit import jit
from l2v_kernels.launching import on_device

CONFIG = {"BLOCK": 2048, "num_warps": 4}
"""Logits a step: 16 a thread, in four loads of 16 bytes. That takes under 100 registers a thread, so five rows share a
multiprocessor and one is read while others are computed."""


@jit()
def softmax_stats_kernel(
    logits_ptr,
    bias_ptr,
    labels_ptr,
    losses_ptr,
    hits_ptr,
    out_ptr,
    n_columns,
    BIAS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Losses and hits of rows of logits [r, V], and out = softmax - onehot. A program owns a row; out may be logits.

    Each lane carries its own maximum and sum over the row, so the loop needs no exchange between lanes. n_columns is
    specialised: only a mask that ends at a multiple of 16 lets loads be 16 bytes wide.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    valid = (label >= 0) & (label < n_columns)
    label = tl.where(valid, label, 0).to(tl.int32)
    logits_ptr += row * n_columns
    picked = tl.load(logits_ptr + label)
    if BIAS:
        picked += tl.load(bias_ptr + label).to(tl.float32)
    # Not minus infinity: the difference of two of them would be NaN.
    m = tl.full([BLOCK], -3.4028234663852886e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    beaten = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + columns, mask=columns < n_columns, other=float("-inf"))
        if BIAS:
            x += tl.load(bias_ptr + columns, mask=columns < n_columns, other=0.0).to(tl.float32)
        # One of the two exponents of the running sum is 0.
        rise = x - m
        e = tl.exp(-tl.abs(rise))
        total = tl.where(rise > 0.0, total * e + 1.0, total + e)
        m = tl.maximum(m, x)
        # Of equal logits the first counts.
        beaten |= ((x > picked) | ((x == picked) & (columns < label))).to(tl.int32)
    top = tl.max(m, 0)
    sum_of_row = tl.sum(total * tl.exp(m - top), 0)
    sum_of_row = tl.where(valid, sum_of_row, float("nan"))
    tl.store(losses_ptr + row, tl.log(sum_of_row) - (picked - top))
    tl.store(hits_ptr + row, ((tl.max(beaten, 0) == 0) & valid).to(tl.uint8))
    if GRADIENT:
        out_ptr += row * n_columns
        inverse = 1.0 / sum_of_row
        for start in range(0, n_columns, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + columns, mask=columns < n_columns, other=0.0)
            if BIAS:
                x += tl.load(bias_ptr + columns, mask=columns < n_columns, other=0.0).to(tl.float32)
            # The 1 is subtracted before rounding: after it, only the rounding error of a share near 1 would be left.
            y = tl.exp(x - top) * inverse - tl.where(columns == label, 1.0, 0.0)
            tl.store(out_ptr + columns, y.to(out_ptr.dtype.element_ty), mask=columns < n_columns)


@on_device
def launch(
    logits_rV: torch.Tensor,
    bias_V: torch.Tensor | None,
    labels_r: torch.Tensor,
    losses_r: torch.Tensor,
    hits_r: torch.Tensor,
    out_rV: torch.Tensor | None,
) -> None:
    """Writes losses [r], hits [r] and, where given, out [r, V], which may be logits.

    logits, losses: fp32; hits: bool; out: any dtype; logits and out contiguous. bias [V] is added to the logits, which were
    computed without it.
    """
    rows, V = logits_rV.shape
    softmax_stats_kernel[(rows,)](
        logits_rV,
        logits_rV if bias_V is None else bias_V.contiguous(),
        labels_r.contiguous(),
        losses_r,
        hits_r.view(torch.uint8),
        logits_rV if out_rV is None else out_rV,
        V,
        BIAS=bias_V is not None,
        GRADIENT=out_rV is not None,
        **CONFIG,
    )
