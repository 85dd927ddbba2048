"""Uncertainty of scores: bootstrap intervals of a mean over queries, and paired comparisons on the same queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Cells = Mapping[str, Mapping[str, float]]
"""Scores by query of a task: for each cell (`split/subset`) the value of every query id."""

DRAWS = 10_000
MAX_DRAWN = 200_000_000  # values drawn in total: of very large sets fewer draws are taken, at least MIN_DRAWS
MIN_DRAWS = 1_000
PIECE = 4_000_000  # values drawn at a time, so that memory does not grow with the set


def bootstrap_interval(
    values: np.ndarray | Sequence[np.ndarray], *, seed: int = 0, draws: int = DRAWS, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over queries (Efron 1979).

    values: float [queries], or one such array for each cell; then it is the interval of the mean of the cells' means, and
    the queries of a cell are drawn from that cell. For a paired test pass the differences.

    Raises:
        ValueError: if a cell has no value.
    """
    cells = [values] if isinstance(values, np.ndarray) else list(values)
    if not cells or any(len(cell) == 0 for cell in cells):
        raise ValueError("an interval needs at least one value")
    draws = min(draws, max(MIN_DRAWS, MAX_DRAWN // sum(map(len, cells))))
    generator = np.random.default_rng(seed)
    means = sum(_means(cell, generator, draws) for cell in cells) / len(cells)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _means(values: np.ndarray, generator: np.random.Generator, draws: int) -> np.ndarray:
    """Means of resampled values: float64 [draws]. The pieces continue one stream, so their size changes no number."""
    size = max(1, PIECE // len(values))
    counts = [min(size, draws - at) for at in range(0, draws, size)]
    return np.concatenate([values[generator.integers(0, len(values), (n, len(values)))].mean(axis=1) for n in counts])


def compare(first: np.ndarray | Sequence[np.ndarray], second: np.ndarray | Sequence[np.ndarray]) -> dict[str, float]:
    """Paired bootstrap of two encoders on the same queries (Koehn 2004): mean difference, and its 95% interval.

    first, second: float [queries] in the same order, or one array for each cell.
    """
    pairs = [(first, second)] if isinstance(first, np.ndarray) else list(zip(first, second, strict=True))
    differences = [np.asarray(a) - np.asarray(b) for a, b in pairs]
    low, high = bootstrap_interval(differences)
    return {"difference": float(np.mean([d.mean() for d in differences])), "low": low, "high": high}


def interval(cells: Cells) -> tuple[float, float]:
    """The interval of a task's score, which is the mean over its cells."""
    return bootstrap_interval([np.array(list(queries.values())) for queries in cells.values()])


def paired(first: Cells, second: Cells) -> dict[str, float] | None:
    """`compare` of two encoders on a task; None if they were not scored on the same queries."""
    if not first or first.keys() != second.keys() or any(first[cell].keys() != second[cell].keys() for cell in first):
        return None
    arrays = [
        (np.array(list(first[cell].values())), np.array([second[cell][query] for query in first[cell]]))
        for cell in first
    ]
    return compare([a for a, _ in arrays], [b for _, b in arrays])


def comparisons(rows: Sequence[Any], task: str) -> list[dict[str, Any]]:
    """The best row of a task against each other row, best first: better, than, difference, low, high (shares, 0 to 1).

    rows: with `name` and `scores`. Rows without scores by query, or on other queries, are skipped.
    """
    found = [row for row in rows if task in row.scores and row.scores[task].queries]
    found.sort(key=lambda row: -row.scores[task].score)
    out = []
    for other in found[1:]:
        result = paired(found[0].scores[task].queries, other.scores[task].queries)
        if result is not None:
            out.append({"better": found[0].name, "than": other.name, **result})
    return out
