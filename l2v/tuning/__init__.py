"""The fastest micro-batch, recompute, backend and kernels of a stage: search them, and apply what was found."""
