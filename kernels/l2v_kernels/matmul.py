"""Matmuls that read half precision, and sum and write fp32."""

import torch


def matmul_nt(x_rE: torch.Tensor, y_cE: torch.Tensor, out_rc: torch.Tensor) -> None:
    """out = x y^T. x [r, E] and y [c, E] of one dtype; out [r, c] in that dtype or a wider one, in which it is summed."""
    if x_rE.dtype == out_rc.dtype:
        torch.mm(x_rE, y_cE.T, out=out_rc)
    elif x_rE.is_cuda:
        torch.mm(x_rE, y_cE.T, out_dtype=out_rc.dtype, out=out_rc)
    else:  # on a CPU torch has no matmul of half precision with a wider result
        torch.mm(x_rE.to(out_rc.dtype), y_cE.T.to(out_rc.dtype), out=out_rc)


def add_matmul(sum_rE: torch.Tensor, a_rc: torch.Tensor, b_cE: torch.Tensor, *, overwrite: bool) -> None:
    """sum += a b, or sum = a b with `overwrite`. a [r, c] has the dtype of b [c, E] or of sum [r, E]."""
    if b_cE.dtype != sum_rE.dtype and not sum_rE.is_cuda:
        a_rc, b_cE = a_rc.to(sum_rE.dtype), b_cE.to(sum_rE.dtype)
    if b_cE.dtype == sum_rE.dtype:
        if overwrite:
            torch.mm(a_rc, b_cE, out=sum_rE)
        else:
            torch.addmm(sum_rE, a_rc, b_cE, out=sum_rE)
    elif overwrite:
        torch.mm(a_rc, b_cE, out_dtype=sum_rE.dtype, out=sum_rE)
    else:
        torch.addmm(sum_rE, a_rc, b_cE, out_dtype=sum_rE.dtype, out=sum_rE)
