"""Frozen linears whose weights are FP8, in the form that `l2v_kernels.lora_linear` takes a group of linears."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from l2v_kernels.fp8.matmul import obstacle, scaled_matmul
from l2v_kernels.fp8.op import quantize_rows
from l2v_kernels.spans import span

ALIGN = 16
"""Sides of an FP8 matmul, except for the tokens, must be multiples of this."""


@dataclass(frozen=True)
class Fp8Weight:
    """Weights of linears on one input, one below the other: O outputs, E inputs, 2 bytes a weight in total.

    Two copies of the same numbers, because tensor cores up to sm_90 need the contracted side along memory in both operands:
    the forward contracts over E, the gradient of the input over O. rows_OE, columns_EO: e4m3, contiguous. scale_O: powers of
    two, fp32 [O].
    """

    rows_OE: torch.Tensor
    columns_EO: torch.Tensor
    scale_O: torch.Tensor

    @classmethod
    def of(cls, weights: Sequence[torch.Tensor]) -> Fp8Weight:
        """From weights [O, E] in fp32, fp16 or bf16, each row quantised by `quantize_rows`."""
        found = [quantize_rows(w) for w in weights]
        rows_OE = torch.cat([q.view(torch.uint8) for q, _ in found])  # torch.cat does not take FP8
        columns_EO = rows_OE.t().contiguous()
        e4m3 = torch.float8_e4m3fn
        return cls(rows_OE.view(e4m3), columns_EO.view(e4m3), torch.cat([scale for _, scale in found]))

    def dequantized(self) -> torch.Tensor:
        """[O, E] fp32: the weights as matmuls see them."""
        return self.rows_OE.float() * self.scale_O[:, None]


class Fp8Linears:
    """Frozen linears in FP8: `FrozenLinears` of `l2v_kernels.lora_linear`.

    Inputs and output gradients are rounded to e4m3 token by token, so no token affects another. Gradients are those of the
    rounded weights, as if activations had not been rounded.
    """

    accumulates = False

    def __init__(
        self, weight: Fp8Weight, sizes: Sequence[int], bias_O: torch.Tensor | None = None, *, emulate: bool = False
    ) -> None:
        """Linears of one FP8 weight.

        Args:
            sizes: O of each linear.
            bias_O: their biases side by side, or None.
            emulate: multiply the same numbers in fp32, on any device; slower than a matmul that was never FP8.

        Raises:
            ValueError: sizes or biases do not fit the weight; or, unless emulated, the device has no FP8 or a side is not a
                multiple of 16.
        """
        shape = tuple(weight.rows_OE.shape)
        if sum(sizes) != shape[0] or (bias_O is not None and bias_O.shape != shape[:1]):
            bias = None if bias_O is None else tuple(bias_O.shape)
            raise ValueError(f"sizes {tuple(sizes)} and biases {bias} do not fit a weight of {shape}")
        if not emulate:
            if reason := obstacle(weight.rows_OE.device):
                raise ValueError(f"an FP8 matmul cannot run here: {reason}")
            if any(side % ALIGN for side in shape):
                raise ValueError(f"an FP8 weight needs sides that are multiples of {ALIGN}, got {shape}")
        self.weight, self.sizes, self.bias_O, self.emulate = weight, tuple(sizes), bias_O, emulate

    def matmul(self, x_TE: torch.Tensor) -> torch.Tensor:
        """y [T, O] = x W^T + bias in x's dtype."""
        q_TE, scale_T = self._quantize(x_TE)
        weight = self.weight
        return scaled_matmul(
            q_TE, scale_T, weight.rows_OE, weight.scale_O, self.bias_O, x_TE.dtype, emulate=self.emulate
        )

    def input_gradient(self, dy_TO: torch.Tensor) -> torch.Tensor:
        """dx [T, E] = dy W in dy's dtype. This contracts over O, along which W's scales lie: dy is multiplied by them first."""
        q_TO, scale_T = self._quantize(dy_TO, self.weight.scale_O)
        return scaled_matmul(q_TO, scale_T, self.weight.columns_EO, None, None, dy_TO.dtype, emulate=self.emulate)

    def _quantize(self, x: torch.Tensor, factors: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.emulate and x.dtype != torch.bfloat16:
            raise ValueError(f"an FP8 matmul takes and returns bf16, got {x.dtype} {tuple(x.shape)}")
        with span("fp8"):
            return quantize_rows(x, factors)
