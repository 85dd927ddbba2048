"""`l2v plan RECIPE`: what a recipe needs and how long it takes, before anything is downloaded."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace

from l2v.commands.parser import new_parser, next_step, quoted
from l2v.data.precheck import check_data
from l2v.errors import UserError
from l2v.recipe.load import load_recipe

GPUS = (
    "h200", "h100", "h20", "a100", "a100-40gb", "b200", "gb200", "l40s", "l4", "a10", "rtx3090", "rtx4090", "rtx5090", "mi300x",
)  # fmt: skip
"""The keys of `l2v.plan.gpus.SHEETS`, which needs torch."""


def main(argv: Sequence[str] | None = None) -> int:
    """Memory of each GPU, tokens a second and hours of each stage, predicted. Exit code 0 if every stage fits, 1 if one
    does not."""
    args = parser().parse_intermixed_args(argv)
    try:
        recipe = load_recipe(args.recipe, args.overrides, args.stage)
        if args.gpus < 1 or args.per_node < 1:
            raise UserError("--gpus and --per-node must be at least 1")
        if not args.network > 0:
            raise UserError("--network is in Gb/s and must be above 0")
        if args.gpu_memory is not None and not args.gpu_memory > 0:
            raise UserError("--gpu-memory is in GiB and must be above 0")
        names = [args.stage] if args.stage else recipe.order()
        check_data(args.recipe, args.overrides, args.stage, recipe, names)
        # Imported here: help and mistakes in the recipe need no torch.
        from l2v.machine.gpus import check
        from l2v.plan.estimate import plan_stage
        from l2v.plan.gpus import device_and_dtype
        from l2v.plan.report import hub_names, remedies, render, tree
        from l2v.plan.shapes import shape_of

        noted = check() if args.gpu in (None, "here") and args.gpu_memory is None else []
        gpu, dtype = device_and_dtype(args.gpu, recipe, args.gpu_memory)
        gpu = replace(gpu, network=args.network / 8 * 1e9)
        shape, source = shape_of(recipe.base)
        plans = [plan_stage(recipe, name, gpu, dtype, args.gpus, args.per_node) for name in names]
    except UserError as error:
        print(f"l2v: {error}", file=sys.stderr)
        return error.exit_code
    facts = {
        "recipe": recipe.name, "base": recipe.base.model, "model_type": shape.model_type, "shape_from": source,
        "gpu": gpu.key, "gpus": args.gpus, "per_node": args.per_node, "network_gbps": args.network, "rates": gpu.source,
        "dtype": str(dtype).removeprefix("torch."), "zero_stage": recipe.zero.stage, "timed": gpu.timed,
        "hub": hub_names(recipe, names),
    }  # fmt: skip
    if args.json:
        print(json.dumps(tree(facts, plans), indent=1, ensure_ascii=False))
    else:
        render(facts, gpu, plans)
    failed = [plan for plan in plans if not plan.memory.fits]
    for note in noted:
        print(f"l2v: {note}", file=sys.stderr)
    for plan in failed:
        print(f"l2v: {remedies(plan, recipe, gpu)}", file=sys.stderr)
    if not args.json and not failed:
        print(next_step(_train(args)))
    return 1 if failed else 0


def _train(args: argparse.Namespace) -> str:
    """The command that trains what was planned; on several nodes a launcher starts it."""
    stage = ["--stage", args.stage] if args.stage else []
    many = ["--gpus", args.gpus] if 1 < args.gpus <= args.per_node else []
    command = quoted("l2v", "train", args.recipe, *stage, *many, *args.overrides)
    return f"{command}, on each node (docs/multi-node.md)" if args.gpus > args.per_node else command


def parser() -> argparse.ArgumentParser:
    """The arguments of `l2v plan`."""
    p = new_parser(
        "plan", "Predict memory, tokens a second and hours of each stage before anything is downloaded.",
        "llama3-8b-da --gpu h200 --gpus 16",
    )  # fmt: skip
    p.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a recipe that comes with l2v")
    p.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="dotted keys of the recipe, for example stages.mntp.micro_tokens=8192",
    )
    p.add_argument("--stage", metavar="NAME", help="only this stage; bare keys then belong to it")
    p.add_argument(
        "--gpu", metavar="NAME", help=f"{', '.join(GPUS)}, or here: the device of this machine (default: here)"
    )
    p.add_argument(
        "--gpu-memory", type=float, metavar="GIB",
        help="memory of a GPU instead of that of --gpu; alone, for a GPU that is not in the list: plans the memory only",
    )  # fmt: skip
    p.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs in total (default: 1)")
    p.add_argument("--per-node", type=int, default=8, metavar="N", help="GPUs per node (default: 8)")
    p.add_argument(
        "--network", type=float, default=400, metavar="GBPS", help="Gb/s between nodes, all ports of one (default: 400)"
    )
    p.add_argument("--json", action="store_true", help="the same as JSON")
    return p
