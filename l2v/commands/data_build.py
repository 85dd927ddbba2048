"""`l2v data build CONFIG [key=value ...]`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from l2v.commands.parser import new_parser, next_step
from l2v.data.corpus.config import config_folder, load_config
from l2v.errors import RecipeError, UserError, first_line


def main(argv: Sequence[str] | None = None) -> int:
    """Build a data set: Parquet, a card for the Hub, and a report of what was dropped and why.

    After an interrupt or a kill, the same command resumes. The exit code is 1 if a source is not complete; the same command then
    retries it.
    """
    args = parser().parse_intermixed_args(argv)
    # Imported here: help and mistakes in the arguments need no torch.
    from l2v.data.corpus import report
    from l2v.data.corpus.run import Run

    if args.workers is not None and args.workers < 1:
        raise RecipeError(f"--workers is {args.workers} and must be at least 1")
    config = load_config(args.config, args.overrides)
    out = Path(args.out or config.out or f"data/{config.name}").expanduser()
    begun = time.monotonic()
    run = Run(config, out, args.workers or len(os.sched_getaffinity(0)), keep_going=args.keep_going)
    try:
        done = run.build(fresh=args.fresh)
    except OSError as error:  # errors of a source itself are reported by its reader
        why = error.strerror or first_line(error)
        raise UserError(
            f"{error.filename or out}: cannot be read or written: {why}; fix that and run the same command again"
        ) from None
    if done.get("already"):
        print(f"{out} is already built; --fresh builds it from scratch")
    for note in run.notes:
        print(note)
    print(report.summary(done))
    for sentence in report.problems(done):
        print(f"l2v: {sentence}", file=sys.stderr)
    print(f"{out}: Parquet, README.md (the card), report.md; {time.monotonic() - begun:.0f} s")
    failed = any(s["error"] for s in done["sources"])
    print(_next(done, out, failed))
    return int(failed)


def _next(done: dict[str, Any], out: Path, failed: bool) -> str:
    if failed:
        return next_step("the same command; it retries the sources that were not read to the end")
    key = {"pairs": "stages.supervised.data", "sentences": "stages.simcse.data"}.get(done["kind"], "stages.mntp.data")
    split = next((name for name, count in done["splits"].items() if count), "train")
    return next_step(f"l2v train RECIPE {key}={shlex.quote(f'{out}/{split}-*.parquet')}")


def parser() -> argparse.ArgumentParser:
    """The arguments of `l2v data build`."""
    known = ", ".join(sorted(p.stem for p in config_folder().glob("*.yaml")))
    p = new_parser(
        "data build", "Build a data set: Parquet, a card for the Hub, and a report of what was dropped and why.",
        "wiki-da", "debian-da folder=my/files --out data/pairs",
    )  # fmt: skip
    p.add_argument("config", metavar="CONFIG", help=f"a YAML file, or a shipped one: {known}")
    p.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="dotted keys of the configuration, for example sources.0.limit=1000",
    )
    p.add_argument("--out", metavar="FOLDER", help="folder of the data set (default: the key `out`, or data/NAME)")
    p.add_argument(
        "--workers", type=int, metavar="N", help="processes; the result does not depend on them (default: one per core)"
    )
    p.add_argument(
        "--keep-going", action="store_true", help="take what is left of a source of which more than half cannot be read"
    )
    p.add_argument("--fresh", action="store_true", help="build from scratch even if the data set exists")
    return p
