"""Embeddings as small vectors in training: codes of int8 or one bit, and the straight-through gradient through them.

A row x becomes step * c, c whole numbers: of `int8` c = floor(x / step + 1/2) with step = max|x| / 127, of `binary` c = 1 where
x > 0 and -1 elsewhere with step = mean|x|, the best one for signs (Rastegari et al. 2016, arXiv 1603.05279). Maximum and mean
are over the columns of the longest prefix. Backward, the row is its own quantised form: d/dx = d/d(step * c), the
straight-through estimator of Bengio et al. 2013 (arXiv 1308.3432); the step is a constant. A loss on cosines does not see the
step, so only c is multiplied, which bf16 and fp16 hold exactly. Training for quantised vectors: arXiv 2602.11151.
"""

from typing import Literal

import torch

Quantize = Literal["int8", "binary"]

QUANTIZE: tuple[Quantize, ...] = ("int8", "binary")


def inverse_steps(x_nE: torch.Tensor, kind: Quantize, length: int) -> torch.Tensor:
    """fp32 [n]: 1 / step of each row, from its first `length` columns; 0 for a zero vector, NaN for a row with NaN or Inf.

    Always computed in fp32, so that a row has one code in every dtype that holds it.
    """
    out_n = torch.empty(len(x_nE), dtype=torch.float32, device=x_nE.device)
    rows = max(1, (1 << 24) // max(1, length)) if x_nE.dtype == torch.float64 else max(1, len(x_nE))
    for at in range(0, len(x_nE), rows):
        part = x_nE[at : at + rows, :length]
        part = part.float() if part.dtype == torch.float64 else part
        order = torch.inf if kind == "int8" else 1
        out_n[at : at + rows] = torch.linalg.vector_norm(part, ord=order, dim=1, dtype=torch.float32)
    inverse_n = (127.0 if kind == "int8" else float(length)) / out_n
    # Of numbers so small that the quotient overflows a step cannot be taken: such a row counts as zero.
    inverse_n = torch.where((out_n == 0) | inverse_n.isinf(), 0, inverse_n)
    return torch.where(out_n.isinf(), torch.nan, inverse_n)


def codes(x_rE: torch.Tensor, inverse_r: torch.Tensor, kind: Quantize) -> torch.Tensor:
    """[r, E]: c in the dtype of x; zeros for a zero vector, NaN for a row with NaN or Inf."""
    inverse_r1 = inverse_r.unsqueeze(1)
    if kind == "int8":
        return (x_rE.float() * inverse_r1).add_(0.5).floor_().clamp_(-127, 127).to(x_rE.dtype)
    signs_rE = torch.where(x_rE > 0, 1.0, -1.0)
    return torch.where(inverse_r1 == 0, 0, signs_rE + 0 * inverse_r1).to(x_rE.dtype)


def straight_through(x_nE: torch.Tensor, kind: Quantize | None, length: int) -> torch.Tensor:
    """The definition: the rows quantised, with the gradient as if they were not. [n, E]; None gives x itself."""
    if kind is None:
        return x_nE
    plain_nE = x_nE.detach()
    inverse_n = inverse_steps(plain_nE, kind, length)
    step_n1 = torch.where(inverse_n == 0, 0, 1 / inverse_n.to(x_nE.dtype)).unsqueeze(1)
    quantised_nE = codes(plain_nE, inverse_n, kind) * step_n1
    # A zero vector has no direction, quantised or not, and gets no gradient.
    return torch.where(step_n1 == 0, 0, quantised_nE + (x_nE - plain_nE))
