"""Fused decoder layers of the Llama family: the modules of transformers hold the parameters, forward and backward are ours."""

from l2v.model.fused.flat import FlatAdapters
from l2v.model.fused.spec import Unsupported, obstacle
from l2v.model.fused.stack import FusedStack, Recompute

__all__ = ["FlatAdapters", "FusedStack", "Recompute", "Unsupported", "obstacle"]
