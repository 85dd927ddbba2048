"""The rotation without autograd, for layers that decide themselves what they keep."""

import torch

from l2v_kernels.dispatch import takes_triton
from l2v_kernels.rope.reference import rope_reference
from l2v_kernels.spans import spanned


@spanned("rope")
def rotate(
    x_THD: torch.Tensor,
    cos_TD: torch.Tensor,
    sin_TD: torch.Tensor,
    *,
    inverse: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x rotated, in its dtype, or, inverse, turned back: the gradient's map. out: where to write, of any strides; may be x."""
    if takes_triton(x_THD):
        from l2v_kernels.rope.kernel import launch

        if out is None:
            out = torch.empty_like(x_THD, memory_format=torch.contiguous_format)
        return launch(x_THD, out, cos_TD, sin_TD, inverse)
    y_THD = rope_reference(x_THD, cos_TD, sin_TD, inverse)
    return y_THD if out is None else out.copy_(y_THD)
