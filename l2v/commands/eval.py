"""`l2v eval RUN|MODEL...`: scores on the Danish SEB tasks, on any task of mteb, on files; the published table."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from l2v.commands.parser import add_loading, new_parser, next_step, quoted
from l2v.errors import RecipeError, UserError
from l2v.runs.folder import is_stage, stage_folders

POOLINGS = ("mean", "weighted_mean", "last", "first")


def main(argv: Sequence[str] | None = None) -> int:
    """Score encoders; results are kept next to the run, and the same command resumes."""
    args = parser().parse_intermixed_args(argv)
    needs_mteb()
    if args.published:
        return _published(args)
    if not args.models and not args.baselines:
        raise RecipeError("name a run, a stage of it, a model or --baselines (or --published for the published table)")
    for key in ("processes", "batch_tokens", "length"):
        if (value := getattr(args, key)) is not None and value < 1:
            raise RecipeError(f"--{key.replace('_', '-')} is {value}; use 1 or more")
    local = [name.removeprefix("local:") for name in args.benchmark or () if name.startswith("local:")]
    if args.data and not local:
        raise RecipeError(
            f"--data is the folder of a local manifest's files; for own questions: --benchmark local:{args.data}"
        )
    for name in local:
        if name != "sample" and not Path(name).exists():
            raise UserError(f"local:{name}: no such file, folder or manifest")
    from l2v.evaluation.score import evaluate

    code = evaluate(args, list(argv) if argv is not None else None)
    print(_next(args))
    return code


def _next(args: argparse.Namespace) -> str:
    """A report of a run; for other encoders, a score on own files, or a search."""
    own = any(name.startswith("local:") for name in args.benchmark or ())
    first = args.models[0] if args.models else None
    if first is not None:
        run = Path(first).parent if is_stage(Path(first)) else Path(first)
        if stage_folders(run):
            return next_step(quoted("l2v", "report", run))
    if first is not None and own:
        return next_step(f"l2v search {quoted(first)} QUERY --texts FILE")
    return next_step(f"l2v eval {quoted(first or 'RUN')} --baselines tfidf --benchmark local:FOLDER")


def needs_mteb() -> None:
    """Check that mteb is installed.

    Raises:
        UserError: if it is not; the message gives the command that installs it.
    """
    try:
        import mteb  # noqa: F401
    except ImportError:
        raise UserError("evaluation needs mteb: pip install 'l2v[eval,export]'") from None


def parser() -> argparse.ArgumentParser:
    """The arguments of `l2v eval`."""
    p = new_parser(
        "eval", "Score encoders on SEB's Danish tasks, any task of mteb, or your own files; results are kept.",
        "runs/llama3-8b-da --stages --baselines tfidf", "runs/mine --benchmark local:my-folder", "--published",
    )  # fmt: skip
    p.add_argument("models", nargs="*", metavar="MODEL", help="runs, stages (runs/NAME/STAGE), exports or bases")
    p.add_argument(
        "--benchmark", action="append", metavar="NAME",
        help="seb-da (the 12 Danish tasks of SEB), scandinavian, a task or benchmark of mteb, local:FOLDER, "
        "local:MANIFEST.yaml or local:sample; may be repeated (default: seb-da)",
    )  # fmt: skip
    p.add_argument("--data", metavar="FOLDER", help="where the files of a local manifest are (default: next to it)")
    p.add_argument(
        "--stages", action="store_true", help="of each run: the base causal and bidirectional, then every stage"
    )
    p.add_argument(
        "--ablations", nargs="?", const="attention,pooling", metavar="WHAT",
        help="attention, pooling or both: each model with causal and bidirectional attention, and with mean, "
        "weighted_mean and last pooling (default: both)",
    )  # fmt: skip
    p.add_argument(
        "--baselines",
        metavar="NAMES",
        help="tfidf, minilm, sentence-transformers models (NAME or NAME=FOLDER), or URL#MODEL of an OpenAI-compatible endpoint; "
        "separated by commas",
    )
    p.add_argument(
        "--prompts",
        default="en",
        metavar="WHICH",
        help="en, da (the words of training), trained (the encoder's own alone), mteb (only its own), off, or a YAML file by "
        "task (default: en)",
    )
    p.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME",
        help="a further adapter on each model, merged in order",
    )
    p.add_argument("--pooling", choices=POOLINGS, help="pooling (default: the run's)")
    p.add_argument("--length", type=int, metavar="N", help="tokens of a text (default: the run's, or 512)")
    add_loading(p)
    p.add_argument(
        "--normalize", action="store_true", help="vectors of norm 1 (matters to classification and clusters)"
    )
    p.add_argument(
        "--batch-tokens", type=int, metavar="N", help="tokens in one forward (default: 16384; on a CPU 512 a core)"
    )
    p.add_argument("--processes", type=int, metavar="N", help="encoding processes (default: one for each GPU)")
    p.add_argument("--out", metavar="FOLDER", help="where results go (default: RUN/eval, or eval-results)")
    p.add_argument("--again", action="store_true", help="recompute kept results")
    p.add_argument(
        "--published", action="store_true", help="the table of published models, means recomputed from cells"
    )
    p.add_argument("--results", metavar="PATH", help="wheel or folder of seb 0.13.11 (default: the installed package)")
    return p


def _published(args: argparse.Namespace) -> int:
    from l2v.evaluation import published

    rows = published.published(args.results)
    table = published.markdown(rows)
    Console(soft_wrap=True).print(Markdown(table) if os.isatty(1) else table, markup=False, highlight=False)
    if args.out:
        folder = Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "published.md").write_text(table, encoding="utf-8")
        text = json.dumps(published.as_json(rows), indent=1, ensure_ascii=False)
        (folder / "published.json").write_text(text + "\n", encoding="utf-8")
    return 0
