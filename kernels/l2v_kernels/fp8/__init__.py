"""FP8: rows of numbers in 8 bits with one scale each, and frozen linears that multiply in them."""

from l2v_kernels.fp8.linears import ALIGN, Fp8Linears, Fp8Weight
from l2v_kernels.fp8.matmul import CAPABILITY, obstacle
from l2v_kernels.fp8.op import quantize_rows

__all__ = ["ALIGN", "CAPABILITY", "Fp8Linears", "Fp8Weight", "obstacle", "quantize_rows"]
