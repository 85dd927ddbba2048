"""The training loop on DeepSpeed: one stage's model, data, steps, checkpoints, metrics and watchdog."""
