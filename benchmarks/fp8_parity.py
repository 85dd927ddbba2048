"""Does an FP8 base train the same encoder? Loss curves of both side by side, and the cosine between their vectors.

python -m benchmarks.fp8_parity [--model NAME] [--stage NAME] [--steps N] [--out FOLDER] [key=value ...]

Trained by the product's own program on the same data and seeds, with `base.base_precision` same and fp8; and once more with
same and another seed, the yardstick: what the choice of a seed changes, nobody calls a loss of quality. Without a GPU that
has FP8 its numbers are emulated (L2V_FP8=emulate): the same roundings, in fp32, and no speed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.fp8_products import COLUMNS, product_errors
from benchmarks.harness import device_facts, markdown, plotting, write
from l2v.data import sample
from l2v.encoder import Encoder
from l2v.evaluation.plots import read_metrics
from l2v.machine import processor
from l2v.model.quantize import to_fp8
from l2v_kernels.fp8 import obstacle

MODELS = {
    "smollm2": ("smollm2-135m-da", []),
    "random": ("smollm2-135m-da", ["base.init=random", "base.overrides={num_hidden_layers: 2}"]),
    "llama": ("llama3-8b-da", []),
}
EMULATED = (
    "EMULATED: FP8's roundings in fp32 on {device}. These are numbers of accuracy; nothing here says how fast FP8 is."
)
RUNS = {"same": ["base.base_precision=same"], "fp8": ["base.base_precision=fp8"]}
OTHER = "same, another seed"


def main(argv: list[str] | None = None) -> int:
    """Train, compare, write fp8_parity.json, .md and .png."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.fp8_parity", description=__doc__.split("\n")[0])
    p.add_argument("overrides", nargs="*", metavar="key=value", help="recipe overrides, for all runs alike")
    p.add_argument("--model", choices=MODELS, default="smollm2")
    p.add_argument("--stage", choices=("mntp", "simcse", "supervised"), default="mntp")
    p.add_argument("--steps", type=int, default=40)
    p.add_argument("--texts", type=int, default=120, help="held-out texts whose vectors are compared")
    p.add_argument("--out", type=Path, help="folder for fp8_parity.json, .md and .png")
    args = p.parse_intermixed_args(argv)
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    emulate = obstacle(where) is not None
    before = os.environ.get("L2V_FP8")
    if emulate:
        os.environ["L2V_FP8"] = "emulate"
    try:
        with tempfile.TemporaryDirectory(prefix="fp8-parity-") as folder:
            data = compare(args, Path(folder))
    finally:
        if emulate:
            os.environ.pop("L2V_FP8")
            os.environ |= {} if before is None else {"L2V_FP8": before}
    facts = device_facts(where)
    if where.type == "cpu":
        facts["device"] = processor()
    data |= {"facts": facts, "emulated": emulate}
    text = page(data)
    print(text, flush=True)
    if args.out:
        write(args.out, "fp8_parity", data, text, lambda: figure(data))
    return 0


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All runs, and what comes of them."""
    recipe, overrides = MODELS[args.model]
    runs = RUNS | {OTHER: [*RUNS["same"], f"stages.{args.stage}.seed=1042"]}
    for name, own in runs.items():
        run = [*overrides, *own, "from=base", f"steps={args.steps}", "log_every=1", f"out={folder / name}"]
        train(recipe, args.stage, [*run, "tracking.tensorboard=false", *args.overrides])
    rows = {name: read_metrics(folder / name / args.stage) for name in runs}
    losses = {name: [r["loss"] for r in rows[name] if "loss" in r] for name in runs}
    held_out = {name: [r["eval_loss"] for r in rows[name] if "eval_loss" in r] for name in runs}
    texts = held_out_texts(args.texts)
    vectors, errors = {}, {}
    for name in runs:
        encoder = Encoder.from_pretrained(folder / name / args.stage)
        vectors[name] = encoder.encode(texts)
        if name == "same":
            errors = product_errors(encoder, texts[:24])
        if name in RUNS:
            to_fp8(encoder.model.fused, encoder.model.decoder)
            vectors[f"{name}, on the FP8 base"] = encoder.encode(texts)
    cosines = {}
    for name in sorted(vectors.keys() - {"same"}):
        cosine = (vectors[name] * vectors["same"]).sum(1)
        cosines[name] = {"mean": float(cosine.mean()), "min": float(cosine.min())}
    return {
        "model": args.model, "stage": args.stage, "steps": args.steps, "texts": len(texts), "overrides": args.overrides,
        "losses": losses, "held_out": held_out, "cosines": cosines, "products": errors,
        "difference": {name: difference(losses[name], losses["same"]) for name in runs if name != "same"},
    }  # fmt: skip


def train(recipe: str, stage: str, overrides: list[str]) -> None:
    """`l2v train`, to its end.

    Errors: SystemExit with its message where it does not get there.
    """
    done = subprocess.run([sys.executable, "-m", "l2v.train", recipe, *overrides, "--stage", stage, "--processes", "1"])
    if done.returncode:
        raise SystemExit(f"training did not finish: {recipe} {' '.join(overrides)}")


def held_out_texts(n: int) -> list[str]:
    """Questions and passages that no stage has seen, in turn."""
    queries = [q.query for q in sample.questions("heldout")]
    passages = [p.text for p in sample.passages().values() if p.split == "heldout"]
    return [text for pair in zip(queries, passages, strict=False) for text in pair][:n]


def difference(losses: list[float], base: list[float]) -> dict[str, float]:
    """Of two curves, relative: the mean and largest size, and the mean with its sign over the last half."""
    relative = (np.array(losses) - np.array(base)) / np.array(base)
    half = len(relative) // 2
    return {
        "mean": float(np.abs(relative).mean()),
        "largest": float(np.abs(relative).max()),
        "last_half": float(relative[half:].mean()),
    }


def page(data: dict[str, Any]) -> str:
    """Markdown."""
    facts = data["facts"]
    lines = [f"# FP8 base: {data['model']}, {data['stage']}, {data['steps']} steps", ""]
    if data["emulated"]:
        lines += [EMULATED.format(device=facts["device"]), ""]
    lines += [f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}.", ""]
    rows = []
    for name, losses in data["losses"].items():
        held_out, apart = data["held_out"][name], data["difference"].get(name)
        rows.append(
            [name, f"{losses[0]:.4f}", f"{losses[-1]:.4f}"]
            + [f"{held_out[i]:.4f}" if held_out else "" for i in (0, -1)]
            + ([f"{apart['mean']:.2%}", f"{apart['largest']:.2%}", f"{apart['last_half']:+.2%}"] if apart else [""] * 3)
        )
    head = ["base_precision", "first loss", "last loss", "held out, before", "after"]
    lines += [markdown([*head, "mean difference", "largest", "signed, last half"], rows), ""]
    lines += [
        f"Cosine between vectors of {data['texts']} held-out texts and those of the encoder trained with `same`:",
        "",
    ]
    rows = [[name, f"{c['mean']:.5f}", f"{c['min']:.5f}"] for name, c in data["cosines"].items()]
    lines += [markdown(["trained with", "mean", "least"], rows), ""]
    lines += ["Relative error of products, on this encoder's activations and gradients (mean over layers):", ""]
    rows = [[kind, *(f"{errors[c]:.2%}" for c in COLUMNS)] for kind, errors in data["products"].items()]
    lines += [markdown(["linear", *COLUMNS.values()], rows)]
    return "\n".join(lines)


def figure(data: dict[str, Any]):
    """Loss curves, and how far from `same` the others run."""
    drawn, (left, right) = plotting().subplots(1, 2, figsize=(11, 4))
    styles = {"same": "-", "fp8": "--"}
    for name, losses in data["losses"].items():
        steps = range(1, len(losses) + 1)
        left.plot(steps, losses, styles.get(name, ":"), label=name)
        if name != "same":
            apart = [abs(a - b) / b for a, b in zip(losses, data["losses"]["same"], strict=True)]
            right.semilogy(steps, apart, styles.get(name, ":"), label=name)
    left.set(xlabel="step", ylabel="training loss (nats)", title=f"{data['model']}, {data['stage']}")
    right.set(xlabel="step", ylabel="relative distance to same", title="emulated FP8" if data["emulated"] else "FP8")
    for axis in (left, right):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.25)
    return drawn


if __name__ == "__main__":
    sys.exit(main())
