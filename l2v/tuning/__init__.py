"""Search the fastest micro-batch, recompute, backend and kernels of a stage, and apply the result in training."""
