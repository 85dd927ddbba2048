"""What mining found: a table and a picture of the scores of positives, negatives and dropped candidates."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from l2v.mining.choose import REASONS
from l2v.mining.shards import writing

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
EXAMPLES = 10
KINDS = {
    "positives": ("#1b7f5c", "positives"),
    "kept": ("#2f5fa8", "negatives that were kept"),
    "close": ("#c2452d", "dropped: too close to the positive"),
}


@dataclass
class Found:
    """Scores and counts, collected row by row."""

    scores: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    dropped: Counter = field(default_factory=Counter)
    per_row: Counter = field(default_factory=Counter)
    origins: Counter = field(default_factory=Counter)
    examples: dict[str, tuple[float, str, str, str, float]] = field(default_factory=dict)

    def add(self, row: dict[str, Any]) -> None:
        """Add one row of a shard."""
        out = row["row"]
        self.scores["positives"].append(out["positive_score"])
        self.scores["kept"] += out["negative_scores"]
        self.scores["close"] += row["close"]
        self.dropped.update(row["dropped"])
        self.per_row[len(out["negatives"])] += 1
        self.origins.update(out["negative_from"])
        if row["closest"]:
            text, score = row["closest"]
            found = (out["positive_score"] - score, out["query"], out["positive"], text, score)
            # One example per document: a poor encoder ranks the same few above everything.
            self.examples[text] = min(found, self.examples.get(text, found))
            self.examples = {e[3]: e for e in sorted(self.examples.values())[:EXAMPLES]}

    @property
    def poor(self) -> str | None:
        """The note to print if many rows got no negative, else None."""
        share = self.per_row[0] / self.per_row.total()
        if share < 0.2:
            return None
        return (
            f"{100 * share:.0f}% of the rows got no negative, because too many documents score like their positives: use a "
            "better encoder or a --cross-encoder, search deeper (--depth), or raise --relative"
        )

    def table(self, facts: dict[str, Any]) -> str:
        """Markdown."""
        lines = ["# Mined negatives", "", *(f"- {key}: {value}" for key, value in facts.items()), "", "## Scores", ""]
        names = ["", "count", "mean", *(f"{int(100 * q)} %" for q in QUANTILES)]
        lines += [_row(names), _row(["-"] * len(names))]
        for kind, (_, label) in KINDS.items():
            values = np.asarray(self.scores[kind])
            cells = [f"{v:.3f}" for v in (values.mean(), *np.quantile(values, QUANTILES))] if len(values) else []
            lines.append(_row([label, f"{len(values):,}", *cells, *[""] * (len(names) - 2 - len(cells))]))
        rows = self.per_row.total()
        lines += ["", "## Rows", "", _row(["negatives of a row", "rows", "share"]), _row(["-"] * 3)]
        lines += [_row([n, f"{c:,}", f"{100 * c / rows:.1f} %"]) for n, c in sorted(self.per_row.items())]
        lines += ["", "## Dropped candidates", "", _row(["reason", "candidates"]), _row(["-"] * 2)]
        lines += [_row([reason, f"{self.dropped[reason]:,}"]) for reason in REASONS]
        lines += ["", "Kept, by the search that found them first: "]
        lines[-1] += ", ".join(f"{name} {count:,}" for name, count in sorted(self.origins.items())) or "none"
        if self.examples:
            lines += [
                "",
                "## Closest dropped candidates",
                "",
                "They are often true answers. If not, the limit is too low or the encoder too poor.",
            ]
            lines += ["", _row(["query", "positive", "dropped", "score", "above the positive by"]), _row(["-"] * 5)]
            lines += [_row([q, p, t, f"{s:.3f}", f"{-under:+.3f}"]) for under, q, p, t, s in self.examples.values()]
        return "\n".join(lines) + "\n"

    def draw(self, path: Path, measure: str) -> None:
        """The distributions as a picture."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        everything = np.concatenate([np.asarray(values) for values in self.scores.values()])
        bins = np.linspace(everything.min() - 1e-6, everything.max() + 1e-6, 61)
        figure, axis = pyplot.subplots(figsize=(7.2, 3.8), layout="constrained")
        for kind, (color, label) in KINDS.items():
            values = self.scores[kind]
            if values:
                axis.hist(
                    values, bins, density=True, histtype="stepfilled", color=color, alpha=0.35, edgecolor=color,
                    label=f"{label} ({len(values):,})",
                )  # fmt: skip
        axis.set(xlabel=measure, ylabel="density")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=9)
        with writing(path):
            figure.savefig(path, dpi=150)
        pyplot.close(figure)


def _row(cells: list) -> str:
    def clean(cell) -> str:
        text = " ".join(str(cell).split()).replace("|", "\\|")
        return text if len(text) <= 120 else text[:119] + "…"

    return f"| {' | '.join(map(clean, cells))} |"
