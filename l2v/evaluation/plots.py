"""Pictures of a run and of scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2v.evaluation import remarks
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


@dataclass(frozen=True)
class Bar:
    """One row of a picture of scores, in percent. low, high: its interval, None without one."""

    name: str
    score: float
    low: float | None = None
    high: float | None = None
    best: bool = False
    baseline: bool = False


def draw_scores(axis: Any, title: str, rows: Sequence[Bar]) -> None:
    """Scores of one task on a matplotlib axis: a dot for each row with its interval, the best with its name in bold.

    Baselines are grey squares, so that they differ without colour too.
    """
    for at, row in enumerate(reversed(rows)):
        color = "#555555" if row.baseline else COLORS["mntp"]
        if row.low is not None and row.high is not None:
            axis.plot([row.low, row.high], [at, at], color=color, linewidth=1.6, solid_capstyle="butt")
        axis.plot(row.score, at, "s" if row.baseline else "o", color=color, markersize=6)
        right = row.high if row.high is not None else row.score
        weight = "bold" if row.best else "normal"
        axis.annotate(
            f"{row.score:.1f}", (right, at), xytext=(8, 0), textcoords="offset points", va="center", fontsize=8,
            color="#222222", fontweight=weight,
        )  # fmt: skip
    axis.set_yticks(range(len(rows)), [row.name for row in reversed(rows)])
    for label, row in zip(axis.get_yticklabels(), reversed(rows), strict=True):
        label.set_fontweight("bold" if row.best else "normal")
    lowest = min(0.0, *(row.score if row.low is None else row.low for row in rows))  # correlations can be negative
    axis.set(title=title, xlabel="percent", xlim=(lowest - 2, 110), ylim=(-0.6, len(rows) - 0.4))
    axis.grid(axis="x", alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def bars(report: dict[str, Any], task: str) -> list[Bar]:
    """The rows of a task of results.json for its picture, in the order of the table."""
    top, out = remarks.best(report, task), []
    for at, row in enumerate(report["rows"]):
        if score := row["scores"].get(task):
            low, high = (None if score.get(key) is None else 100 * score[key] for key in ("low", "high"))
            out.append(Bar(row["name"], 100 * score["score"], low, high, at in top, "baseline" in row["identity"]))
    return out
