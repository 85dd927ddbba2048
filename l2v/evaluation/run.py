"""Run tasks with models through mteb: results are kept as they arrive, and a task that fails gives one sentence."""

from __future__ import annotations

import contextlib
import io
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import mteb
from mteb.abstasks import AbsTask
from mteb.cache import ResultCache
from mteb.results import TaskResult

from l2v.errors import UserError, first_line
from l2v.evaluation import per_query

_UNREACHABLE = (
    "ConnectionError", "ConnectError", "ConnectTimeout", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "ProxyError",
    "ReadTimeout", "MaxRetryError",
)  # fmt: skip


@dataclass
class Score:
    """The result of one model on one task: the main score (0 to 1) of every cell, keyed `split/subset`.

    score: their mean, as mteb has it. metric: the name of the main score. cached: taken from an earlier run. queries: for a
    retrieval task, the main score of every query by cell (`l2v.evaluation.intervals`); empty for other tasks.
    """

    score: float
    cells: dict[str, float]
    metric: str
    type: str
    revision: str
    seconds: float
    cached: bool
    queries: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass
class Row:
    """One model: its scores by task, a sentence for each task that failed, and what determines its vectors."""

    name: str
    identity: dict[str, Any]
    scores: dict[str, Score] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    empty_texts: int = 0


def run_model(
    model: Any, tasks: Sequence[AbsTask], folder: Path, *, log: Callable[[str], None] = print, again: bool = False
) -> Row:
    """All tasks with one model; results are kept in `folder`, in mteb's layout, and reused next time.

    A kept result is reused if model, prompts and the data's revision are the same. again: recompute everything.
    log: called with a line for each task.
    """
    row = Row(model.name, model.identity)
    with _offline_after_failure() as stop_asking:
        _run(model, tasks, row, ResultCache(cache_path=folder), log, again, stop_asking)
    row.empty_texts = model.empty
    model.close()
    return row


def _run(
    model: Any,
    tasks: Sequence[AbsTask],
    row: Row,
    cache: ResultCache,
    log: Callable[[str], None],
    again: bool,
    stop_asking: Callable[[], None],
) -> None:
    for at, task in enumerate(tasks, 1):
        name = task.metadata.name
        began = time.perf_counter()
        kept = None if again else _kept(cache, task, model)
        try:
            with _quiet():
                if kept is None:
                    _evaluate(model, task, cache, again)
                # as written to the file, so that the next run gives the same
                result = kept or _kept(cache, task, model)
            score = row.scores[name] = _score(task, result, time.perf_counter() - began, kept is not None)
            score.queries = per_query.read(per_query.place(cache, task, model), task, score.cells)
        except KeyboardInterrupt:
            model.close()
            raise
        except Exception as error:
            row.failed[name] = sentence(name, error)
            if _unreachable(error):
                stop_asking()
            log(f"[{at}/{len(tasks)}] {row.failed[name]}")
            continue
        how = "kept" if score.cached else f"{score.seconds:.0f} s"
        log(f"[{at}/{len(tasks)}] {model.name}: {name} {score.metric} {100 * score.score:.2f} ({how})")


def sentence(name: str, error: BaseException) -> str:
    """One sentence on why a task was skipped."""
    if isinstance(error, UserError):
        return f"{name}: {error}; skipped"
    if _unreachable(error):
        return f"{name}: its data is not on this machine and the hub cannot be reached; skipped"
    if type(error).__name__ in ("DatasetNotFoundError", "RepositoryNotFoundError", "GatedRepoError"):
        return f"{name}: not found on the hub, or it needs a login (hf auth login); skipped"
    if type(error).__name__ == "OutOfMemoryError":
        return f"{name}: out of memory; give a smaller --batch-tokens; skipped"
    return f"{name}: {type(error).__name__}: {first_line(error)}; skipped"


def _unreachable(error: BaseException | None) -> bool:
    for _ in range(10):
        if error is None:
            return False
        if type(error).__name__ in _UNREACHABLE:
            return True
        error = error.__cause__ or error.__context__
    return False


def _evaluate(model: Any, task: AbsTask, cache: ResultCache, again: bool) -> None:
    with per_query.recorded(task, per_query.place(cache, task, model)):
        mteb.evaluate(
            model,
            task,
            cache=cache,
            overwrite_strategy="always" if again else "only-missing",
            co2_tracker=False,
            show_progress_bar=False,
            encode_kwargs={"batch_size": model.batch},
        )


def _kept(cache: ResultCache, task: AbsTask, model: Any) -> TaskResult | None:
    """A complete result for the same data; a result for other data is removed, so that mteb does not mix the two."""
    path = cache.get_task_result_path(task.metadata.name, model.mteb_model_meta)
    if not path.is_file():
        return None
    try:
        found = TaskResult.from_disk(path)
    except Exception:  # truncated while it was written
        path.unlink()
        return None
    if found.dataset_revision != task.metadata.revision:
        path.unlink()
        return None
    return None if found.get_missing_evaluations(task) else found


def _score(task: AbsTask, result: TaskResult, seconds: float, cached: bool) -> Score:
    metadata = task.metadata
    cells = {
        f"{split}/{entry['hf_subset']}": float(entry["main_score"])
        for split in task.eval_splits
        for entry in result.scores[split]
        if entry["hf_subset"] in task.hf_subsets
    }
    return Score(
        score=sum(cells.values()) / len(cells),
        cells=cells,
        metric=metadata.main_score,
        type=metadata.type,
        revision=result.dataset_revision,
        seconds=round(result.evaluation_time or 0.0, 1) if cached else round(seconds, 1),
        cached=cached,
    )


@contextlib.contextmanager
def _quiet():
    """Silence the libraries' progress bars and warnings. The encoding bar writes to sys.__stderr__ and stays visible."""
    loggers = [logging.getLogger(name) for name in ("mteb", "huggingface_hub", "datasets")]
    levels = [logger.level for logger in loggers]
    silent = io.StringIO()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _offline_after_failure():
    """Gives a function that switches the hub off: without a network each task would wait for its retries."""
    places = (huggingface_hub.constants, datasets.config)
    before = [place.HF_HUB_OFFLINE for place in places]

    def stop() -> None:
        for place in places:
            place.HF_HUB_OFFLINE = True

    try:
        yield stop
    finally:
        for place, was in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = was
