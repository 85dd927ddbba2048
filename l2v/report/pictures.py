"""Pictures of a report: SVG in the page's colours, light and dark, and PNG next to the Markdown."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2v.evaluation.plots import COLORS, draw_loss
from l2v.report.space import Map
from l2v.runs.facts import StageFacts

# The page replaces these colours. Contrast with both backgrounds is at least 3 to 1 (WCAG 2.2, 1.4.11).
TOKENS = {
    "#222222": "currentColor",
    COLORS["mntp"]: "var(--blue)",
    COLORS["simcse"]: "var(--orange)",
    COLORS["supervised"]: "var(--green)",
    "#555555": "var(--grey)",
    "#8a5a9e": "var(--violet)",
    "#b0427a": "var(--pink)",
}
POINTS = [color for color in TOKENS if color != "#222222"]
SHAPES = "os^Dv"
MAX_TOPICS = len(POINTS) * len(SHAPES)  # more would share markers, so they get no legend


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


def topics(run: str, found: Map) -> Picture:
    """A dot for each text, coloured and shaped by topic, with a legend."""
    names = list(dict.fromkeys(found.labels))

    def draw(axis: Any) -> None:
        for at, name in enumerate(names):
            mine = [i for i, label in enumerate(found.labels) if label == name]
            x, y = found.places_N2[mine, 0], found.places_N2[mine, 1]
            color, shape = POINTS[at % len(POINTS)], SHAPES[at // len(POINTS) % len(SHAPES)]
            axis.plot(x, y, shape, color=color, markersize=3.5, alpha=0.8, linewidth=0, label=name)
        axis.set_xticks([])
        axis.set_yticks([])
        if len(names) <= MAX_TOPICS:
            axis.legend(
                frameon=False, fontsize=9, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.01), columnspacing=1,
                handletextpad=0.1,
            )  # fmt: skip

    text = f"{run}: map of {len(found.labels)} texts of {len(names)} topics; {found.summary()}"
    return Picture(f"{run}-map", text, (4.2, 4.0 + 0.2 * min(len(names), MAX_TOPICS) / 3), draw)
