"""Pictures of a report: SVG in the page's colours, light and dark, and PNG next to the Markdown."""

from __future__ import annotations

import io
import re
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from l2v.evaluation import remarks
from l2v.evaluation.plots import COLORS, Bar, bars, draw_loss, draw_scores
from l2v.report.space import Map
from l2v.runs.facts import RunFacts, StageFacts

# The page replaces these colours. Contrast with both backgrounds is at least 3 to 1 (WCAG 2.2, 1.4.11).
TOKENS = {
    "#222222": "currentColor",
    COLORS["mntp"]: "var(--blue)",
    COLORS["simcse"]: "var(--orange)",
    COLORS["supervised"]: "var(--green)",
    "#555555": "var(--grey)",
    "#8a5a9e": "var(--violet)",
    "#b0427a": "var(--pink)",
    "#1f8a8a": "var(--teal)",
    "#8f6b00": "var(--gold)",
    "#7a4b2a": "var(--brown)",
    "#5b6fd6": "var(--indigo)",
    "#c0392b": "var(--red)",
}
OTHER = "#555555"  # smaller topics, lines, baselines
POINTS = [color for color in TOKENS if color not in ("#222222", OTHER)]
SHAPES = "os^Dv"  # so that topics differ without colour too
MAX_COLORS = 10  # more cannot be told apart


@dataclass
class Picture:
    """One picture: its alternative text, and how it is drawn on a matplotlib axis."""

    name: str
    alt: str
    size: tuple[float, float]
    draw: Callable[[Any], None]

    def svg(self) -> str:
        """An <svg> element without external references."""
        buffer = io.StringIO()
        self._save(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
        text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
        text = text[text.index("<svg") :]
        for color, token in TOKENS.items():
            text = text.replace(color, token)
        # One page holds several pictures: unused ids are removed, the others get the picture's prefix.
        used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', text))
        text = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", text)
        own = f"{zlib.crc32(self.name.encode()):08x}-"
        text = re.sub(r'( id="|url\(#|href="#)(?=[^)"])', rf"\g<1>{own}", text)
        # The page sets the size and gives the alternative text.
        text = re.sub(r'( width="[\d.]+pt")|( height="[\d.]+pt")', "", text, count=2)
        return text.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)

    def png(self, file: Path) -> None:
        """The same on a white background."""
        self._save(file, format="png", dpi=150)

    def _save(self, out: Any, **options: Any) -> None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        ink = "#222222"
        style = {
            "svg.fonttype": "none", "svg.hashsalt": self.name, "font.family": "sans-serif", "font.size": 9,
            "text.color": ink, "axes.edgecolor": ink, "axes.labelcolor": ink, "axes.titlecolor": ink, "xtick.color": ink,
            "ytick.color": ink, "grid.color": ink,
        }  # fmt: skip
        with pyplot.rc_context(style):
            figure, axis = pyplot.subplots(figsize=self.size, layout="constrained")
            self.draw(axis)
            figure.savefig(out, **options)
            pyplot.close(figure)


def curve(run: str, stage: StageFacts) -> Picture | None:
    """Loss over steps; None before the first row of metrics."""
    train, held_out = stage.curve("loss"), stage.curve("eval_loss")
    if not train:
        return None
    (first, before), (last, after) = train[0], train[-1]
    text = f"{run}, {stage.name}: training loss from {before:.3f} at step {first} to {after:.3f} at step {last}"
    if held_out:
        text += f"; held-out loss from {held_out[0][1]:.3f} to {held_out[-1][1]:.3f}"
    return Picture(
        f"{run}-{stage.name}", text + ".", (3.9, 2.9), lambda axis: draw_loss(axis, stage.name, stage.metrics)
    )


HELD_OUT = {"eval_ndcg_at_10": "held-out nDCG@10", "eval_accuracy": "held-out accuracy"}


def quality(run: str, stage: StageFacts) -> Picture | None:
    """Held-out quality next to the loss: nDCG@10 of pairs or accuracy of masked tokens; None if not measured."""
    key = next((key for key in HELD_OUT if stage.curve(key)), None)
    if key is None:
        return None
    rows, name = stage.curve(key), HELD_OUT[key]

    def draw(axis: Any) -> None:
        axis.plot(*zip(*rows, strict=True), "o-", color=COLORS.get(stage.name, "#555555"), markersize=4, linewidth=1.6)
        axis.set(title=stage.name, xlabel="step", ylabel=name)
        axis.set_ylim(bottom=0)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)

    (first, before), (last, after) = rows[0], rows[-1]
    text = f"{run}, {stage.name}: {name} from {before:.3f} at step {first} to {after:.3f} at step {last}."
    return Picture(f"{run}-{stage.name}-held-out", text, (3.9, 2.9), draw)


def own_scores(run: RunFacts) -> list[Picture]:
    """A picture of the scores of each of the user's own tasks, and of the quickstart's."""
    panels: list[tuple[str, list[Bar]]] = []
    if quick := run.quickstart:
        top = max(row["ndcg_at_10"] for row in quick["rows"])
        quick_bars = [
            Bar(
                row["name"], 100 * row["ndcg_at_10"], 100 * row["ndcg_low"], 100 * row["ndcg_high"],
                row["ndcg_at_10"] == top, row["name"].startswith("TF-IDF"),
            )
            for row in quick["rows"]
        ]  # fmt: skip
        panels.append(("held-out questions, nDCG@10", quick_bars))
    if report := run.evaluation:
        for task in remarks.own_tasks(report):
            if rows := bars(report, task):
                panels.append((remarks.short(report, task), rows))
    return [_scores(run.name, title, rows) for title, rows in panels]


def _scores(run: str, title: str, rows: list[Bar]) -> Picture:
    best = max(rows, key=lambda row: row.score)
    text = f"{run}: {title}, in percent, of {len(rows)} rows; the best is {best.name} with {best.score:.2f}."
    return Picture(
        f"{run}-scores-{title}", text, (4.6, 1.0 + 0.3 * len(rows)), lambda axis: draw_scores(axis, title, rows)
    )


def map_picture(run: str, found: Map) -> Picture:
    """A dot for each text, coloured and shaped by topic, with a legend; the smaller topics beyond ten share one colour."""
    labels = found.texts.labels
    names = [name for name, _ in Counter(labels).most_common()]
    shown = names if len(names) <= MAX_COLORS else names[: MAX_COLORS - 1]
    rest = [name for name in names if name not in shown]

    def draw(axis: Any) -> None:
        if found.texts.pairs:
            half = len(labels) // 2
            lines = np.full((half, 3, 2), np.nan)  # a gap after each line
            lines[:, 0], lines[:, 1] = found.places_N2[:half], found.places_N2[half:]
            axis.plot(*lines.reshape(-1, 2).T, color=OTHER, linewidth=0.5, alpha=0.4)
        groups = [(f"{len(rest)} other topics", OTHER, ".", rest)] if rest else []
        groups += [(name, POINTS[at], SHAPES[at % len(SHAPES)], [name]) for at, name in enumerate(shown)]
        for name, color, shape, members in groups:
            mine = [i for i, label in enumerate(labels) if label in members]
            x, y = found.places_N2[mine, 0], found.places_N2[mine, 1]
            axis.plot(x, y, shape, color=color, markersize=3.5, alpha=0.8, linewidth=0, label=name)
        axis.set_xticks([])
        axis.set_yticks([])
        if len(groups) > 1:
            axis.legend(
                frameon=False, fontsize=9, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.01), columnspacing=1,
                handletextpad=0.1,
            )  # fmt: skip

    what = f"{len(labels) // 2} queries and their answers" if found.texts.pairs else f"{len(labels)} texts"
    topics = f" of {len(names)} topics" if len(names) > 1 and not found.texts.pairs else ""
    text = f"{run}: map of {what}{topics}. {found.summary}"
    return Picture(f"{run}-map", text, (4.2, 4.0 + 0.2 * min(len(names), MAX_COLORS) / 3), draw)
