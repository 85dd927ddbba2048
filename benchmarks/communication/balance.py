"""How evenly ranks are loaded and whether the host keeps up: the tables of docs/balance.md, predicted for the Danish recipes.

python -m benchmarks.communication.balance [--gpu h200] [--data STAGE=PATH ...] [--steps 24] [--out docs/results/balance]

The real sampler divides real texts among simulated ranks; times come from the roofline and counts of `l2v plan`. No GPU is
needed and nothing is measured. Lengths: the Danish sample, in tokens of the small model that comes with l2v, since the
tokenizer of Llama-3 is gated; --data takes any source that a recipe takes. Writes balance.json and balance.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from l2v.data.open import open_examples, settled
from l2v.data.tokens import TextTokenizer, load_tokenizer
from l2v.files import replace_text
from l2v.model.embedded import resolve
from l2v.plan import counts
from l2v.plan.estimate import Context, model_of
from l2v.plan.gpus import device_and_dtype
from l2v.plan.memory import memory_of
from l2v.plan.shapes import shape_of
from l2v.plan.work import Lengths, Work, sampler_of, work_of_step
from l2v.recipe import Recipe, Source
from l2v.recipe.load import load_recipe

RECIPES = ("llama3-8b-da", "ai-sweden-llama3-8b-da")
TOKENS_OF = "smollm2-135m-da"
"""The recipe whose tokenizer and template give the lengths."""
SAMPLE = "sample:da/train"
GPUS = (1, 8, 16)
GPUS_PER_NODE = 8


def lengths_of(recipe: Recipe, name: str, path: str) -> Lengths:
    """Lengths of a stage's examples if its data were `path`."""
    small = load_recipe(TOKENS_OF).base
    tokenizer = load_tokenizer(small.tokenizer or resolve(small.model))
    stage = recipe.stages[name]
    source = Source(path, sentences=stage.data[0].sentences and path != SAMPLE)
    return Lengths.of(open_examples([source], stage, TextTokenizer(tokenizer, small.template, stage.length)))


def works(context: Context, micro_tokens: int, steps: int) -> list[Work]:
    """The first steps but the last one of each epoch, whose batch is short: the recipes' data has thousands of steps an epoch."""
    sampler = sampler_of(
        context.lengths, context.stage, context.world, context.seed, micro_tokens, context.cost
    )  # fmt: skip
    full = max(1, sampler.steps_per_epoch - 1)
    chosen = [epoch * sampler.steps_per_epoch + at for epoch in range(steps) for at in range(full)][:steps]
    return [work_of_step(sampler.plan(step), context.lengths, context.stage) for step in chosen]


def predict(recipe: Recipe, name: str, lengths: Lengths, gpu: str, world: int, steps: int) -> dict[str, Any]:
    """Balance, device share and the choice of recompute of a stage on `world` GPUs."""
    sheet, dtype = device_and_dtype(gpu, recipe)
    stage = settled(recipe.stages[name], lengths.segments)
    model = model_of(recipe.base, shape_of(recipe.base)[0], stage, dtype.itemsize)
    context = Context(
        recipe, stage, model, sheet, dtype, world, GPUS_PER_NODE, lengths, recipe.stage_seed(name)
    )  # fmt: skip
    memory = memory_of(
        recipe, stage, model, sheet, itemsize=dtype.itemsize, dtype=dtype, world=world,
        tokens=context.largest(stage.micro_tokens), length=lengths.text,
    )  # fmt: skip
    choice = context.choose(memory.largest, stage.micro_tokens)
    if choice is None:
        raise SystemExit(f"{recipe.name}, {name}: no micro-batch fits one {gpu}")
    each = works(context, choice.micro_tokens, steps)
    speed = context.speed(each, choice.recompute)
    alone = [context.speed([work], choice.recompute).balance for work in each]
    relief = context.relief(speed, choice.recompute, choice.micro_tokens)
    return {
        "gpus": world, "steps": len(each), "balance": speed.balance, "least_balance": min(alone),
        "device_share": speed.device_share, "device_seconds": speed.device, "host_seconds": speed.host,
        "tokens_per_second": speed.tokens_per_second, "tokens_a_rank": speed.step_tokens / world,
        "micro_batches": speed.micros, "idle": speed.idle, "recompute": choice.recompute,
        "micro_tokens": choice.micro_tokens, "largest_micro_batch": choice.tokens,
        "as_fast": asdict(relief) if relief else None,
    }  # fmt: skip


def table(found: Mapping[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        "| recipe, stage | GPUs | tokens a rank | balance | least | device ms | host ms | device share | as fast |"
    ]
    lines.append("|-|" + "-:|" * 7 + "-|")
    for recipe, stages in found["recipes"].items():
        for stage, rows in stages.items():
            for row in rows:
                relief = row["as_fast"] or {}
                ways = [f"{relief['gpus']} GPUs"] if relief.get("gpus") else []
                ways += [f"batch {relief['batch']:,}"] if relief.get("batch") else []
                lines.append(
                    f"| {recipe}, {stage} | {row['gpus']} | {row['tokens_a_rank']:,.0f} | {row['balance']:.3f} | "
                    f"{row['least_balance']:.3f} | {1e3 * row['device_seconds']:,.0f} | {1e3 * row['host_seconds']:,.0f} | "
                    f"{row['device_share']:.2f} | {', '.join(ways)} |"
                )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Predict and write."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.communication.balance", description=main.__doc__)
    p.add_argument("--gpu", default="h200", help="a GPU of l2v plan (default: h200)")
    p.add_argument(
        "--data", nargs="*", default=[], metavar="STAGE=PATH", help=f"lengths of other data (default: {SAMPLE})"
    )  # fmt: skip
    p.add_argument("--steps", type=int, default=24, help="steps to average over (default: 24)")
    p.add_argument("--out", type=Path, default=Path("docs/results/balance"))
    args = p.parse_args(argv)
    paths = dict(each.split("=", 1) for each in args.data)
    found: dict[str, Any] = {
        "gpu": args.gpu, "gpus_per_node": GPUS_PER_NODE, "tokenizer_of": TOKENS_OF, "counts": counts.load().source, "data": {},
        "recipes": {},
    }  # fmt: skip
    for recipe_name in RECIPES:
        recipe = load_recipe(recipe_name)
        for name in recipe.order():
            path = paths.get(name, SAMPLE)
            lengths = lengths_of(recipe, name, path)
            shown = path if path.startswith("sample:") else Path(path).name
            found["data"][name] = {"source": shown, "examples": len(lengths), "tokens": int(lengths.lengths.sum())}
            rows = [predict(recipe, name, lengths, args.gpu, world, args.steps) for world in GPUS]
            found["recipes"].setdefault(recipe_name, {})[name] = rows
    args.out.mkdir(parents=True, exist_ok=True)
    replace_text(args.out / "balance.json", json.dumps(found, indent=1) + "\n")
    replace_text(args.out / "balance.md", table(found))
    print(table(found), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
