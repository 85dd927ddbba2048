"""`l2v data synthesize PASSAGES --out FILE --model NAME [--endpoint URL]`: queries for passages, kept if they find it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from l2v.commands.parser import add_loading, new_parser
from l2v.errors import RecipeError
from l2v.mining.arguments import add_source
from l2v.runs.names import check_model
from l2v.synthesis.synthesize import synthesize
from l2v.synthesis.wording import STYLES


def main(argv: Sequence[str] | None = None) -> int:
    """Let a language model write Danish queries for passages, and keep those that find their passage."""
    args = parser().parse_intermixed_args(argv)
    _check(args)
    if args.filter not in ("bm25", "none"):
        check_model(args.filter)
    print(synthesize(args))
    return 0


def _check(args: argparse.Namespace) -> None:
    for name in ("number", "top", "concurrency", "batch", "most_tokens"):
        if getattr(args, name) < 1:
            raise RecipeError(f"--{name.replace('_', '-')} is {getattr(args, name)} and must be at least 1")
    if args.retries < 0:
        raise RecipeError(f"--retries is {args.retries} and must not be negative")
    if args.timeout <= 0:
        raise RecipeError(f"--timeout is {args.timeout:g} and must be above 0 seconds")
    if not 0 <= args.temperature <= 2:
        raise RecipeError(f"--temperature is {args.temperature:g}; use 0 up to 2")


def parser() -> argparse.ArgumentParser:
    """The arguments of `l2v data synthesize`."""
    p = new_parser(
        "data synthesize", "Let a language model write Danish queries for passages, and keep those that find their passage.",
        "passages.jsonl --out pairs.jsonl --model NAME --endpoint http://127.0.0.1:8000/v1",
    )  # fmt: skip
    p.add_argument(
        "passages", metavar="PASSAGES", help="a CSV, JSONL, Parquet or text file, sample:da/train or hub:NAME"
    )
    p.add_argument(
        "--out", required=True, metavar="FILE", help=".jsonl or .parquet: query, positive, instruction, style, rank"
    )
    p.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="a model of the endpoint; without --endpoint, one of transformers",
    )
    p.add_argument(
        "--endpoint", metavar="URL", help="an OpenAI-compatible endpoint, for example http://127.0.0.1:8000/v1"
    )
    p.add_argument(
        "--key-from", default="OPENAI_API_KEY", metavar="NAME",
        help="environment variable that holds the endpoint's key (default: OPENAI_API_KEY)",
    )  # fmt: skip
    p.add_argument("--number", type=int, default=1, metavar="N", help="queries a passage (default: 1)")
    p.add_argument(
        "--styles", nargs="+", choices=tuple(STYLES), default=list(STYLES), help="styles of the queries (default: all)"
    )
    p.add_argument(
        "--filter", default="bm25", metavar="bm25|none|MODEL",
        help="keep a query if this search ranks its passage among the first (default: bm25)",
    )  # fmt: skip
    p.add_argument("--top", type=int, default=3, metavar="N", help="ranks that count as found (default: 3)")
    p.add_argument("--seed", type=int, default=42, metavar="N", help="seed of styles and sampling (default: 42)")
    p.add_argument("--temperature", type=float, default=0.7, metavar="X", help="0 for greedy answers (default: 0.7)")
    p.add_argument("--most-tokens", type=int, default=64, metavar="N", help="longest answer in tokens (default: 64)")
    p.add_argument("--concurrency", type=int, default=8, metavar="N", help="parallel requests (default: 8)")
    p.add_argument(
        "--retries",
        type=int,
        default=4,
        metavar="N",
        help="further tries after errors and malformed answers (default: 4)",
    )
    p.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="time limit of an answer (default: 60)"
    )
    p.add_argument("--skip-failed", action="store_true", help="finish without the queries that failed")
    p.add_argument(
        "--price", type=float, nargs=2, metavar=("READ", "WRITTEN"), help="price of a million tokens, for the total"
    )
    p.add_argument(
        "--batch", type=int, default=8, metavar="N", help="passages at a time with a local model (default: 8)"
    )
    add_loading(p, precision=False)
    add_source(p, pairs=False)
    return p
