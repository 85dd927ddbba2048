"""`l2v tune RECIPE`: the fastest settings on this machine, measured by training itself."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from l2v import __version__
from l2v.commands.parser import new_parser, next_step, quoted
from l2v.data.precheck import check_data
from l2v.errors import UserError
from l2v.files import replace_text
from l2v.recipe.load import load_recipe


def parser() -> argparse.ArgumentParser:
    """The arguments of `l2v tune`."""
    p = new_parser(
        "tune", "Find the fastest micro-batch and recompute on this machine, measured by training itself.",
        "llama3-8b-da --minutes 10",
    )  # fmt: skip
    p.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a recipe that comes with l2v")
    p.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="dotted keys of the recipe, as for l2v train")
    p.add_argument("--stage", metavar="NAME", help="tune only this stage; bare keys then belong to it")
    p.add_argument(
        "--minutes", type=float, default=30, metavar="MINUTES",
        help="time for each stage; a run that has begun ends (default: 30)",
    )  # fmt: skip
    p.add_argument("--steps", type=int, default=4, metavar="N", help="steps that are timed in a run (default: 4)")
    p.add_argument(
        "--gpus", "--processes", dest="processes", type=int, metavar="N",
        help="processes on this machine (default: every GPU, or 1)",
    )  # fmt: skip
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Tune the stages of a recipe and write the result next to it."""
    args = parser().parse_intermixed_args(argv)
    if args.steps < 2 or args.minutes < 0:
        raise UserError("--steps must be at least 2 (the first one is not timed), and --minutes must not be negative")
    recipe = load_recipe(args.recipe, args.overrides, args.stage)
    names = [args.stage] if args.stage else recipe.order()
    check_data(args.recipe, args.overrides, args.stage, recipe, names)
    # Imported here: help and mistakes in the recipe need no torch.
    import torch

    from l2v.machine import check_results_folder
    from l2v.tuning.apply import place, read_tuned, tuned_file
    from l2v.tuning.search import tune_stage

    file = tuned_file(args.recipe)
    # Checked before anything runs, not after an hour of measurements.
    if not os.access(file.parent, os.W_OK):
        raise UserError(f"{file} cannot be written: copy the recipe to your own folder (l2v recipes NAME > mine.yaml)")
    check_results_folder(file.parent)
    here = place(args.processes or max(1, torch.cuda.device_count()))
    before = read_tuned(args.recipe) or {}
    stages = before.get("stages", {}) if before.get("place") == here else {}
    with tempfile.TemporaryDirectory(prefix="l2v-tune-", ignore_cleanup_errors=True) as folder:
        for name in names:
            stages[name] = tune_stage(recipe, name, args, Path(folder), 60 * args.minutes)
            found = {"l2v": __version__, "place": here, "stages": stages}
            replace_text(file, json.dumps(found, indent=1) + "\n")
    print(f"written: {file}; l2v train applies it on this machine")
    print(next_step(quoted("l2v", "train", args.recipe, *args.overrides)))
    return 0
