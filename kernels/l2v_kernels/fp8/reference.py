"""FP8 in plain PyTorch: the definition of the numbers, and of a product of them."""

import torch

LARGEST = 448.0  # of e4m3: 1.75 * 2^8
SMALLEST_EXPONENT = -126  # of a scale: that of fp32's normal numbers


def quantize_rows_reference(
    x_TK: torch.Tensor, factors_K: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `l2v_kernels.fp8.quantize_rows`; arguments are checked there."""
    x_TK = x_TK.float() if factors_K is None else x_TK.float() * factors_K
    largest_T = x_TK.abs().amax(1) if x_TK.shape[1] else x_TK.new_zeros(len(x_TK))
    mantissa_T, exponent_T = torch.frexp(largest_T)  # in [0.5, 1); 448 is 0.875 * 2^9
    exponent_T = exponent_T - 9 + (mantissa_T > 0.875)
    exponent_T = torch.where(largest_T > 0, exponent_T, SMALLEST_EXPONENT).clamp(min=SMALLEST_EXPONENT)
    scale_T = power_of_two(exponent_T)
    finite_T = largest_T.isfinite()
    q_TK = torch.where(finite_T[:, None], x_TK / scale_T[:, None], 0.0).to(torch.float8_e4m3fn)
    return q_TK, torch.where(finite_T, scale_T, torch.nan)


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2 ** exponent in fp32, exact: exponents from -126 to 127 as integers."""
    return ((exponent + 127).to(torch.int32) << 23).view(torch.float32)


def scaled_product_reference(
    q_TK: torch.Tensor,
    scale_T: torch.Tensor,
    w_NK: torch.Tensor,
    scale_N: torch.Tensor | None,
    bias_N: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See `product.scaled_product`: the numbers themselves in fp32, multiplied and summed in fp32, rounded once."""
    y_TN = (q_TK.float() @ w_NK.float().t()) * scale_T[:, None]
    if scale_N is not None:
        y_TN *= scale_N
    if bias_N is not None:
        y_TN += bias_N
    return y_TN.to(dtype)
