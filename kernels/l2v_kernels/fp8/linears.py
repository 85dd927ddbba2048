"""Frozen linears whose weights are FP8: what `l2v_kernels.lora_linear` asks of a group of linears."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from l2v_kernels.fp8.product import obstacle, scaled_product
from l2v_kernels.spans import span

ALIGN = 16
"""What the sides of an FP8 product must be multiples of, but for the tokens."""


@dataclass(frozen=True)
class Fp8Weight:
    """Weights of linears on one input, one below the other: N outputs, K inputs, 2 bytes a weight in all.

    Two copies of the same numbers, because tensor cores up to sm_90 want the contracted side along memory in both operands:
    the forward contracts over K, the gradient of the input over N. scale_N: powers of two, fp32.
    """

    rows_NK: torch.Tensor
    columns_KN: torch.Tensor
    scale_N: torch.Tensor

    @classmethod
    def of(cls, weights: Sequence[torch.Tensor]) -> Fp8Weight:
        """From weights [N, K] in fp32, fp16 or bf16, each row with the scale that its largest number asks for."""
        from l2v_kernels.fp8 import quantize_rows

        found = [quantize_rows(w) for w in weights]
        rows_NK = torch.cat([q.view(torch.uint8) for q, _ in found])  # cat knows no FP8
        columns_KN = rows_NK.t().contiguous()
        e4m3 = torch.float8_e4m3fn
        return cls(rows_NK.view(e4m3), columns_KN.view(e4m3), torch.cat([scale for _, scale in found]))

    def dequantized(self) -> torch.Tensor:
        """[N, K] fp32: the weights that products see."""
        return self.rows_NK.float() * self.scale_N[:, None]


class Fp8Linears:
    """Frozen linears in FP8: `FrozenLinears` of `l2v_kernels.lora_linear`.

    Inputs and output gradients are rounded to e4m3 token by token as they come, so no token sees another. Gradients are
    those of the rounded weights, as if activations had not been rounded.
    """

    adds = False

    def __init__(
        self, weight: Fp8Weight, sizes: Sequence[int], bias_N: torch.Tensor | None = None, *, emulate: bool = False
    ) -> None:
        """sizes: N of each linear; bias_N: their biases side by side, None where there is none.

        emulate: the same numbers multiplied in fp32, on any device; slower than a product that was never FP8.
        Errors: ValueError where the device has no FP8 or a side is no multiple of 16, unless emulated.
        """
        shape = tuple(weight.rows_NK.shape)
        if sum(sizes) != shape[0] or (bias_N is not None and bias_N.shape != shape[:1]):
            bias = None if bias_N is None else tuple(bias_N.shape)
            raise ValueError(f"sizes {tuple(sizes)} and biases {bias} do not fit a weight of {shape}")
        if not emulate:
            if reason := obstacle(weight.rows_NK.device):
                raise ValueError(f"an FP8 product cannot run here: {reason}")
            if any(side % ALIGN for side in shape):
                raise ValueError(f"an FP8 weight needs sides that are multiples of {ALIGN}, got {shape}")
        self.weight, self.sizes, self.bias_N, self.emulate = weight, tuple(sizes), bias_N, emulate

    def product(self, x_TK: torch.Tensor) -> torch.Tensor:
        """y [T, N] = x W^T + bias in x's dtype."""
        q_TK, scale_T = self._quantize(x_TK)
        weight = self.weight
        return scaled_product(
            q_TK, scale_T, weight.rows_NK, weight.scale_N, self.bias_N, x_TK.dtype, emulate=self.emulate
        )

    def gradient(self, dy_TN: torch.Tensor) -> torch.Tensor:
        """dx [T, K] = dy W in dy's dtype. W's scales lie along N, over which this sums: dy takes them before it is rounded."""
        q_TN, scale_T = self._quantize(dy_TN, self.weight.scale_N)
        return scaled_product(q_TN, scale_T, self.weight.columns_KN, None, None, dy_TN.dtype, emulate=self.emulate)

    def _quantize(self, x: torch.Tensor, factors: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        from l2v_kernels.fp8 import quantize_rows

        if not self.emulate and x.dtype != torch.bfloat16:
            raise ValueError(f"an FP8 product takes and gives bf16, got {x.dtype} {tuple(x.shape)}")
        with span("fp8"):
            return quantize_rows(x, factors)
