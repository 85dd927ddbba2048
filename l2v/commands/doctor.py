"""`l2v doctor`: what this machine has, what runs on it and why the rest does not, and how fast it is."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from l2v.commands.parser import new_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Check the machine, for a bug report or before a long run. Exit code 0 if training can run, else 1."""
    args = parser().parse_args(argv)
    if args.bases is not None:
        return _bases(args.bases)
    # Imported here: help needs no torch.
    from l2v.doctor import hardware, software
    from l2v.doctor.report import Report, render, tree

    report = Report()
    probes = (
        hardware.machine,
        hardware.devices,
        software.versions,
        software.kernels,
        software.backends,
        software.files,
    )
    for probe in probes:
        report.add(probe.__name__, probe)
    if args.seconds > 0 and not args.json and sys.stderr.isatty():
        print(f"calibrating for {args.seconds:g} seconds ...", file=sys.stderr)
    report.add("calibration", lambda report: hardware.calibration(report, args.seconds))
    if args.json:
        print(json.dumps(tree(report), indent=1, ensure_ascii=False))
    else:
        print(render(report, color=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    return 1 if report.problems else 0


def _bases(names: str) -> int:
    """Print the matrix of architectures; exit code 1 if one of them leaks or differs from transformers."""
    from l2v.doctor import bases

    chosen = [name for name in names.split(",") if name]
    rows = bases.matrix(chosen, log=lambda line: print(line, file=sys.stderr, flush=True))
    print(bases.render(rows))
    return 1 if any(row.wrong for row in rows) else 0


def parser() -> argparse.ArgumentParser:
    """The arguments of `l2v doctor`."""
    p = new_parser(
        "doctor", "Show what runs on this machine, why the rest does not, and how fast it is; exit code 1 if training cannot.",
        "--seconds 0",
    )  # fmt: skip
    p.add_argument("--json", action="store_true", help="the same as JSON")
    p.add_argument(
        "--seconds", type=float, default=10.0, metavar="SECONDS",
        help="time for the calibration, whose rates later runs are compared with; 0 measures nothing (default: 10)",
    )  # fmt: skip
    p.add_argument(
        "--bases", nargs="?", const="", metavar="NAMES",
        help="instead: the matrix of docs/bases.md, which architectures can be a base and how they run, measured here (minutes); "
        "or only the architectures named, by their model_type",
    )  # fmt: skip
    return p
