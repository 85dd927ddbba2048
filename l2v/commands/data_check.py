"""`l2v data check [FOLDER]`: check a set of passages and questions."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from l2v.commands.parser import new_parser, next_step, quoted
from l2v.data.check.folder import SHIPPED
from l2v.data.check.report import check_folder


def main(argv: Sequence[str] | None = None) -> int:
    """Check a set of passages and questions; exit code 1 if a rule found something."""
    args = parser().parse_args(argv)
    report = check_folder(args.folder)
    print(report.render(None if args.all else 8))
    again = "" if args.folder == str(SHIPPED) else f" {quoted(args.folder)}"
    print(
        next_step("l2v init NAME --data FILE" if report.ok else f"correct what was found, then l2v data check{again}")
    )
    return 0 if report.ok else 1


def parser() -> argparse.ArgumentParser:
    """The arguments of `l2v data check`."""
    p = new_parser(
        "data check", "Check passages and questions: duplicates, leaks, spelling, balance; exit code 1 for findings.",
        "my-folder --all",
    )  # fmt: skip
    p.add_argument(
        "folder",
        nargs="?",
        metavar="FOLDER",
        default=str(SHIPPED),
        help="the set (default: the sample that ships with l2v)",
    )
    p.add_argument("--all", action="store_true", help="show all findings, not only the first eight per rule")
    return p
