"""Score encoders, baselines and the stages of a run; results are kept, and a run that was stopped continues."""

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


def evaluate(args: argparse.Namespace, argv: list[str] | None) -> int:
    console = Console(soft_wrap=True)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    prompts = Prompts(args.prompts)
    names = args.benchmark or ["seb-da"]
    selected = select(names, args.data)
    out = Path(args.out) if args.out else _folder(args.models)
    for text in [*selected.notes, *(f"{name}: {why}; left out" for name, why in selected.failed.items())]:
        say(text)
    if not selected.tasks:
        raise UserError("no task is left to run")
    processes = args.processes or max(1, torch.cuda.device_count())
    makers: list[tuple[str, str, Callable[[], Any]]] = []  # name of the row, what it is made from, how
    for name in filter(None, (args.baselines or "").split(",")):
        makers.append((name, name, functools.partial(baseline, name)))
    for name, spec in specs(args):
        load = functools.partial(
            MtebEncoder, spec, name, prompts=prompts, normalize=args.normalize, batch_tokens=args.batch_tokens,
            processes=processes,
        )  # fmt: skip
        makers.append((name, spec.source, load))
    tasks = [task.metadata.name for task in selected.tasks]
    facts = {
        "command": shlex.join(["l2v", "eval", *argv]) if argv is not None else None,
        "benchmark": names,
        "prompts": args.prompts,
        "local": selected.local,
        "notes": selected.notes,
        "not_built": {name: f"{name}: {why}; left out" for name, why in selected.failed.items()},
        "machine": _machine(),
    }
    rows: list[Row] = []
    broken: dict[str, str] = {}
    gone: dict[str, str] = {}
    for name, source, make in makers:
        try:
            if source in gone:  # asked for already, with all the retries of a hub
                raise UserError(gone[source])
            model = make()
        except UserError as error:
            gone[source] = str(error)
            broken[name] = f"{name}: {error}; left out"
            say(broken[name])
            continue
        rows.append(run_model(model, selected.tasks, out / "cache", say=say, again=args.again))
        report = reports.as_json(rows, tasks, facts | {"models_left_out": broken})
        reports.write(report, out)  # after every model: a run that is stopped leaves its table
    if not rows:
        raise UserError("no model could be loaded")
    say("")
    table = reports.markdown(report)
    console.print(Markdown(table) if console.is_terminal else table, markup=False, highlight=False)
    for row in rows:
        if row.empty_texts:
            say(f"{row.name}: {row.empty_texts} empty texts got a vector of zeros")
    failed = reports.count_failed(report) + len(broken) * len(tasks)
    done = sum(len(row.scores) for row in rows)
    say(f"{done} results, {failed} left out; {out}/results.json, table.md{', table.png' if done else ''}")
    return 1 if failed else 0


def _folder(models: Sequence[str]) -> Path:
    """Beside the first model where it is a folder that is ours, else in the working directory."""
    first = Path(models[0]) if models else None
    if first is not None and (is_stage(first) or stage_folders(first)):
        return first / "eval"
    return Path("eval-results")


def specs(args: argparse.Namespace) -> list[tuple[str, Any]]:
    """Name and way to load of every row that is an encoder, in the order of the table."""
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
    """Rows of a run: its base causal and bidirectional, read as its last stage reads, and every trained stage in order."""
    if not stage_folders(Path(run)):
        raise UserError(f"--stages needs a run; {run} has no stage below it")
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
