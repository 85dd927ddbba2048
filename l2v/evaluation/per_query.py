"""The main score of every query of a retrieval task, kept next to mteb's results, which hold only means."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mteb.abstasks import AbsTask, AbsTaskRetrieval
from mteb.cache import ResultCache

from l2v.files import replace_text

# mteb's name of a mean, and that of the value of one query.
MEASURES = {"ndcg_at": "ndcg_cut", "map_at": "map_cut", "recall_at": "recall", "precision_at": "P"}
ROUNDING = 2e-5  # mteb rounds a mean to five digits


def place(cache: ResultCache, task: AbsTask, model: Any) -> Path:
    """The file of a model's scores by query on a task: below `queries/`, as mteb's result is below `results/`."""
    found = Path(cache.get_task_result_path(task.metadata.name, model.mteb_model_meta))
    return cache.cache_path / "queries" / found.relative_to(cache.cache_path / "results")


@contextlib.contextmanager
def recorded(task: AbsTask, file: Path) -> Iterator[None]:
    """Inside, an evaluation of a retrieval task writes the main score of its queries to `file`, a cell at a time.

    mteb passes them to `task_specific_scores`, which tasks may override; its result is not changed.
    """
    measure = _measure(task)
    if measure is None or not isinstance(task, AbsTaskRetrieval):
        yield
        return
    original = task.task_specific_scores

    def keep(scores: Mapping[str, Mapping[str, float]], *rest: Any, hf_split: str, hf_subset: str, **more: Any) -> Any:
        cells = _cells(file, task) | {
            f"{hf_split}/{hf_subset}": {query: found[measure] for query, found in scores.items()}
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        facts = {"revision": task.metadata.revision, "metric": task.metadata.main_score, "cells": cells}
        replace_text(file, json.dumps(facts, ensure_ascii=False) + "\n")
        return original(scores, *rest, hf_split=hf_split, hf_subset=hf_subset, **more)

    task.task_specific_scores = keep  # of this instance only
    try:
        yield
    finally:
        del task.task_specific_scores  # the class's own is visible again


def read(file: Path, task: AbsTask, means: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The scores by query of every cell in `means`; empty if one is missing or its mean is not the cell's score.

    So results of an earlier version, or a task with another main score, have no interval rather than a wrong one.
    """
    cells = _cells(file, task)
    found = {cell: cells[cell] for cell in means if cells.get(cell)}
    same = all(abs(sum(x.values()) / len(x) - means[cell]) <= ROUNDING for cell, x in found.items())
    return found if same and len(found) == len(means) else {}


def _measure(task: AbsTask) -> str | None:
    match = re.fullmatch(r"(\w+_at)_(\d+)", task.metadata.main_score)
    return f"{MEASURES[match[1]]}_{match[2]}" if match and match[1] in MEASURES else None


def _cells(file: Path, task: AbsTask) -> dict[str, dict[str, float]]:
    """The cells in a file; none if it does not exist, is damaged, or was written for other data."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if (found["revision"], found["metric"]) == (task.metadata.revision, task.metadata.main_score):
            return dict(found["cells"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {}
