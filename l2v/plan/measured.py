"""Committed measurements of the training step: the share of the roofline prediction that a run on a GPU reached."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def factors(key: str, predict: Callable[[dict[str, Any]], float | None], folder: Path = RESULTS) -> dict[str, float]:
    """Measured over predicted tokens/s of l2v's training step, by objective, from benchmarks/results/KEY/train_step.json.

    predict: tokens/s of a row, from {"objective", "tokens" of a step, "recompute" (None if not recorded)}. Empty without
    such a file, as in an installed package; incomplete rows are skipped.
    """
    try:
        data = json.loads((folder / key / "train_step.json").read_text(encoding="utf-8"))
        facts, rows = data.get("facts", {}), data["results"]
    except (OSError, ValueError, KeyError, AttributeError):
        return {}
    if facts.get("model") != "8b" or facts.get("smoke") or not isinstance(rows, list):
        return {}
    found = {}
    for row in rows:
        if not isinstance(row, dict):
            continue
        measured, objective = row.get("facts") or {}, row.get("workload")
        rate, tokens = measured.get("tokens_per_second"), measured.get("tokens")
        if row.get("provider") != "l2v" or not objective or not rate or not tokens:
            continue
        setting = str(measured.get("setting", ""))
        how = next((how for how in ("none", "cheap", "layer") if f"recompute {how}" in setting), None)
        if predicted := predict({"objective": objective, "tokens": tokens, "recompute": how}):
            found[objective] = rate / predicted
    return found
