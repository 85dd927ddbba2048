"""Kernels for turning decoder models into text encoders: each op as a PyTorch reference and as Triton kernels.

The core needs only torch, and Triton on CUDA. `integrations` is imported on request, never from here.
"""

from l2v_kernels.attention import AttentionPlan, attention, attention_padded
from l2v_kernels.dropout import dropout
from l2v_kernels.info_nce import info_nce
from l2v_kernels.linear_cross_entropy import linear_cross_entropy
from l2v_kernels.lora_linear import lora_linear
from l2v_kernels.philox import philox4x32
from l2v_kernels.rms_norm import rms_norm
from l2v_kernels.rope import rope
from l2v_kernels.sandwich_norm import sandwich_norm
from l2v_kernels.segment_pool import segment_pool
from l2v_kernels.swiglu import swiglu

__all__ = [
    "AttentionPlan",
    "attention",
    "attention_padded",
    "dropout",
    "info_nce",
    "linear_cross_entropy",
    "lora_linear",
    "philox4x32",
    "rms_norm",
    "rope",
    "sandwich_norm",
    "segment_pool",
    "swiglu",
]
