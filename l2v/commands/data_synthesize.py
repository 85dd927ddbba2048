"""`l2v data synthesize PASSAGES --out FILE --model NAME [--endpoint URL]`: queries for passages, kept if they find them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from l2v.errors import RecipeError
from l2v.mining.arguments import add_source
from l2v.synthesis.synthesize import synthesize
from l2v.synthesis.wording import STYLES


def main(argv: Sequence[str] | None = None) -> int:
    """Let a language model write Danish queries for passages, and keep those that find their passage again."""
    args = _parser().parse_intermixed_args(argv)
    _check(args)
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


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="l2v data synthesize", description=main.__doc__)
    p.add_argument("passages", help="passages: a JSONL, Parquet or text file, sample:da/train or hub:NAME")
    p.add_argument("--out", required=True, help=".jsonl or .parquet: query, positive, instruction, style, rank")
    p.add_argument(
        "--model", required=True, help="the endpoint's name of a model; without --endpoint, one of transformers"
    )
    p.add_argument(
        "--endpoint", metavar="URL", help="an OpenAI-compatible endpoint, for example http://127.0.0.1:8000/v1"
    )
    p.add_argument(
        "--key-from", default="OPENAI_API_KEY", metavar="NAME",
        help="environment variable that holds the endpoint's key (default: OPENAI_API_KEY)",
    )  # fmt: skip
    p.add_argument("--number", type=int, default=1, help="queries of a passage (default: 1)")
    p.add_argument(
        "--styles", nargs="+", choices=tuple(STYLES), default=list(STYLES), help="how they ask (default: all)"
    )
    p.add_argument(
        "--filter", default="bm25", metavar="bm25|none|ENCODER",
        help="keep a query if its passage is among the first that this finds (default: bm25)",
    )  # fmt: skip
    p.add_argument("--top", type=int, default=3, help="so many first ones (default: 3)")
    p.add_argument("--seed", type=int, default=42, help="styles and noise are a function of it (default: 42)")
    p.add_argument("--temperature", type=float, default=0.7, help="0 for no noise (default: 0.7)")
    p.add_argument("--most-tokens", type=int, default=64, help="longest answer (default: 64 tokens)")
    p.add_argument("--concurrency", type=int, default=8, help="questions at the endpoint at a time (default: 8)")
    p.add_argument(
        "--retries", type=int, default=4, help="further tries after errors and malformed answers (default: 4)"
    )
    p.add_argument("--timeout", type=float, default=60.0, help="seconds an answer may take (default: 60)")
    p.add_argument("--skip-failed", action="store_true", help="finish without the queries that failed")
    p.add_argument(
        "--price", type=float, nargs=2, metavar=("READ", "WRITTEN"), help="price of a million tokens, for the sum"
    )
    p.add_argument("--batch", type=int, default=8, help="passages at a time with a local model (default: 8)")
    add_source(p, pairs=False)
    return p
