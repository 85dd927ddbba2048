"""The section of one run."""

from __future__ import annotations

import argparse
import json
from typing import Any

import yaml

from l2v.errors import UserError
from l2v.report import tables
from l2v.runs.facts import RunFacts


def section(run: RunFacts, args: argparse.Namespace) -> dict[str, Any]:
    """The section of one run."""
    from l2v.report import pictures

    found, why, source = None, "Skipped with --no-map.", ""
    if not args.no_map:
        try:
            found, source = _map(run, args)
        except UserError as error:
            why = f"No map: {error}."
    curves = [draw(run.name, stage) for stage in run.stages for draw in (pictures.curve, pictures.quality)]
    return {
        "run": run,
        "facts": base_facts(run),
        "own": tables.own_scores(run),
        "own_missing": f"No scores on data of your own yet: {OWN_COMMAND.format(run=run.folder)} computes them.",
        "own_pictures": pictures.own_scores(run),
        "curves": [curve for curve in curves if curve],
        "throughput": tables.throughput_table(run),
        "scores": tables.other_scores(run),
        "left_out": tables.evaluation_notes(run),
        "map": found,
        "map_missing": why,
        "map_source": source,
        "lineage": tables.lineage_table(run),
        "data": tables.data_table(run),
        "hyperparameters": tables.hyperparameters(run.stages),
        "recipe": yaml.safe_dump(json.loads(json.dumps(run.tree())), sort_keys=False, allow_unicode=True),
    }


OWN_COMMAND = "l2v eval {run} --stages --baselines tfidf --benchmark local:FOLDER"


def _map(run: RunFacts, args: argparse.Namespace) -> tuple[Any, str]:
    from l2v.encoder import Encoder
    from l2v.report import own, pictures, space

    if run.last is None:
        raise UserError("no stage is trained yet")
    chosen = (
        own.of_file(args.map, args.text, args.label) if args.label else own.of_run(run, sample=args.map is not None)
    )
    encoder = Encoder.from_pretrained(run.folder / run.last.name, trust_remote_code=args.trust_remote_code)
    found = space.lay_out(encoder, chosen)
    return pictures.map_picture(run.name, found), f"Stage {run.last.name}; {found.how} of {found.texts.source}."


def base_facts(run: RunFacts) -> list[tuple[str, str]]:
    base, last = run.recipe.base, run.last
    machine = (run.evaluation or {}).get("machine") or (run.quickstart or {}).get("machine") or {}
    return [
        (key, value)
        for key, value in (
            ("Base", base.model),
            ("Trained stages", ", ".join(stage.name for stage in run.stages if stage.trained) or "none"),
            ("Final stage", last.name if last else ""),
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
