"""Rows to results.json, tables and pictures: own tasks first, intervals, the mean of the twelve Danish SEB tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from l2v.evaluation import remarks
from l2v.evaluation.intervals import comparisons, interval
from l2v.evaluation.plots import bars, draw_scores
from l2v.evaluation.run import Row
from l2v.evaluation.seb import BY_NAME, SEB_DA

TYPE_COLORS = {
    "Retrieval": "#3b6ea8",
    "Classification": "#c2703d",
    "BitextMining": "#3f8f5b",
    "Clustering": "#8a5a9e",
    "STS": "#b0427a",
}


def seb_mean(row: Row) -> float | None:
    """Mean of the twelve Danish tasks, each by the cell that SEB scores; None if one is missing."""
    cells = [seb_cell(row, task.name) for task in SEB_DA]
    found = [cell for cell in cells if cell is not None]
    return sum(found) / len(found) if len(found) == len(SEB_DA) else None


def seb_cell(row: Row, name: str) -> float | None:
    """A task's score by SEB's cell, or None if the row has none."""
    task, score = BY_NAME[name], row.scores.get(name)
    return score.cells.get(f"{task.split}/{task.subset}") if score else None


def means(row: Row, tasks: Sequence[str]) -> dict[str, float | None]:
    """`seb_da`, mteb's `task` (mean of all tasks) and `task_type` (mean of the means by type), 0 to 1.

    None if a task of the mean is missing, as in mteb's own tables.
    """
    by_type: dict[str, list[float]] = {}
    for name in tasks:
        if score := row.scores.get(name):
            by_type.setdefault(score.type, []).append(score.score)
    scores = [score for group in by_type.values() for score in group]
    whole = bool(tasks) and len(scores) == len(tasks)
    return {
        "seb_da": seb_mean(row),
        "task": sum(scores) / len(scores) if whole else None,
        "task_type": sum(sum(group) / len(group) for group in by_type.values()) / len(by_type) if whole else None,
    }


def as_json(rows: Sequence[Row], tasks: Sequence[str], facts: dict[str, Any]) -> dict[str, Any]:
    """results.json: facts of the run, each row with scores, means and failures, and comparisons of rows.

    Scores of retrieval tasks have `low` and `high`, the 95% bootstrap interval over `queries` queries. Means are those of the
    tasks of mteb, or of the local tasks if there are no others.
    """
    local = facts.get("local", ())
    shared = [name for name in tasks if not any(name.startswith(f"{prefix}-") for prefix in local)] or list(tasks)
    plain = [asdict(row) | {"means": means(row, shared)} for row in rows]
    for row in plain:
        for score in row["scores"].values():
            cells = score.pop("queries")
            if cells:
                score["low"], score["high"] = interval(cells)
                score["queries"] = sum(map(len, cells.values()))
    found = {name: compared for name in tasks if (compared := comparisons(rows, name))}
    return facts | {"tasks": list(tasks), "rows": plain, "comparisons": found}


def markdown(report: dict[str, Any]) -> str:
    """The tables: a row for each model, a column for each task; local tasks first, then what is missing and why.

    The best score of a column is bold.
    """
    own = remarks.own_tasks(report)
    others = [name for name in report["tasks"] if name not in own]
    lines = []
    if own:
        lines += [*_table(report, own, with_means=not others), ""]
        lines += [f"- {text}" for text in notes(report, own)] + [""]
    if others:
        lines += [*_table(report, others, with_means=True), ""]
        lines += [f"- {text}" for text in notes(report, others, compared=False)] + [""]
    metrics = dict.fromkeys(
        f"{score['metric']} ({score['type']})" for row in report["rows"] for score in row["scores"].values()
    )
    if metrics:
        lines += [f"Scores in percent: {', '.join(metrics)}. Bold: the best of a column."]
    failed = dict.fromkeys(text for row in report["rows"] for text in row["failed"].values())
    failed |= dict.fromkeys(report.get("not_built", {}).values())
    if failed:
        lines += ["", f"Skipped ({count_failed(report)} results):", *(f"- {text}" for text in failed)]
    if report.get("notes"):
        lines += ["", *(f"- {note}" for note in report["notes"])]
    return "\n".join(lines).strip() + "\n"


def notes(report: dict[str, Any], tasks: Sequence[str], *, compared: bool = True) -> list[str]:
    """Sentences below a table: TF-IDF if it wins, what the intervals are, the best row against each other one."""
    found = [text] if (text := remarks.lexical(report, tasks)) else []
    if compared and (text := remarks.counts(report, tasks)):
        found.append(text)
    return found + (remarks.comparisons(report, tasks) if compared else [])


def _table(report: dict[str, Any], tasks: Sequence[str], *, with_means: bool) -> list[str]:
    """Lines of a table; the interval of a score of the user's own tasks is in its cell."""
    rows = report["rows"]
    local = bool(remarks.own_tasks(report)) and tasks[0] in remarks.own_tasks(report)
    shown = [(key, head) for key, head in MEANS if any(row["means"][key] is not None for row in rows)]
    if len(tasks) == 1 or not with_means:
        shown = []
    columns = {name: [_cell(row, name, interval=local) for row in rows] for name in tasks}
    for name, cells in columns.items():
        for at in remarks.best(report, name):
            number, _, rest = cells[at].partition(" ")
            cells[at] = f"**{number}** {rest}".strip()
    averages = [[_percent(row["means"][key]) for row in rows] for key, _ in shown]
    names = [_column(name, report) for name in tasks]
    heads, body = [head for _, head in shown], list(columns.values())
    # A mean of someone else's tasks summarises them; of one's own tasks, each counts first.
    heads, body = (names + heads, body + averages) if local else (heads + names, averages + body)
    lines = ["| " + " | ".join(["", *heads]) + " |", "|-|" + "-:|" * len(heads)]
    return lines + [f"| {' | '.join([row['name'], *(cells[at] for cells in body)])} |" for at, row in enumerate(rows)]


def _cell(row: dict[str, Any], name: str, *, interval: bool) -> str:
    score = row["scores"].get(name)
    if score is None:
        return ""
    text = remarks.interval(score) if interval else ""
    return _percent(score["score"]) + (f" ({text})" if text else "")


MEANS = (("seb_da", "Mean of 12 (SEB da)"), ("task", "Mean of tasks"), ("task_type", "Mean of types"))


def count_failed(report: dict[str, Any]) -> int:
    """Number of missing results: one for each model and task that failed."""
    rows = report["rows"]
    return sum(len(row["failed"]) for row in rows) + len(report.get("not_built", {})) * max(len(rows), 1)


def write(report: dict[str, Any], folder: Path) -> None:
    """results.json, table.md, table.png and, with own tasks, own.png in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, ensure_ascii=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    (folder / "table.md").write_text(markdown(report), encoding="utf-8")
    if any(row["scores"] for row in report["rows"]):
        picture(report, folder / "table.png")
        own_picture(report, folder / "own.png")


def picture(report: dict[str, Any], out: Path) -> None:
    """A line for each model: a dot for each task, coloured by type, and a bar at the mean of the existing scores."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = report["rows"]
    figure, axis = pyplot.subplots(figsize=(8, 1.4 + 0.42 * len(rows)), layout="constrained")
    types: dict[str, None] = {}
    for at, row in enumerate(reversed(rows)):
        scores = [row["scores"][name] for name in report["tasks"] if name in row["scores"]]
        for score in scores:
            color = TYPE_COLORS.get(score["type"], "#555555")
            label = None if score["type"] in types else score["type"]
            types[score["type"]] = None
            axis.plot(100 * score["score"], at, "o", color=color, alpha=0.75, markersize=6, label=label)
        if scores:
            mean = sum(score["score"] for score in scores) / len(scores)
            axis.plot([100 * mean] * 2, [at - 0.3, at + 0.3], color="#222222", linewidth=2)
    axis.set_yticks(range(len(rows)), [row["name"] for row in reversed(rows)])
    lowest = min(
        100 * score["score"] for row in rows for score in row["scores"].values()
    )  # correlations can be negative
    axis.set(xlabel="score (percent); the bar is the mean of the tasks shown", xlim=(min(0, lowest) - 2, 102))
    axis.grid(axis="x", alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5)
    figure.savefig(out, dpi=150)
    pyplot.close(figure)


def own_picture(report: dict[str, Any], out: Path) -> None:
    """A panel for each of the user's own tasks; no file without own tasks."""
    panels = [
        (remarks.short(report, name), scored) for name in remarks.own_tasks(report) if (scored := bars(report, name))
    ]
    if not panels:
        out.unlink(missing_ok=True)  # of an earlier evaluation
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    most = max(len(scored) for _, scored in panels)
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(7, len(panels) * (0.9 + 0.32 * most)), squeeze=False, layout="constrained"
    )
    for axis, (name, scored) in zip(axes[:, 0], panels, strict=True):
        draw_scores(axis, name, scored)
    figure.savefig(out, dpi=150)
    pyplot.close(figure)


def _column(name: str, report: dict[str, Any]) -> str:
    if name in BY_NAME:
        return BY_NAME[name].column
    for prefix in report.get("local", ()):
        name = name.removeprefix(f"{prefix}-")
    return name


def _percent(score: float | None) -> str:
    return "" if score is None else f"{100 * score:.2f}"
