"""Fused decoder layers of the Llama and Gemma families: transformers holds the parameters, forward and backward are ours."""

from l2v.model.fused.flat import FlatAdapters
from l2v.model.fused.spec import Unsupported, obstacle
from l2v.model.fused.stack import FusedStack, Recompute

__all__ = ["FlatAdapters", "FusedStack", "Recompute", "Unsupported", "obstacle"]
