"""Benchmark names on the command line: `seb-da`, `scandinavian`, names of mteb tasks and benchmarks, `local:DIR`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources

import mteb
from mteb.abstasks import AbsTask

from l2v.errors import RecipeError
from l2v.evaluation.local import LocalBenchmark, local_benchmark
from l2v.evaluation.seb import SEB_DA

SCANDINAVIAN = "MTEB(Scandinavian, v1)"
LOCAL = "local:"


@dataclass
class Selection:
    """Tasks in order, those from files first, each once; for each failed task the reason; notes on skipped rows.

    local: names of the benchmarks made from files; they prefix the names of their tasks.
    """

    names: list[str]
    tasks: list[AbsTask] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    local: list[str] = field(default_factory=list)


def seb_da() -> list[AbsTask]:
    """The twelve Danish tasks of SEB from the installed mteb, restricted to the split and language that SEB scores."""
    return [mteb.get_task(task.name, hf_subsets=[task.subset], eval_splits=[task.split]) for task in SEB_DA]


def select(names: Sequence[str], data: str | None = None) -> Selection:
    """Resolve names to tasks; a task named twice (by a benchmark and by name) is run once, with the larger
    selection.

    data: the folder of the files of a local manifest.

    Raises:
        RecipeError: if nothing has the name; the message gives the nearest name.
        UserError: if a local folder does not exist.
    """
    out = Selection(list(names))
    for name in names:
        for task in _tasks(name, data, out):
            at = next((i for i, other in enumerate(out.tasks) if other.metadata.name == task.metadata.name), None)
            if at is None:
                out.tasks.append(task)
            elif len(task.hf_subsets) * len(task.eval_splits) > len(out.tasks[at].hf_subsets) * len(
                out.tasks[at].eval_splits
            ):
                out.tasks[at] = task
    # own tasks first: they decide, and they are usually the quickest
    out.tasks.sort(key=lambda task: not any(task.metadata.name.startswith(f"{name}-") for name in out.local))
    return out


def _tasks(name: str, data: str | None, out: Selection) -> list[AbsTask]:
    if name == "seb-da":
        return seb_da()
    if name == "scandinavian":
        return list(mteb.get_benchmark(SCANDINAVIAN).tasks)
    if name.startswith(LOCAL):
        local = _local(name.removeprefix(LOCAL), data)
        out.failed |= local.failed
        out.notes += local.notes
        out.local.append(local.name)
        return local.tasks
    benchmarks = {b.name for b in mteb.get_benchmarks()}
    if name in benchmarks:
        return list(mteb.get_benchmark(name).tasks)
    try:
        return [mteb.get_task(name)]
    except KeyError:
        known = [
            "seb-da",
            "scandinavian",
            *benchmarks,
            *(task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)),
        ]
        near = difflib.get_close_matches(name, known, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else "use seb-da, scandinavian, a name in mteb, or local:FOLDER"
        raise RecipeError(f"--benchmark {name}: no task or benchmark of mteb {mteb.__version__}; {hint}") from None


def _local(source: str, data: str | None) -> LocalBenchmark:
    if source == "sample":  # ships with l2v
        return local_benchmark(str(resources.files("l2v") / "data" / "sample_da"))
    return local_benchmark(source, data)
