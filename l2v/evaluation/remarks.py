"""What a results.json says about its scores: which tasks are the user's own, the best rows, intervals, comparisons.

Used by the tables of `l2v eval`, by the report and by the model card. Works on results.json as plain values, so also on
those of earlier versions, which have no intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

TFIDF = "tfidf"
BOOTSTRAP = "95% intervals: bootstrap over queries"
FEW = 30  # queries; of fewer, resampling sees too little of what other queries would bring


def own_tasks(report: dict[str, Any]) -> list[str]:
    """Tasks made from files, in the order of the report."""
    return [name for name in report["tasks"] if benchmark_of(report, name)]


def benchmark_of(report: dict[str, Any], task: str) -> str:
    """The local benchmark of a task; empty for a task of mteb."""
    return next((prefix for prefix in report.get("local", ()) if task.startswith(f"{prefix}-")), "")


def short(report: dict[str, Any], task: str) -> str:
    """A task's name without that of its local benchmark."""
    return task.removeprefix(f"{benchmark_of(report, task)}-")


def best(report: dict[str, Any], task: str) -> list[int]:
    """Indices of the rows with the highest score; none if fewer than two rows have one."""
    scores = {at: row["scores"][task]["score"] for at, row in enumerate(report["rows"]) if task in row["scores"]}
    return [at for at, score in scores.items() if score == max(scores.values())] if len(scores) > 1 else []


def interval(score: dict[str, Any]) -> str:
    """`47.62 to 60.01` in percent; empty for a score without an interval."""
    return f"{100 * score['low']:.2f} to {100 * score['high']:.2f}" if score.get("low") is not None else ""


def counts(report: dict[str, Any], tasks: Sequence[str]) -> str | None:
    """What the intervals are, with the queries of each task; None where no task has one."""
    found = {
        name: count for name in tasks for row in report["rows"] if (count := row["scores"].get(name, {}).get("queries"))
    }
    if not found:
        return None
    few = f" Fewer than {FEW} queries make an interval too narrow." if min(found.values()) < FEW else ""
    return f"{BOOTSTRAP} ({', '.join(f'{short(report, name)}: {count:,}' for name, count in found.items())}).{few}"


def comparisons(report: dict[str, Any], tasks: Sequence[str]) -> list[str]:
    """A sentence for each pair of best row and other row of a task."""
    out = []
    names = {row["name"] for row in report["rows"]}
    for task in tasks:
        for found in report.get("comparisons", {}).get(task, ()):
            if not {found["better"], found["than"]} <= names:
                continue  # a card shows some of the rows
            if not any(found[key] for key in ("difference", "low", "high")):
                out.append(
                    f"{short(report, task)}: {found['better']} and {found['than']} score the same on every query."
                )
                continue
            clear = "" if found["low"] > 0 else "; the difference may be chance"
            out.append(
                f"{short(report, task)}: {found['better']} is {100 * found['difference']:.2f} above {found['than']} "
                f"(paired bootstrap, 95%: {100 * found['low']:+.2f} to {100 * found['high']:+.2f}){clear}."
            )
    return out


def lexical(report: dict[str, Any], tasks: Sequence[str]) -> str | None:
    """One sentence if TF-IDF scores higher than every encoder on some of the tasks; None if it does not."""
    baselines = [row for row in report["rows"] if row["identity"].get("baseline") == TFIDF]
    encoders = [row for row in report["rows"] if row["identity"].get("baseline") != TFIDF]
    parts = []
    for task in tasks:
        lexical_scores = [row["scores"][task]["score"] for row in baselines if task in row["scores"]]
        others = [(row["scores"][task]["score"], row["name"]) for row in encoders if task in row["scores"]]
        if lexical_scores and others and lexical_scores[0] > max(others)[0]:
            score, name = max(others)
            parts.append(f"{short(report, task)} {100 * lexical_scores[0]:.2f} against {100 * score:.2f} of {name}")
    return beaten(parts)


def beaten(parts: Sequence[str]) -> str | None:
    """The sentence on TF-IDF from `NAME SCORE against SCORE of ROW` parts."""
    return f"TF-IDF, which compares words, scores higher: {'; '.join(parts)}." if parts else None
