"""Kernels for making text encoders of decoder models: PyTorch references and Triton paths of each op.

The core needs torch (and Triton on CUDA) only. `integrations` is imported on request, never from here.
"""

from l2v_kernels.attention import AttentionPlan, attention
from l2v_kernels.dropout import dropout
from l2v_kernels.philox import philox4x32

__all__ = ["AttentionPlan", "attention", "dropout", "philox4x32"]
