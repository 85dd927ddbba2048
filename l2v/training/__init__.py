"""The DeepSpeed engine, the loop, checkpoints, metrics."""
