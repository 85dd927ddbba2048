"""`l2v data build CONFIG [key=value ...]`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from l2v.commands.parser import new_parser
from l2v.data.corpus import report
from l2v.data.corpus.config import config_folder, load_config
from l2v.data.corpus.run import Run
from l2v.errors import RecipeError, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Build a data set: Parquet, a card for the Hub, and a report of what was dropped and why.

    Stopped or killed, the same command goes on. The exit code is 1 if a source could not be read to its end; the same
    command then tries it again.
    """
    args = parser().parse_intermixed_args(argv)
    if args.workers is not None and args.workers < 1:
        raise RecipeError(f"--workers is {args.workers} and must be at least 1")
    config = load_config(args.config, args.overrides)
    out = Path(args.out or config.out or f"data/{config.name}").expanduser()
    begun = time.monotonic()
    try:
        done = Run(config, out, args.workers or len(os.sched_getaffinity(0))).build(fresh=args.fresh)
    except OSError as error:  # what a source raises when it is read is told by its reader
        said = error.strerror or str(error).splitlines()[0]
        raise UserError(
            f"{error.filename or out}: cannot be read or written: {said}; mend that and start the same command again"
        ) from None
    if done.get("already"):
        print(f"{out} is built already; --fresh builds it anew")
    print(report.summary(done))
    for sentence in report.problems(done):
        print(f"l2v: {sentence}", file=sys.stderr)
    print(f"{out}: Parquet, README.md (the card), report.md; {time.monotonic() - begun:.0f} s")
    return int(any(s["error"] for s in done["sources"]))


def parser() -> argparse.ArgumentParser:
    """The arguments of `l2v data build`."""
    known = ", ".join(sorted(p.stem for p in config_folder().glob("*.yaml")))
    p = new_parser(
        "data build", "Build a data set: Parquet, a card for the Hub, and a report of what was dropped and why.",
        "wiki-da", "debian-da folder=my/files --out data/pairs",
    )  # fmt: skip
    p.add_argument("config", metavar="CONFIG", help=f"a YAML file, or one that comes with l2v: {known}")
    p.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="dotted keys of the configuration, for example sources.0.limit=1000",
    )
    p.add_argument("--out", metavar="FOLDER", help="folder of the data set (default: the key `out`, or data/NAME)")
    p.add_argument(
        "--workers", type=int, metavar="N", help="processes, the result does not depend on them (default: one a core)"
    )
    p.add_argument("--fresh", action="store_true", help="build again what is built already")
    return p
