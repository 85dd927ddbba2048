"""`l2v quickstart`: the whole recipe on the embedded default, scored on held-out questions, in about ten minutes on a laptop."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from l2v.data import sample
from l2v.data.sample import Question
from l2v.encoder import Encoder
from l2v.errors import UserError
from l2v.evaluation.intervals import compare
from l2v.evaluation.plots import loss_curves
from l2v.evaluation.retrieval import RetrievalResult, score, tfidf_scores
from l2v.machine import processor
from l2v.model.embedded import resolve
from l2v.model.load import dtype_of
from l2v.recipe import Recipe
from l2v.recipe.load import load_recipe
from l2v.runs.folder import run_folder
from l2v.runs.metrics import read_metrics

RECIPE = "smollm2-135m-da"
# Step counts are for 2 cores with at least this bf16 GEMM rate; a slower machine trains fewer steps.
REFERENCE_GFLOPS = 600.0
LEAST_SHARE = 0.1
SEARCHES = (
    "hvordan smitter hovedlus",
    "kan man køre i bil mellem byerne i Grønland",
    "trappen knirker om natten, hvad kan jeg selv gøre",
)
KINDS = ("plain", "colloquial", "disjoint")


def run_quickstart(overrides: Sequence[str], *, share: float | None, count: int | None, fresh: bool) -> None:
    """Train, evaluate, export, search; everything is written below the run's folder.

    overrides: of the recipe. share: of the recipe's steps; None chooses by the machine's speed. count: questions that are
    scored; None takes all held-out ones. fresh: train again even if the run exists.

    Raises:
        UserError: `count` is out of range, or training did not finish.
    """
    questions, passages = _held_out(count)
    began = time.perf_counter()
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    recipe = load_recipe(RECIPE, overrides)
    run = run_folder(recipe)
    recipe, own = _fit_to_machine(recipe, list(overrides), share, run, console)
    resolve(recipe.base.model)
    _train(own, fresh)
    trained = time.perf_counter() - began
    results, encoders, passages_ME = evaluate(recipe, run, console, questions, passages)
    report = summarize(results, run, recipe, questions, len(passages))
    loss_curves(run, recipe.order(), run / "loss.png")
    for stage in ("simcse", "supervised"):
        encoders[stage].save(run / f"encoder-{stage}")
    console.print(render(report))
    console.print("")
    for query in SEARCHES:
        show_search(console, encoders["supervised"], query, passages, passages_ME, top=2)
    report["seconds"] = {"training": round(trained, 1), "all": round(time.perf_counter() - began, 1)}
    report["machine"] = machine(recipe)
    report["steps"] = {name: stage.steps for name, stage in recipe.stages.items()}
    (run / "quickstart.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (run / "quickstart.md").write_text(markdown(report), encoding="utf-8")
    console.print(
        f"\n{report['seconds']['all']:.0f} s in total ({report['seconds']['training']:.0f} s training). "
        f"Scores: {run}/quickstart.json, "
        f"curves: {run}/loss.png, TensorBoard: {run}/*/tensorboard, encoders: {run}/encoder-*\n"
        f'Search it yourself: l2v search {run} "hvad skal jeg gøre ved lus"'
    )


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
    recipe: Recipe, overrides: list[str], share: float | None, run: Path, console: Console
) -> tuple[Recipe, list[str]]:
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
        + (f"; trains {share:.0%} of the recipe's steps so that ten minutes are enough" if share < 1 else "")
    )
    given = {text.split("=", 1)[0] for text in overrides}
    for name, stage in recipe.stages.items():
        if share < 1 and not given & {f"stages.{name}.steps", f"{name}.steps"}:
            overrides.append(f"stages.{name}.steps={max(2, round(stage.steps * share))}")
    run.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({"share": share}) + "\n", encoding="utf-8")
    return load_recipe(RECIPE, overrides), overrides


def _train(overrides: list[str], fresh: bool) -> None:
    command = [sys.executable, "-m", "l2v.train", RECIPE, *overrides, *(["--fresh"] if fresh else [])]
    with subprocess.Popen(command) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:  # it saves a checkpoint first and logs it
            process.send_signal(signal.SIGINT)
            code = process.wait()
    if code:
        raise UserError("training did not finish; see its message above. The same command resumes it")


def evaluate(
    recipe: Recipe, run: Path, console: Console, questions: list[Question], passages: list[sample.Passage]
) -> tuple[list[RetrievalResult], dict[str, Encoder], np.ndarray]:
    """Questions against passages: TF-IDF, the untrained model causal and bidirectional, every stage.

    Returns results, the encoder of every stage, and the passages' vectors by the last of them, float32 [M, E].
    """
    texts, queries = [p.text for p in passages], [q.query for q in questions]
    position = {p.id: at for at, p in enumerate(passages)}
    relevant = [position[q.positive] for q in questions]
    results = [score("TF-IDF (characters)", tfidf_scores(queries, texts), relevant)]
    length = recipe.stages["supervised"].length
    encoders: dict[str, Encoder] = {}
    base: dict[str, Any] = {"length": length, "precision": recipe.base.precision, "template": recipe.base.template}
    makers: dict[str, Callable[[], Encoder]] = {
        "untrained, causal": partial(Encoder.from_pretrained, recipe.base.model, attention="causal", **base),
        "untrained, bidirectional": partial(Encoder.from_pretrained, recipe.base.model, **base),
        **{stage: partial(Encoder.from_pretrained, run / stage, length=length) for stage in recipe.order()},
    }
    for name, make in makers.items():
        encoder = make()
        console.print(f"evaluating {name}", style="dim")
        queries_NE = encoder.encode(queries, show_progress=True)
        passages_ME = encoder.encode(texts, show_progress=True)
        results.append(score(name, queries_NE @ passages_ME.T, relevant))
        if name in recipe.stages:
            encoders[name] = encoder
    return results, encoders, passages_ME


def summarize(
    results: list[RetrievalResult], run: Path, recipe: Recipe, questions: list[Question], passages: int
) -> dict:
    """All rows, the comparisons between stages, and the change of the held-out cross-entropy by MNTP."""
    kinds = np.array([q.kind for q in questions])
    rows = []
    for result in results:
        by_kind = {f"ndcg_{kind}": float(result.ndcg[kinds == kind].mean()) for kind in KINDS}
        rows.append({"name": result.name, **result.summary(), **by_kind})
    by_name = {r.name: r for r in results}
    against = []
    for better, worse in (("simcse", "mntp"), ("supervised", "mntp"), ("supervised", "simcse")):
        against.append({"better": better, "than": worse, **compare(by_name[better].ndcg, by_name[worse].ndcg)})
    start = by_name["untrained, bidirectional"].ndcg.mean()
    covered = (by_name["supervised"].ndcg.mean() - start) / (1 - start)
    losses = [row["eval_loss"] for row in read_metrics(run / "mntp") if "eval_loss" in row]
    return {
        "queries": len(questions),
        "passages": passages,
        "rows": rows,
        "paired": against,
        "supervised_covers": float(covered),
        "mntp_held_out": {"before": losses[0], "after": losses[-1]} if losses else None,
    }


HEADINGS = ("", "nDCG@10", "95% interval", "plain", "colloquial", "no shared word", "recall@1", "margin")


def _cells(row: dict) -> list[str]:
    kinds = [f"{row[f'ndcg_{kind}']:.3f}" for kind in KINDS]
    interval = f"{row['ndcg_low']:.3f} to {row['ndcg_high']:.3f}"
    return [
        row["name"],
        f"{row['ndcg_at_10']:.3f}",
        interval,
        *kinds,
        f"{row['recall_at_1']:.3f}",
        f"{row['margin']:.3f}",
    ]


def render(report: dict) -> Table:
    """The table for the terminal."""
    table = Table(title=f"{report['queries']} held-out questions against {report['passages']} passages")
    for at, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if at == 0 else "right")
    for row in report["rows"]:
        table.add_row(*_cells(row))
    return table


def markdown(report: dict) -> str:
    """The table for a README, with the notes below it."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|-|" + "-:|" * (len(HEADINGS) - 1)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in report["rows"]]
    held_out = report["mntp_held_out"]
    if held_out:
        lines += ["", f"MNTP held-out cross-entropy: {held_out['before']:.2f} to {held_out['after']:.2f} nats."]
    for pair in report["paired"]:
        lines.append(
            f"{pair['better']} above {pair['than']}: {pair['difference']:+.3f} nDCG@10 "
            f"(paired bootstrap, 95%: {pair['low']:+.3f} to {pair['high']:+.3f})."
        )
    seconds, on = report["seconds"], report["machine"]
    where = f"{on['cores']} cores of {on['processor']}" if on["accelerator"] == "none" else on["accelerator"]
    lines.append(
        f"{seconds['all']:.0f} s in total, {seconds['training']:.0f} s of it training, on {where} in {on['precision']}."
    )
    return "\n".join(lines) + "\n"


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
