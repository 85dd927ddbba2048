"""SwiGLU and GeGLU: the gated activation between a feed-forward block's two matmuls."""

import torch

from l2v_kernels.swiglu.op import ACTIVATIONS, Activation, SwiGlu

__all__ = ["swiglu"]


def swiglu(gate_up_TG: torch.Tensor, *, activation: Activation = "silu") -> torch.Tensor:
    """activation(gate) * up, computed in fp32 and rounded once.

    Args:
        gate_up_TG: [T, G] of a floating dtype, G = 2 F: gate in the first F columns and up in the others, as one matmul
            with both weights computes them. Rows may lie apart in memory.
        activation: silu, or gelu_tanh (GeGLU): gate / 2 * (1 + tanh(sqrt(2 / pi) * (gate + 0.044715 * gate ** 3))).

    Returns:
        [T, F] in its dtype, differentiable once. gate_up alone is kept for the backward.

    Raises:
        ValueError: another shape, dtype or activation.

    Source: Shazeer 2020 (arXiv 2002.05202).
    """
    if gate_up_TG.ndim != 2 or gate_up_TG.shape[1] % 2:
        raise ValueError(f"swiglu needs gate and up side by side, [T, 2 F], got {tuple(gate_up_TG.shape)}")
    if not gate_up_TG.is_floating_point():
        raise ValueError(f"swiglu needs a floating tensor, got {gate_up_TG.dtype} {tuple(gate_up_TG.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"swiglu takes the activations {' and '.join(ACTIVATIONS)}, got {activation!r}")
    return SwiGlu.apply(gate_up_TG, activation)
