"""What compiled kernels use and issue, read from their machine code; no GPU is needed."""
