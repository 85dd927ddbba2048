"""Does an FP8 base train the same encoder? Loss curves of both side by side, and the cosine between their vectors.

l2v bench fp8_parity [--model NAME] [--stage NAME] [--steps N] [--out FOLDER] [key=value ...]

Trained by `l2v train` itself on the same data and seeds, with `base.base_precision` same and fp8, for several seeds:
training magnifies any change, so one pair of curves shows little; the spread over seeds is the yardstick.
Without a GPU that has FP8 its numbers are emulated (L2V_FP8=emulate): the same roundings, in fp32, and no speed.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.command import Benchmark
from benchmarks.fp8.errors import COLUMNS, matmul_errors
from benchmarks.harness import device_facts
from benchmarks.pages import markdown, plotting, write
from l2v.data import sample
from l2v.encoder import Encoder
from l2v.machine import processor
from l2v.model.quantize import to_fp8
from l2v.runs.metrics import read_metrics
from l2v_kernels.fp8 import obstacle

MODELS = {
    "smollm2": ("smollm2-135m-da", []),
    "random": ("smollm2-135m-da", ["base.init=random", "base.overrides={num_hidden_layers: 2}"]),
    "llama": ("llama3-8b-da", []),
}
EMULATED = "EMULATED: FP8's roundings in fp32 on {device}. These numbers measure accuracy; none of them measures speed."
HOW = ("same", "fp8")
FIRST_SEED, SEED_STEP = 42, 1000
"""The recipes' seed, and how far the others are from it."""


@dataclass(frozen=True)
class Run:
    """One training."""

    how: str
    seed: int

    def __str__(self) -> str:
        return self.how if self.seed == FIRST_SEED else f"{self.how}, seed {self.seed}"


def runs(seeds: int) -> list[Run]:
    """Both bases for each seed, in pairs."""
    return [Run(how, FIRST_SEED + SEED_STEP * i) for i in range(seeds) for how in HOW]


def emulated_where_needed(device: torch.device) -> contextlib.AbstractContextManager:
    """L2V_FP8=emulate while FP8 has to be emulated on a device; nothing where it does not."""
    return set_environment("L2V_FP8", "emulate") if obstacle(device) is not None else contextlib.nullcontext()


@contextlib.contextmanager
def set_environment(name: str, value: str) -> Iterator[None]:
    """An environment variable, for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        os.environ |= {} if before is None else {name: before}


def run_all(options: argparse.Namespace) -> int:
    """Train, compare, write fp8_parity.json, .md and .png."""
    options.model = options.model or ("random" if options.quick else "smollm2")
    options.steps = options.steps or (2 if options.quick else 40)
    options.seeds = options.seeds or (1 if options.quick else 3)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with emulated_where_needed(device), tempfile.TemporaryDirectory(prefix="fp8-parity-") as folder:
        data = compare(options, options.work or Path(folder))
    facts = device_facts(device)
    if device.type == "cpu":
        facts["device"] = processor()
    data |= {"facts": facts, "emulated": obstacle(device) is not None}
    text = page(data)
    print(text, flush=True)
    if options.out:
        write(options.out, "fp8_parity", data, text, lambda: figure(data))
    return 0


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All trainings, and what comes of them."""
    recipe, overrides = MODELS[options.model]
    overrides = [*overrides, "from=base", f"steps={options.steps}", "log_every=1", "tracking.tensorboard=false"]
    for run in runs(options.seeds):
        own = [f"base.base_precision={run.how}", f"stages.{options.stage}.seed={run.seed}", f"out={folder / str(run)}"]
        train(recipe, options.stage, [*overrides, *own, *options.overrides])
    texts = held_out_texts(options.texts)
    losses, held_out, vectors, errors = {}, {}, {}, {}
    for run in runs(options.seeds):
        trained = folder / str(run) / options.stage
        rows = read_metrics(trained)
        losses[str(run)] = [r["loss"] for r in rows if "loss" in r]
        held_out[str(run)] = [r["eval_loss"] for r in rows if "eval_loss" in r]
        encoder = Encoder.from_pretrained(trained)
        vectors[str(run)] = encoder.encode(texts)
        if run.seed == FIRST_SEED:
            if run.how == "same":
                errors = matmul_errors(encoder, texts[:24])
            to_fp8(encoder.model.fused, encoder.model.decoder)
            vectors[f"{run}, on the FP8 base"] = encoder.encode(texts)
    pairs = [(f"fp8, seed {r.seed}", str(Run("fp8", r.seed)), str(r)) for r in runs(options.seeds) if r.how == "same"]
    others = [(f"same, seed {r.seed}", str(r), "same") for r in runs(options.seeds)[2:] if r.how == "same"]
    bases = [(name, name, "same") for name in ("same, on the FP8 base", "fp8, on the FP8 base")]
    return {
        "model": options.model, "stage": options.stage, "steps": options.steps, "seeds": options.seeds, "texts": len(texts),
        "overrides": options.overrides, "losses": losses, "held_out": held_out, "products": errors,
        "curves": {label: difference(losses[a], losses[b]) for label, a, b in [*pairs, *others]},
        "cosines": {label: cosine(vectors[a], vectors[b]) for label, a, b in [*pairs, *bases, *others]},
    }  # fmt: skip


def train(recipe: str, stage: str, overrides: list[str]) -> None:
    """`l2v train`, to its end.

    Raises: SystemExit with its message where it does not get there.
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
    """Of two curves, relative: mean and largest size."""
    relative = np.abs(np.array(losses) / np.array(base) - 1)
    return {"mean": float(relative.mean()), "largest": float(relative.max())}


def cosine(vectors_SE: np.ndarray, base_SE: np.ndarray) -> dict[str, float]:
    """Between vectors of length 1 of the same texts: mean and least."""
    cosine_S = (vectors_SE * base_SE).sum(1)
    return {"mean": float(cosine_S.mean()), "least": float(cosine_S.min())}


def spread(values: list[float]) -> str:
    """Mean, and its standard error where there are several."""
    error = f" ± {np.std(values, ddof=1) / np.sqrt(len(values)):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{error}"


def page(data: dict[str, Any]) -> str:
    """Markdown."""
    facts = data["facts"]
    settings = ", ".join([data["model"], data["stage"], f"{data['steps']} steps", *data["overrides"]])
    lines = [f"# FP8 base: {settings}", ""]
    if data["emulated"]:
        lines += [EMULATED.format(device=facts["device"]), ""]
    lines += [f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}.", ""]
    head = ["seed", "before: same", "fp8", "after: same", "fp8", "fp8 - same"]
    rows, apart = [], []
    for run in runs(data["seeds"])[::2]:
        same, fp8 = (
            data["held_out"][str(Run(how, run.seed))] or data["losses"][str(Run(how, run.seed))] for how in HOW
        )
        apart.append(fp8[-1] - same[-1])
        rows.append([str(run.seed), *(f"{x:.4f}" for x in (same[0], fp8[0], same[-1], fp8[-1])), f"{apart[-1]:+.4f}"])
    what = "Held-out" if data["held_out"]["same"] else "Training"
    lines += [f"{what} loss (nats) before and after:", "", markdown(head, rows), ""]
    ends = [float(row[3]) for row in rows]
    lines += [f"fp8 - same after training, mean and its standard error: {spread(apart)}."]
    if len(ends) > 1:
        lines += [f"Standard deviation of `same` over seeds: {np.std(ends, ddof=1):.4f}."]
    lines += ["", "Training loss, relative distance to `same` of the same seed (fp8) or of the first (same):", ""]
    rows = [[name, f"{c['mean']:.2%}", f"{c['largest']:.2%}"] for name, c in data["curves"].items()]
    lines += [markdown(["trained with", "mean", "largest"], rows), ""]
    lines += [f"Cosine between vectors of {data['texts']} held-out texts, to `same` likewise:", ""]
    rows = [[name, f"{c['mean']:.5f}", f"{c['least']:.5f}"] for name, c in data["cosines"].items()]
    lines += [markdown(["trained with", "mean", "least"], rows), ""]
    lines += ["Relative error of matmuls, on this encoder's activations and gradients (mean over layers):", ""]
    rows = [[kind, *(f"{errors[c]:.2%}" for c in COLUMNS)] for kind, errors in data["products"].items()]
    lines += [markdown(["linear", *COLUMNS.values()], rows)]
    return "\n".join(lines)


def figure(data: dict[str, Any]):
    """Loss curves: a colour a seed, dashed with FP8; and the distance of each from `same`."""
    drawn, (left, right) = plotting().subplots(1, 2, figsize=(11, 4))
    for i, run in enumerate(runs(data["seeds"])):
        losses, base = data["losses"][str(run)], data["losses"][str(Run("same", run.seed))]
        steps, look = range(1, len(losses) + 1), {"color": f"C{i // 2}", "linestyle": "--" if run.how == "fp8" else "-"}
        left.plot(steps, losses, label=f"{run.how}, seed {run.seed}", linewidth=1.2, **look)
        if run.how == "fp8" or run.seed != FIRST_SEED:
            base = base if run.how == "fp8" else data["losses"]["same"]
            apart = [abs(a - b) / b for a, b in zip(losses, base, strict=True)]
            right.semilogy(steps, apart, label=f"{run.how}, seed {run.seed}", linewidth=1.2, **look)
    left.set(xlabel="step", ylabel="training loss (nats)", title=f"{data['model']}, {data['stage']}")
    title = "fp8 to same; same to another seed" + (" (emulated FP8)" if data["emulated"] else "")
    right.set(xlabel="step", ylabel="relative distance", title=title)
    for axis in (left, right):
        axis.legend(fontsize=7)
        axis.grid(alpha=0.25)
    return drawn


BENCHMARK = Benchmark(
    name="fp8_parity",
    doc=__doc__,
    quick="two steps of a small random model, a check of the benchmark itself",
    options={
        "overrides": {"nargs": "*", "metavar": "key=value", "help": "recipe overrides, for all runs alike"},
        "--model": {"choices": tuple(MODELS), "help": "default: smollm2"},
        "--stage": {"choices": ("mntp", "simcse", "supervised"), "default": "mntp"},
        "--steps": {"type": int, "help": "default: 40"},
        "--seeds": {"type": int, "help": "pairs of trainings (default: 3)"},
        "--work": {
            "type": Path,
            "help": "folder for the trainings; called again with it, they resume where they stopped",
        },
        "--texts": {"type": int, "default": 120, "help": "held-out texts whose vectors are compared"},
    },
    any_device=False,
    run=run_all,
)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
