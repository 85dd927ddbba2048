"""The learning rate of a stage: linear warm-up, then a decay that ends after a number of steps or epochs."""

from __future__ import annotations

import math

from l2v.recipe import Stage

HARDLY = 0.9
"""A decay whose last rate is above this share of the peak is reported."""


def learning_rate(stage: Stage, step: int, steps_per_epoch: int) -> float:
    """The learning rate of update `step` (from 0): warm-up from 0 to `lr`, then the decay of the recipe to 0.

    linear: a straight line. cosine: half a cosine (Loshchilov & Hutter 2017, arXiv 1608.03983, without restarts). none: `lr`.
    McGill's llm2vec decays linearly over `decay_epochs` full epochs but stops far earlier, so there the rate hardly falls.
    """
    if step < stage.warmup:
        return stage.lr * step / stage.warmup
    end = decay_end(stage, steps_per_epoch)
    if end is None:
        return stage.lr
    left = max(0.0, (end - step) / max(1, end - stage.warmup))
    if stage.decay == "cosine":
        return stage.lr * 0.5 * (1 - math.cos(math.pi * min(1.0, left)))
    return stage.lr * left


def decay_end(stage: Stage, steps_per_epoch: int) -> int | None:
    """The step at which the rate reaches 0, never before the last one; None if it does not fall."""
    if stage.decay == "none":
        return None
    if stage.decay_steps == "end":
        return stage.steps
    if stage.decay_steps is not None:
        return max(stage.decay_steps, stage.steps)
    if stage.decay_epochs is not None:
        return max(math.ceil(stage.decay_epochs * steps_per_epoch), stage.steps)
    return None


def hardly_falls(stage: Stage, steps_per_epoch: int) -> str | None:
    """A line for the log if the recipe asks for a decay that the stage ends long before; else None."""
    end = decay_end(stage, steps_per_epoch)
    if end is None or stage.steps <= stage.warmup:
        return None
    last = learning_rate(stage, stage.steps - 1, steps_per_epoch) / stage.lr
    if last <= HARDLY or stage.steps < 3:  # of one or two steps the last is near the peak by any schedule
        return None
    return (
        f"the learning rate hardly falls: at the last step it is {last:.0%} of lr, because the decay ends at step {end:,} of "
        f"{stage.steps:,}; decay_steps: end lets it fall to 0 at the last step, decay: none says that it stays"
    )


def changed_curve(old: Stage, new: Stage, trained: int, steps_per_epoch: int) -> str | None:
    """A line for the log if the first `trained` steps had other rates than `new` gives them; else None."""
    rates = [
        (learning_rate(old, step, steps_per_epoch), learning_rate(new, step, steps_per_epoch))
        for step in range(trained)
    ]
    if all(was == now for was, now in rates):
        return None
    return (
        f"the learning rate of the first {trained:,} steps fell towards step {decay_end(old, steps_per_epoch):,}, and from now "
        f"on it falls towards step {decay_end(new, steps_per_epoch):,}, so the result differs from {new.steps:,} steps at once"
    )
