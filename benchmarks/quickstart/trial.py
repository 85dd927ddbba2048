"""One trial of the quickstart's recipe, on a development cut of the sample's training part; a line is added to a log.

    python -m benchmarks.quickstart.trial --log trials.jsonl [--seed 1] [base=NAME] [KEY=VALUE ...]

Trains on `sample:da/fit` and scores the questions of `sample:da/dev` against all passages of the training part. The held-out
questions and passages are neither read nor scored: they are for `l2v quickstart`, once, when the recipe is chosen. A line of the
log has the changes, the scores of every row, and the seconds of training and scoring, with the load of the machine beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from l2v.data import sample
from l2v.quickstart.run import choose_recipe, machine, score_stages, score_untrained, train_stages
from l2v.quickstart.scores import Scores
from l2v.quickstart.table import Printed
from l2v.recipe import Recipe
from l2v.recipe.load import load_recipe
from l2v.runs.folder import run_folder


def moved_to_the_cut(recipe: Recipe) -> list[str]:
    """Overrides that read every source of the sample from the cut: `train` from `fit`, held-out losses from `dev`.

    Raises:
        ValueError: a source is not a part of the sample that may be used in a trial.
    """
    out = []
    for name, stage in recipe.stages.items():
        for key, part in (("data", "fit"), ("eval_data", "dev")):
            for at, source in enumerate(getattr(stage, key)):
                match = re.fullmatch(r"sample:da/(?:train|heldout|fit|dev)(/crops)?", source.path)
                if not match:
                    raise ValueError(f"stages.{name}.{key}[{at}]: {source.path} is not of the sample")
                source.path = f"sample:da/{part}{match.group(1) or ''}"
            sources = [{"path": s.path, **({"limit": s.limit} if s.limit else {})} for s in getattr(stage, key)]
            if sources:
                out.append(f"stages.{name}.{key}={json.dumps(sources)}")
    return out


def trial(overrides: Sequence[str], seed: int, folder: Path) -> dict[str, Any]:
    """Train and score once; returns the line of the log."""
    name, changes = choose_recipe(overrides)
    given = [*changes, f"seed={seed}", f"out={folder / 'run'}"]
    given += moved_to_the_cut(load_recipe(name, given))
    recipe = load_recipe(name, given)
    training = [p for p in sample.passages().values() if p.id in sample.splits()["train"]]
    scores = Scores(
        sample.questions("dev"), training, Printed(Console(), "dev questions against training passages").add
    )
    score_untrained(recipe, scores)
    before = scores.seconds
    began = time.perf_counter()
    train_stages(name, given, fresh=True)
    seconds = {"training": time.perf_counter() - began, "scoring_untrained": before}
    score_stages(recipe, run_folder(recipe), scores)
    seconds["scoring"] = scores.seconds
    kept = ("name", "ndcg_at_10", "ndcg_low", "ndcg_high", "ndcg_plain", "ndcg_colloquial", "ndcg_disjoint")
    return {
        "recipe": name, "changes": list(changes), "seed": seed, "steps": {k: s.steps for k, s in recipe.stages.items()},
        "rows": [{key: row[key] for key in kept} for row in scores.rows()],
        "seconds": {key: round(value, 1) for key, value in seconds.items()},
        "machine": machine(recipe) | {"load": round(os.getloadavg()[0], 1), "threads": torch.get_num_threads()},
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one trial and append it to the log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, required=True, help="a file of JSON lines; the trial is added")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_intermixed_args(argv)
    with tempfile.TemporaryDirectory(prefix="l2v-trial-") as folder:
        line = trial(args.overrides, args.seed, Path(folder))
    with args.log.open("a", encoding="utf-8") as log:
        log.write(json.dumps(line, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
