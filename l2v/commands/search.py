"""`l2v search RUN "tekst"`: semantic search from the shell."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from l2v.commands.parser import new_parser
from l2v.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Find the texts nearest to a query; vectors of a corpus are kept next to the run for the next search."""
    args = parser().parse_intermixed_args(argv)
    # Imported here: help and mistakes in the arguments need no torch.
    from l2v.search import nearest, read_corpus

    if not args.query.strip():
        raise UserError("the query is empty; give a text to search for")
    if args.top < 1:
        raise UserError(f"--top is {args.top}; show at least 1")
    notes: list[str] = []
    texts = read_corpus(args.texts, args.column, notes)
    for note in notes:
        print(note, file=sys.stderr)
    console = Console(soft_wrap=True)
    for score, text in nearest(args.run, args.query, texts, instruction=args.instruction, top=args.top):
        console.print(f"{score:.3f}  {text}", highlight=False, markup=False)
    return 0


def parser() -> argparse.ArgumentParser:
    """The arguments of `l2v search`."""
    p = new_parser(
        "search", "Find the texts nearest to a query; the vectors of a corpus are kept next to the run.",
        'runs/smollm2-135m-da "hvordan slipper jeg af med lus"', 'my-encoder "feriedage" --texts texts.txt --top 5',
    )  # fmt: skip
    p.add_argument("run", metavar="MODEL", help="a run, a stage of it, an export or a base")
    p.add_argument("query", metavar="QUERY", help="what to look for")
    p.add_argument(
        "--texts",
        metavar="FILE",
        help="CSV, JSONL, Parquet or text file to search (default: the passages of the Danish sample)",
    )
    p.add_argument(
        "--column", default="text", metavar="COLUMN",
        help="the field that holds the text (default: text, or a common name like it)",
    )  # fmt: skip
    p.add_argument("--instruction", metavar="TEXT", help="instruction before the query")
    p.add_argument("--top", type=int, default=3, metavar="N", help="how many to show (default: 3)")
    return p
