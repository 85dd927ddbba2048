"""Pictures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from l2v.runs.metrics import read_metrics

COLORS = {"mntp": "#3b6ea8", "simcse": "#c2703d", "supervised": "#3f8f5b"}


def loss_curves(run: Path, stages: list[str], out: Path) -> None:
    """One panel per stage: training loss, and held-out loss if measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(stages), figsize=(4.2 * len(stages), 3.4), squeeze=False, layout="constrained"
    )
    for axis, stage in zip(axes[0], stages, strict=True):
        draw_loss(axis, stage, read_metrics(run / stage))
    figure.savefig(out, dpi=150)
    pyplot.close(figure)


def draw_loss(axis: Any, stage: str, rows: list[dict]) -> None:
    """A stage's training loss, and its held-out loss if measured, on a matplotlib axis."""
    train = [(r["step"], r["loss"]) for r in rows if "loss" in r]
    held_out = [(r["step"], r["eval_loss"]) for r in rows if "eval_loss" in r]
    if train:
        color = COLORS.get(stage, "#555555")
        axis.plot(
            *zip(*train, strict=True),
            color=color,
            marker="o" if len(train) == 1 else "",
            linewidth=1.6,
            label="training",
        )
    if held_out:
        axis.plot(*zip(*held_out, strict=True), "o--", color="#222222", markersize=4, linewidth=1, label="held out")
    axis.set(title=stage, xlabel="step", ylabel="loss (nats)")
    axis.set_ylim(bottom=0)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
