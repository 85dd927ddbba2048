"""FP8 in plain PyTorch: the definition of the numbers, and of a matmul of them."""

import torch

LARGEST = 448.0  # of e4m3: 1.75 * 2^8
SMALLEST_EXPONENT = -126  # of a scale: that of fp32's normal numbers


def quantize_rows_reference(
    x_TE: torch.Tensor, factors_E: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(q [T, E], scale [T]). Arguments as in `l2v_kernels.fp8.quantize_rows`, which checks them."""
    x_TE = x_TE.float() if factors_E is None else x_TE.float() * factors_E
    largest_T = x_TE.abs().amax(1) if x_TE.shape[1] else x_TE.new_zeros(len(x_TE))
    mantissa_T, exponent_T = torch.frexp(largest_T)  # in [0.5, 1); 448 is 0.875 * 2^9
    exponent_T = exponent_T - 9 + (mantissa_T > 0.875)
    exponent_T = torch.where(largest_T > 0, exponent_T, SMALLEST_EXPONENT).clamp(min=SMALLEST_EXPONENT)
    scale_T = power_of_two(exponent_T)
    finite_T = largest_T.isfinite()
    q_TE = torch.where(finite_T[:, None], x_TE / scale_T[:, None], 0.0).to(torch.float8_e4m3fn)
    return q_TE, torch.where(finite_T, scale_T, torch.nan)


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2 ** exponent in fp32, exact. exponent: integers from -126 to 127, of any shape."""
    return ((exponent + 127).to(torch.int32) << 23).view(torch.float32)


def scaled_matmul_reference(
    q_TE: torch.Tensor,
    scale_T: torch.Tensor,
    w_OE: torch.Tensor,
    scale_O: torch.Tensor | None,
    bias_O: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """y [T, O]. As `matmul.scaled_matmul`: the same numbers in fp32, multiplied and summed in fp32, rounded once."""
    y_TO = (q_TE.float() @ w_OE.float().t()) * scale_T[:, None]
    if scale_O is not None:
        y_TO *= scale_O
    if bias_O is not None:
        y_TO += bias_O
    return y_TO.to(dtype)
