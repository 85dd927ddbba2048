"""`l2v serve MODEL`: vectors over HTTP with OpenAI's interface."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from l2v.commands.parser import add_loading, new_parser
from l2v.errors import RecipeError, UserError
from l2v.runs.names import check_model

LOCAL = ("127.0.0.1", "localhost", "::1")


def main(argv: Sequence[str] | None = None) -> int:
    """Serve an encoder until SIGTERM or an interrupt."""
    args = parser().parse_intermixed_args(argv)
    for key in ("batch_tokens", "max_queue_tokens", "max_inputs", "max_tokens", "max_body", "threads", "length"):
        if (value := getattr(args, key)) is not None and value < 1:
            raise RecipeError(f"--{key.replace('_', '-')} is {value}; use 1 or more")
    if args.max_wait_ms < 0:
        raise RecipeError(f"--max-wait-ms is {args.max_wait_ms}; use 0 or more")
    if not 0 <= args.port <= 65535:
        raise RecipeError(f"--port is {args.port}; use 0 to 65535 (0 for any that is free)")
    check_model(args.model)
    try:
        from l2v.serving.server import Settings, bound, serve
    except ImportError as error:
        raise UserError(f"l2v serve needs the package {error.name}: pip install 'l2v[serve]'") from None
    from l2v.encoder import Encoder
    from l2v.serving.asked import Limits

    listening = bound(args.host, args.port)  # a taken port is reported before the model is loaded
    if args.host not in LOCAL:
        print(f"l2v: {args.host} is open to others, and this server asks nobody for a key", file=sys.stderr)
    encoder = Encoder.from_pretrained(
        args.model, args.adapter, precision=args.precision, length=args.length, trust_remote_code=args.trust_remote_code
    )
    dimensions = (*_dimensions(args.dimensions, encoder.dimension), *getattr(encoder, "matryoshka", ()))
    limits = Limits(args.max_inputs, args.max_tokens, args.max_body * 1_000_000, dimensions)
    settings = Settings(
        args.name or _name(args.model), args.batch_tokens, args.max_wait_ms, args.max_queue_tokens, limits, args.side,
        args.truncate, args.threads,
    )  # fmt: skip
    serve(encoder, listening, settings)
    return 0


def _name(model: str) -> str:
    """The last part of a folder's path; a name on the Hub as it is."""
    return Path(model).resolve().name if Path(model).exists() else model


def _dimensions(given: str | None, width: int) -> tuple[int, ...]:
    try:
        found = tuple(int(number) for number in (given or "").split(",") if number.strip())
    except ValueError:
        raise RecipeError(f"--dimensions {given}: give whole numbers, separated by commas") from None
    if wrong := [number for number in found if not 1 <= number <= width]:
        raise RecipeError(f"--dimensions {given}: {wrong[0]} is not from 1 to {width}, the width of the vectors")
    return found


def parser() -> argparse.ArgumentParser:
    """The arguments of `l2v serve`."""
    p = new_parser(
        "serve", "Serve vectors over HTTP with OpenAI's interface, for evaluation and development.",
        "runs/faq", "my-encoder --port 8080 --dimensions 256,128 --truncate",
    )  # fmt: skip
    p.add_argument("model", metavar="MODEL", help="a run, a stage of it, an export or a base")
    p.add_argument("--host", default="127.0.0.1", metavar="NAME", help="address to listen on (default: 127.0.0.1)")
    p.add_argument("--port", type=int, default=8000, metavar="N", help="port; 0 for any that is free (default: 8000)")
    p.add_argument("--name", metavar="NAME", help="the model's name in requests (default: the last part of MODEL)")
    p.add_argument(
        "--side", choices=["query", "document"],
        help="whose instruction precedes texts of requests without input_type (default: none)",
    )  # fmt: skip
    p.add_argument("--dimensions", metavar="N", help="shorter vectors that requests may ask for, such as 256,128")
    p.add_argument(
        "--truncate", action="store_true", help="cut texts that are too long; without it they get status 413"
    )
    p.add_argument(
        "--batch-tokens", type=int, default=16384, metavar="N", help="tokens in one forward (default: 16384)"
    )
    p.add_argument(
        "--max-wait-ms", type=float, default=5.0, metavar="N",
        help="how long a lone text waits for others, in milliseconds (default: 5.0)",
    )  # fmt: skip
    p.add_argument(
        "--max-queue-tokens", type=int, default=1 << 20, metavar="N",
        help="tokens that may wait; then requests get status 429 (default: 1048576)",
    )  # fmt: skip
    p.add_argument("--max-inputs", type=int, default=2048, metavar="N", help="texts of a request (default: 2048)")
    p.add_argument("--max-tokens", type=int, default=300_000, metavar="N", help="tokens of a request (default: 300000)")
    p.add_argument("--max-body", type=int, default=16, metavar="MB", help="size of a request's body (default: 16)")
    p.add_argument("--threads", type=int, metavar="N", help="of the model on a CPU (default: all cores but one)")
    p.add_argument("--adapter", action="append", default=[], metavar="NAME", help="a further adapter, merged in order")
    p.add_argument("--length", type=int, metavar="N", help="tokens of a text (default: the run's, or 512)")
    add_loading(p)
    return p
