"""`l2v quickstart`: the whole recipe on an embedded base, scored on held-out questions, in minutes on a laptop."""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from l2v.data import sample
from l2v.data.sample import Question
from l2v.encoder import Encoder
from l2v.errors import UserError
from l2v.evaluation.plots import loss_curves
from l2v.machine import processor
from l2v.model.embedded import GEMMA, SMOLLM2, resolve
from l2v.model.load import dtype_of
from l2v.quickstart.scores import CAUSAL, TFIDF, UNTRAINED, Scores
from l2v.quickstart.table import Printed, markdown
from l2v.recipe import Recipe
from l2v.recipe.load import load_recipe
from l2v.runs.folder import run_folder
from l2v.runs.metrics import read_metrics

RECIPES = {GEMMA: "gemma-3-270m-da", SMOLLM2: "smollm2-135m-da"}
"""The recipe of each base that `base=NAME` chooses; the first is the default."""
MINUTES = 10
# Step counts are for 2 cores with at least this bf16 GEMM rate; a slower machine trains fewer steps.
REFERENCE_GFLOPS = 600.0
LEAST_SHARE = 0.1
SEARCHES = (
    "hvordan smitter hovedlus",
    "kan man køre i bil mellem byerne i Grønland",
    "trappen knirker om natten, hvad kan jeg selv gøre",
)


def run_quickstart(overrides: Sequence[str], *, share: float | None, count: int | None, fresh: bool) -> None:
    """Train, evaluate, export, search; everything is written below the run's folder.

    overrides: of the recipe; `base=NAME` chooses the base and its recipe. share: of the recipe's steps; None chooses by the
    machine's speed. count: questions that are scored; None takes all held-out ones. fresh: train again even if the run exists.

    Raises:
        UserError: the base is not here or has no recipe, `count` is out of range, or training did not finish.
    """
    questions, passages = _held_out(count)
    name, overrides = choose_recipe(overrides)
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    recipe = load_recipe(name, overrides)
    resolve(recipe.base.model)
    began = time.perf_counter()
    run = run_folder(recipe)
    recipe, own = _fit_to_machine(name, recipe, overrides, share, run, console)
    table = Printed(
        console,
        f"{len(questions)} held-out questions against {len(passages)} passages, each cut at {_scoring(recipe)['length']} tokens",
    )
    scores = Scores(questions, passages, table.add)
    score_untrained(recipe, scores)
    training = time.perf_counter()
    train_stages(name, own, fresh)
    trained = time.perf_counter() - training
    encoder = score_stages(recipe, run, scores)
    loss_curves(run, recipe.order(), run / "loss.png")
    export = run / f"encoder-{recipe.order()[-1]}"
    encoder.save(export)
    report = summarize(scores, run, recipe)
    report["seconds"] = {
        "training": round(trained, 1), "scoring": round(scores.seconds, 1), "all": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    report["machine"] = machine(recipe)
    report["base"], report["seed"] = recipe.base.model, recipe.seed
    report["steps"] = {stage: settings.steps for stage, settings in recipe.stages.items()}
    (run / "quickstart.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (run / "quickstart.md").write_text(markdown(report), encoding="utf-8")
    seconds = report["seconds"]
    console.print(
        f"\n{seconds['all']:.0f} s in total ({seconds['training']:.0f} s training, {seconds['scoring']:.0f} s scoring). "
        f"Scores: {run}/quickstart.json, curves: {run}/loss.png, TensorBoard: {run}/*/tensorboard, encoder: {export}\n"
    )
    for query in SEARCHES:
        show_search(console, encoder, query, passages, scores.passages_ME, top=2)
    console.print(f'\nSearch it yourself: l2v search {run} "hvad skal jeg gøre ved lus"')


def choose_recipe(overrides: Sequence[str]) -> tuple[str, list[str]]:
    """The recipe of the base that `base=NAME` names, by default the first of RECIPES; and the other overrides.

    Raises:
        UserError: there is no recipe for that base.
    """
    chosen = [text.split("=", 1)[1] for text in overrides if text.startswith("base=")]
    name = chosen[-1] if chosen else next(iter(RECIPES))
    if name not in RECIPES:
        raise UserError(
            f"the quickstart has no recipe for the base '{name}'; choose base={' or base='.join(RECIPES)}, or write a recipe "
            "of your own with 'l2v init'"
        )
    return RECIPES[name], [text for text in overrides if not text.startswith("base=")]


def _held_out(count: int | None) -> tuple[list[Question], list[sample.Passage]]:
    """The held-out questions against all passages, or `count` of them, evenly spread, against their own passages."""
    questions, passages = sample.questions("heldout"), list(sample.passages().values())
    if count is None:
        return questions, passages
    if not 10 <= count <= len(questions):
        raise UserError(f"--questions is {count}; use 10 to {len(questions)}")
    questions = [questions[i * len(questions) // count] for i in range(count)]
    asked = {q.positive for q in questions}
    return questions, [p for p in passages if p.id in asked]


def machine(recipe: Recipe) -> dict[str, str | int | float]:
    """The machine on which the numbers were measured."""
    import transformers

    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "accelerator": accelerator,
        "precision": str(dtype_of(recipe.base.precision)).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
    }


def gemm_gflops(dtype: torch.dtype) -> float:
    """Measured rate of a GEMM with the shapes of training (GFLOP/s), best of five."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    x, w = torch.randn(1024, 576, device=where).to(dtype), torch.randn(1536, 576, device=where).to(dtype)
    best = 0.0
    for _ in range(6):  # the first one warms up
        began = time.perf_counter()
        for _ in range(10):
            torch.nn.functional.linear(x, w)
        if where == "cuda":
            torch.cuda.synchronize()
        best = max(best, 10 * 2 * 1024 * 576 * 1536 / (time.perf_counter() - began) / 1e9)
    return best


def _fit_to_machine(
    name: str, recipe: Recipe, overrides: list[str], share: float | None, run: Path, console: Console
) -> tuple[Recipe, list[str]]:
    """The recipe with as many steps as this machine makes in the time, and the overrides that say so."""
    dtype = dtype_of(recipe.base.precision)
    rate = gemm_gflops(dtype)
    kept = run / "share.json"
    if share is None and kept.is_file():  # a resumed run keeps its step counts
        share = json.loads(kept.read_text(encoding="utf-8"))["share"]
    if share is None:
        # encoding for the scores does not shrink, so training is cut more than proportionally
        share = min(1.0, max(LEAST_SHARE, round(1.2 * rate / REFERENCE_GFLOPS - 0.2, 1)))
    console.print(
        f"{recipe.name}: {str(dtype).removeprefix('torch.')}, {rate:.0f} GFLOP/s"
        + (f"; trains {share:.0%} of the recipe's steps so that {MINUTES} minutes are enough" if share < 1 else "")
    )
    given = {text.split("=", 1)[0] for text in overrides}
    for key, stage in recipe.stages.items():
        if share < 1 and not given & {f"stages.{key}.steps", f"{key}.steps"}:
            overrides.append(f"stages.{key}.steps={max(2, round(stage.steps * share))}")
    run.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({"share": share}) + "\n", encoding="utf-8")
    return load_recipe(name, overrides), overrides


def train_stages(name: str, overrides: list[str], fresh: bool) -> None:
    """Train all stages of a recipe with `l2v train`.

    Raises:
        UserError: it did not finish.
    """
    command = [sys.executable, "-m", "l2v.train", name, *overrides, *(["--fresh"] if fresh else [])]
    with subprocess.Popen(command) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:  # it saves a checkpoint first and logs it
            process.send_signal(signal.SIGINT)
            code = process.wait()
    if code:
        raise UserError("training did not finish; see its message above. The same command resumes it")


def _scoring(recipe: Recipe) -> dict[str, Any]:
    """Length and precision of the encoders that are scored: bf16 where the stages train in it, which takes half the time."""
    last = recipe.stages[recipe.order()[-1]]
    precision = "bf16" if dtype_of(recipe.base.precision) == torch.bfloat16 else "fp32"
    return {"length": last.length, "precision": precision}


def score_untrained(recipe: Recipe, scores: Scores) -> None:
    """TF-IDF, and the base before training, with causal and with bidirectional attention."""
    scores.add_tfidf()
    how = _scoring(recipe) | {"template": recipe.base.template}
    for name, attention in ((CAUSAL, "causal"), (UNTRAINED, "bidirectional")):
        scores.add_model(name, Encoder.from_pretrained(recipe.base.model, attention=attention, **how))


def score_stages(recipe: Recipe, run: Path, scores: Scores) -> Encoder:
    """Every stage, and TF-IDF fused with the last one; returns the encoder of the last."""
    for stage in recipe.order():
        encoder = Encoder.from_pretrained(run / stage, **_scoring(recipe))
        scores.add_model(stage, encoder)
    scores.add_fused(fused_row(recipe))
    return encoder


def fused_row(recipe: Recipe) -> str:
    """The name of the row of TF-IDF and the last stage together."""
    return f"TF-IDF + {recipe.order()[-1]}"


def summarize(scores: Scores, run: Path, recipe: Recipe) -> dict[str, Any]:
    """All rows, the differences that the table invites to read, and the change of the held-out cross-entropy by MNTP."""
    order = recipe.order()
    last, fused = order[-1], fused_row(recipe)
    pairs = [*zip(order, [UNTRAINED, *order[:-1]], strict=True), (last, TFIDF), (fused, TFIDF), (fused, last)]
    losses = [row["eval_loss"] for row in read_metrics(run / order[0]) if "eval_loss" in row]
    rows = [
        {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in row.items()} for row in scores.rows()
    ]
    return {
        "queries": len(scores.questions),
        "passages": len(scores.passages),
        "rows": rows,
        "paired": [scores.compared(better, worse) for better, worse in pairs],
        "mntp_held_out": {"before": losses[0], "after": losses[-1]} if losses else None,
    }


def show_search(
    console: Console,
    encoder: Encoder,
    query: str,
    passages: list[sample.Passage],
    passages_ME: np.ndarray,
    *,
    top: int,
) -> None:
    """Print the passages nearest to a query."""
    scores_M = passages_ME @ encoder.encode(query)
    console.print(f"[bold]{query}[/bold]", highlight=False)
    for at in np.argsort(-scores_M)[:top]:
        console.print(f"  {scores_M[at]:.3f}  {passages[at].text}", highlight=False, markup=False)
