"""SwiGLU: the gated activation between a feed-forward block's two products."""

import torch

from l2v_kernels.swiglu.autograd import SwiGlu

__all__ = ["swiglu"]


def swiglu(gate_up_TG: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, computed in fp32 and rounded once.

    Args: gate_up_TG: [T, 2 F] of a floating dtype, gate in the first F columns and up in the others, as one product with
        both weights gives them. Rows may lie apart.
    Returns: [T, F] in its dtype, differentiable. gate_up alone is kept for the backward. No gradient of a gradient.
    Errors: ValueError on another shape or dtype.
    Source: Shazeer 2020 (arXiv 2002.05202).
    """
    if gate_up_TG.ndim != 2 or gate_up_TG.shape[1] % 2:
        raise ValueError(f"swiglu needs gate and up side by side, [T, 2 F], got {tuple(gate_up_TG.shape)}")
    if not gate_up_TG.is_floating_point():
        raise ValueError(f"swiglu needs a floating tensor, got {gate_up_TG.dtype} {tuple(gate_up_TG.shape)}")
    return SwiGlu.apply(gate_up_TG)
