"""The benchmarks that use a GPU, as `python -m tests.nullgpu benchmarks` runs them: their flow, not their numbers."""

from __future__ import annotations

BENCHMARKS = {
    "kernels.step_ops": ["--quick"],
    "kernels.fused_layer": ["--quick"],
    "kernels.linear_cross_entropy": ["--quick"],
    "fp8.kernels": ["--quick"],
    "kernels.attention": ["--quick"],
    "kernels.contrastive": ["--quick"],
    "gradient_cache.bench": ["--quick"],
    "train_step.bench": ["--quick"],
    "encode": ["--quick"],
}
"""Module below `benchmarks` -> arguments."""
