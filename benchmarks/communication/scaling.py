"""What `l2v plan` predicts from 1 to 1,024 GPUs, under each ZeRO stage: the tables of docs/scaling.md.

python -m benchmarks.communication.scaling [--recipe NAME] [--gpu h200] [--out docs/results/scaling]

Writes scaling.json and scaling.md. Arithmetic alone: nothing is measured and no GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from l2v.files import replace_text
from l2v.plan.estimate import StagePlan, plan_stage
from l2v.plan.gpus import device_and_dtype
from l2v.recipe.load import load_recipe

GPUS_PER_NODE = 8
GPUS_SHOWN = (1, 8, 16, 32, 64, 128, 256, 512, 1024)


def predict(name: str, gpu: str) -> dict[str, Any]:
    """By ZeRO stage and stage of the recipe: collectives on 8 and 64 GPUs, and efficiencies."""
    found: dict[str, Any] = {"recipe": name, "gpu": gpu, "per_node": GPUS_PER_NODE, "zero": {}}
    for zero in (0, 1, 2, 3):
        recipe = load_recipe(name, [f"zero.config=zero{zero}"])
        sheet, dtype = device_and_dtype(gpu, recipe)
        plans = [plan_stage(recipe, stage, sheet, dtype, GPUS_PER_NODE, GPUS_PER_NODE) for stage in recipe.order()]
        found["zero"][str(zero)] = {plan.name: _facts(plan) for plan in plans}
    return found


def _facts(plan: StagePlan) -> dict[str, Any]:
    return {
        "batch": plan.stage.batch,
        "micro_batches": plan.speed.micros,
        "seconds_alone": plan.speed.step_seconds - plan.speed.seconds["communication"],
        "wire": [
            {
                "what": each.what,
                "collective": each.op,
                "bytes": each.bytes,
                "times": each.times,
                "sent": each.sent(GPUS_PER_NODE),
            }
            for each in plan.exchanged
        ],
        "scaling": [{"gpus": x.gpus, "grown": x.grown, "fixed": x.fixed, "batch": x.grown_batch} for x in plan.scaling],
    }


def markdown(found: dict[str, Any]) -> str:
    """The tables."""
    stages = list(found["zero"]["0"])
    lines = ["Sent by each of 8 ranks in a step, MB:", "", f"| | {' | '.join(f'ZeRO {z}' for z in found['zero'])} |"]
    lines.append("|-|" + "-:|" * len(found["zero"]))
    for stage in stages:
        parts = {z: {row["what"]: row["sent"] / 1e6 for row in of[stage]["wire"]} for z, of in found["zero"].items()}
        for what in dict.fromkeys(name for part in parts.values() for name in part):
            cells = (f"{part[what]:,.2f}" if what in part else "" for part in parts.values())
            lines.append(f"| {stage}: {what} | {' | '.join(cells)} |")
        lines.append(
            f"| **{stage}, in all** | {' | '.join(f'**{sum(part.values()):,.0f}**' for part in parts.values())} |"
        )
    for title, key in (
        ("Speed of one GPU that each keeps, the batch growing with them:", "grown"),
        ("The same with the recipe's batch, shared out among more and more:", "fixed"),
    ):
        lines += ["", title, "", f"| | {' | '.join(f'{n:,}' for n in GPUS_SHOWN)} |", "|-|" + "-:|" * len(GPUS_SHOWN)]
        for stage in stages:
            for zero, of in found["zero"].items():
                rows = {row["gpus"]: row[key] for row in of[stage]["scaling"]}
                batch = f" (batch {of[stage]['batch']:,})" if key == "fixed" else ""
                lines.append(f"| {stage}{batch}, ZeRO {zero} | {' | '.join(f'{rows[n]:.0%}' for n in GPUS_SHOWN)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Predict and write."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.communication.scaling", description=main.__doc__)
    p.add_argument("--recipe", default="llama3-8b-da")
    p.add_argument("--gpu", default="h200")
    p.add_argument("--out", type=Path, default=Path("docs/results/scaling"))
    args = p.parse_args(argv)
    found = predict(args.recipe, args.gpu)
    args.out.mkdir(parents=True, exist_ok=True)
    replace_text(args.out / "scaling.json", json.dumps(found, indent=1) + "\n")
    replace_text(args.out / "scaling.md", markdown(found))
    print(markdown(found), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
