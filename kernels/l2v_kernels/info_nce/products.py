"""Matrix products that read half precision and sum and write fp32."""

import torch


def dots(x_RE: torch.Tensor, y_CE: torch.Tensor, out_RC: torch.Tensor) -> None:
    """out = x y^T, out in the dtype of sums."""
    if x_RE.dtype == out_RC.dtype:
        torch.mm(x_RE, y_CE.T, out=out_RC)
    elif x_RE.is_cuda:
        torch.mm(x_RE, y_CE.T, out_dtype=out_RC.dtype, out=out_RC)
    else:  # the CPU has no product of half precision with a wide result
        torch.mm(x_RE.to(out_RC.dtype), y_CE.T.to(out_RC.dtype), out=out_RC)


def add_product(sum_RE: torch.Tensor, a_RC: torch.Tensor, b_CE: torch.Tensor, fresh: bool) -> None:
    """sum += a b, or sum = a b where the sum is still fresh. a has the dtype of b or of the sum."""
    if b_CE.dtype != sum_RE.dtype and not sum_RE.is_cuda:
        a_RC, b_CE = a_RC.to(sum_RE.dtype), b_CE.to(sum_RE.dtype)
    wide = {} if b_CE.dtype == sum_RE.dtype else {"out_dtype": sum_RE.dtype}
    if fresh:
        torch.mm(a_RC, b_CE, out=sum_RE, **wide)
    else:
        torch.addmm(sum_RE, a_RC, b_CE, out=sum_RE, **wide)
