"""Score encoders, baselines and the stages of a run; results are kept, and an interrupted run resumes."""

from __future__ import annotations

import argparse
import functools
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mteb
import torch
from rich.console import Console
from rich.markdown import Markdown

from l2v.errors import RecipeError, UserError
from l2v.evaluation import report as reports
from l2v.evaluation.baselines import baseline
from l2v.evaluation.model import EncoderSpec, MtebEncoder
from l2v.evaluation.prompts import Prompts
from l2v.evaluation.run import Row, run_model
from l2v.evaluation.select import select
from l2v.runs.folder import is_stage, stage_folders, trained_stages

POOLINGS = ("mean", "weighted_mean", "last")
ATTENTIONS = ("causal", "bidirectional")
RAW = {"causal": "untrained, causal", "bidirectional": "untrained, bidirectional"}


Maker = tuple[str, str, Callable[[], Any]]
"""A row to compute: its name, what it is made from, and a function that loads the model."""


def evaluate(args: argparse.Namespace, argv: list[str] | None) -> int:
    """Score the models of the command line on the tasks, write the tables; the exit code.

    Raises:
        UserError: if no task or no model is left.
        RecipeError: if an argument is wrong.
    """
    console = Console(soft_wrap=True)

    def log(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    prompts = Prompts(args.prompts)
    names = args.benchmark or ["seb-da"]
    selected = select(names, args.data)
    out = Path(args.out) if args.out else _folder(args.models)
    not_built = {name: f"{name}: {why}; skipped" for name, why in selected.failed.items()}
    for text in [*selected.notes, *not_built.values()]:
        log(text)
    if not selected.tasks:
        raise UserError("no task is left to run")
    makers = _makers(args, prompts)
    facts = {
        "command": shlex.join(["l2v", "eval", *argv]) if argv is not None else None,
        "benchmark": names,
        "prompts": args.prompts,
        "local": selected.local,
        "notes": selected.notes,
        "not_built": not_built,
        "machine": _machine(),
    }
    rows, broken, report = _score_all(makers, selected.tasks, facts, out, again=args.again, log=log)
    log("")
    table = reports.markdown(report)
    console.print(Markdown(table) if console.is_terminal else table, markup=False, highlight=False)
    for row in rows:
        if row.empty_texts:
            log(f"{row.name}: {row.empty_texts} empty texts got a vector of zeros")
    failed = reports.count_failed(report) + len(broken) * len(selected.tasks)
    done = sum(len(row.scores) for row in rows)
    pictures = ", table.png" * bool(done) + ", own.png" * (out / "own.png").is_file()
    log(f"{done} results, {failed} skipped; {out}/results.json, table.md{pictures}")
    return 1 if failed else 0


def _makers(args: argparse.Namespace, prompts: Prompts) -> list[Maker]:
    """The baselines, then the encoders, in the order of the table."""
    processes = args.processes or max(1, torch.cuda.device_count())
    makers: list[Maker] = []
    for name in filter(None, (args.baselines or "").split(",")):
        makers.append((name, name, functools.partial(baseline, name)))
    for name, spec in specs(args):
        load = functools.partial(
            MtebEncoder, spec, name, prompts=prompts, normalize=args.normalize, batch_tokens=args.batch_tokens,
            processes=processes,
        )  # fmt: skip
        makers.append((name, spec.source, load))
    return makers


def _score_all(
    makers: Sequence[Maker],
    tasks: Sequence[Any],
    facts: dict[str, Any],
    out: Path,
    *,
    again: bool,
    log: Callable[[str], None],
) -> tuple[list[Row], dict[str, str], dict[str, Any]]:
    """Run every model; returns the rows, a sentence for each model that could not be loaded, and the report.

    The report is written after every model, so an interrupted run leaves its table.
    """
    names = [task.metadata.name for task in tasks]
    rows: list[Row] = []
    broken: dict[str, str] = {}
    missing: dict[str, str] = {}
    report: dict[str, Any] = {}
    for name, source, make in makers:
        try:
            if source in missing:  # requested already, with all retries of the hub
                raise UserError(missing[source])
            model = make()
        except UserError as error:
            missing[source] = str(error)
            broken[name] = f"{name}: {error}; skipped"
            log(broken[name])
            continue
        rows.append(run_model(model, tasks, out / "cache", log=log, again=again))
        report = reports.as_json(rows, names, facts | {"models_left_out": broken})
        reports.write(report, out)
    if not rows:
        raise UserError("no model could be loaded")
    return rows, broken, report


def _folder(models: Sequence[str]) -> Path:
    """The folder eval/ in the first model if it is a run or a stage, else eval-results in the working directory."""
    first = Path(models[0]) if models else None
    if first is not None and (is_stage(first) or stage_folders(first)):
        return first / "eval"
    return Path("eval-results")


def specs(args: argparse.Namespace) -> list[tuple[str, Any]]:
    """Name and spec of every row that is an encoder, in the order of the table."""
    common = {k: v for k in ("pooling", "length", "precision") if (v := getattr(args, k)) is not None}
    if args.trust_remote_code:
        common["trust_remote_code"] = True
    rows = []
    for model in args.models:
        prefix = f"{Path(model).name}, " if len(args.models) > 1 else ""
        if args.stages:
            rows += [(prefix + name, source, common | more) for name, source, more in _stages(model)]
        else:
            name = "/".join(Path(model).parts[-2:]) if Path(model).exists() else model
            rows.append((name, model, common))
    what = set(filter(None, (args.ablations or "").split(",")))
    if unknown := what - {"attention", "pooling"}:
        raise RecipeError(f"--ablations {args.ablations}: '{unknown.pop()}' is unknown; use attention, pooling or both")
    out = {}
    for name, source, options in rows:
        for attention in ATTENTIONS if "attention" in what else [None]:
            for pooling in POOLINGS if "pooling" in what else [None]:
                if attention and options.get("attention") not in (None, attention):
                    continue  # the untrained rows of --stages are this ablation already
                chosen = {k: v for k, v in (("attention", attention), ("pooling", pooling)) if v}
                extra = [v for k, v in chosen.items() if not (k == "attention" and options.get("attention"))]
                full = ", ".join([name, *extra])
                out[full] = EncoderSpec(source, tuple(args.adapter), options | chosen)
    return list(out.items())


def _stages(run: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Rows of a run: its base causal and bidirectional, with the settings of the last stage, and every trained stage in order."""
    if not stage_folders(Path(run)):
        raise UserError(f"--stages needs a run; {run} has no stages")
    recipes = trained_stages(Path(run))
    trained = list(recipes)
    last = str(Path(run) / trained[-1])
    length = (
        recipes[trained[-1]].stages[trained[-1]].length
    )  # one length for all rows, or they would read different texts
    raw = [(RAW[attention], last, {"base_only": True, "attention": attention}) for attention in ATTENTIONS]
    stages: list[tuple[str, str, dict[str, Any]]] = [(name, str(Path(run) / name), {}) for name in trained]
    return [(name, source, {"length": length} | more) for name, source, more in raw + stages]


def _machine() -> dict[str, Any]:
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"accelerator": accelerator, "gpus": torch.cuda.device_count(), "mteb": mteb.__version__}
