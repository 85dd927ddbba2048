"""FP8: kernels against bf16, errors of its matmuls, and whether it trains the same encoder."""
