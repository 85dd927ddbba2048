"""`l2v report RUN...`: one page that says what runs learned, from what, how fast, and where they stand."""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from l2v import __version__
from l2v.errors import RecipeError, UserError
from l2v.report import tables
from l2v.report.page import write
from l2v.runs.facts import RunFacts, read_run


def main(argv: Sequence[str] | None = None) -> int:
    """Write a self-contained HTML page, and the same as Markdown. What is not there yet is a sentence in it."""
    p = argparse.ArgumentParser(prog="l2v report", description=main.__doc__)
    p.add_argument("runs", nargs="+", metavar="RUN", help="folders that 'l2v train' wrote")
    p.add_argument("--out", metavar="FILE", help="the page (default: RUN/report.html); the Markdown lies beside it")
    p.add_argument("--no-map", action="store_true", help="leave out the map of embeddings, which encodes texts")
    p.add_argument("--map", metavar="FILE", help="texts of the map (default: the passages of the Danish sample)")
    p.add_argument("--text", default="text", help="the field of --map that holds the text (default: text)")
    p.add_argument("--label", help="the field of --map that holds the topic")
    args = p.parse_intermixed_args(argv)
    if bool(args.map) != bool(args.label):
        raise RecipeError("--map FILE and --label COLUMN go together: the texts, and the field that holds their topic")
    runs = [read_run(Path(run)) for run in args.runs]
    out = Path(args.out) if args.out else runs[0].folder / "report.html"
    if out.suffix != ".html":
        raise RecipeError(f"--out {out}: the page is a .html file")
    seb, missing = tables.seb_table(runs)
    sections = [_section(run, args) for run in runs]
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
    return 0


def _section(run: RunFacts, args: argparse.Namespace) -> dict[str, Any]:
    """What the page says of one run."""
    from l2v.report import pictures

    found, why, source = None, "Left out with --no-map.", ""
    if not args.no_map:
        try:
            found, source = _map(run, args)
        except UserError as error:
            why = f"No map: {error}."
    quick = tables.quickstart_table(run)
    curves = [draw(run.name, stage) for stage in run.stages for draw in (pictures.curve, pictures.quality)]
    return {
        "run": run,
        "facts": _facts(run),
        "curves": [curve for curve in curves if curve],
        "throughput": tables.throughput_table(run),
        "scores": [*([quick] if quick else []), *(tables.local_tables(run.evaluation) if run.evaluation else [])],
        "left_out": tables.evaluation_notes(run),
        "map": found,
        "map_missing": why,
        "map_source": source,
        "lineage": tables.lineage_table(run),
        "data": tables.data_table(run),
        "hyperparameters": tables.hyperparameters(run.stages),
        "recipe": yaml.safe_dump(json.loads(json.dumps(run.tree())), sort_keys=False, allow_unicode=True),
    }


def _map(run: RunFacts, args: argparse.Namespace) -> tuple[Any, str]:
    from l2v.encoder import Encoder
    from l2v.report import pictures, space

    if run.last is None:
        raise UserError("no stage is trained yet")
    texts, labels, source = space.labelled(args.map, args.text, args.label)
    encoder = Encoder.from_pretrained(run.folder / run.last.name)
    found = space.lay_out(encoder, texts, labels, source)
    return pictures.topics(run.name, found), f"Stage {run.last.name}; {found.how} of {found.source}."


def _facts(run: RunFacts) -> list[tuple[str, str]]:
    base, last = run.recipe.base, run.last
    machine = (run.evaluation or {}).get("machine") or (run.quickstart or {}).get("machine") or {}
    return [
        (key, value)
        for key, value in (
            ("Base", base.model),
            ("Trained stages", ", ".join(stage.name for stage in run.stages if stage.trained) or "none"),
            ("Stands for", last.name if last else ""),
            ("Pooling", base.pooling),
            ("Attention", base.attention),
            ("Seed", str(run.recipe.seed)),
            (
                "Scored on",
                machine.get("accelerator", "")
                if machine.get("accelerator") != "none"
                else machine.get("processor", "CPU"),
            ),
        )
        if value
    ]
