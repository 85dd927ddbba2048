"""`l2v report RUN...`: one page about runs: loss curves, scores, speed, lineage and data."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from l2v import __version__
from l2v.commands.parser import add_loading, new_parser, next_step, quoted
from l2v.errors import RecipeError

if TYPE_CHECKING:
    from l2v.runs.facts import RunFacts


def main(argv: Sequence[str] | None = None) -> int:
    """Write a self-contained HTML page, and the same as Markdown. Missing parts are named in it."""
    args = parser().parse_intermixed_args(argv)
    # Imported here: help and mistakes in the arguments need no torch.
    from l2v.report import tables
    from l2v.report.page import write
    from l2v.report.sections import section
    from l2v.runs.facts import read_run

    if bool(args.map) != bool(args.label) and args.map != "sample":
        raise RecipeError(
            "--map FILE and --label COLUMN must be given together: the texts, and the field that holds their topic"
        )
    runs = [read_run(Path(run)) for run in args.runs]
    out = Path(args.out) if args.out else runs[0].folder / "report.html"
    if out.suffix != ".html":
        raise RecipeError(f"--out {out}: the page must be a .html file")
    seb, missing = tables.seb_table(runs)
    sections = [section(run, args) for run in runs]
    title = "Report: " + ", ".join(run.name for run in runs)
    date = datetime.date.today().isoformat()
    facts = {
        "title": title,
        "version": __version__,
        "date": date,
        "seb": seb,
        "seb_missing": missing,
        "sections": sections,
    }
    for file in write(facts, out):
        print(file)
    print(_next(runs[0]))
    return 0


def _next(run: RunFacts) -> str:
    if run.last is None:
        return next_step("train it to the end; the same l2v train command resumes it")
    if run.evaluation is None:
        return next_step(
            quoted("l2v", "eval", run.folder, "--stages", "--baselines", "tfidf", "--benchmark", "local:FOLDER")
        )
    return next_step(quoted("l2v", "export", run.folder, "FOLDER"), quoted("l2v", "push", run.folder, "OWNER/NAME"))


def parser() -> argparse.ArgumentParser:
    """The arguments of `l2v report`."""
    p = new_parser(
        "report", "Write one HTML page about runs, and the same as Markdown: curves, scores, speed, lineage, data.",
        "runs/llama3-8b-da", "runs/one runs/two --out both.html --no-map",
    )  # fmt: skip
    p.add_argument("runs", nargs="+", metavar="RUN", help="folders that 'l2v train' wrote")
    p.add_argument(
        "--out", metavar="FILE", help="the page; the Markdown is written next to it (default: RUN/report.html)"
    )
    p.add_argument("--no-map", action="store_true", help="without the map of embeddings, which encodes texts")
    p.add_argument(
        "--map",
        metavar="FILE",
        help="texts of the map, or sample: the Danish sample (default: the run's own held-out texts)",
    )
    p.add_argument(
        "--text", default="text", metavar="COLUMN", help="the field of --map that holds the text (default: text)"
    )
    p.add_argument("--label", metavar="COLUMN", help="the field of --map that holds the topic")
    add_loading(p, precision=False)
    return p
