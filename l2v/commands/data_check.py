"""`l2v data check [FOLDER]`: look a set of passages and questions over."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from l2v.data.check.folder import SHIPPED
from l2v.data.check.report import check_folder


def main(argv: Sequence[str] | None = None) -> int:
    """Check a set of passages and questions; exit code 1 if a rule found something."""
    parser = argparse.ArgumentParser(prog="l2v data check", description=main.__doc__)
    parser.add_argument("folder", nargs="?", default=str(SHIPPED), help="default: the sample that ships with l2v")
    parser.add_argument("--all", action="store_true", help="show every finding, not the first eight of each rule")
    args = parser.parse_args(argv)
    report = check_folder(args.folder)
    print(report.render(None if args.all else 8))
    return 0 if report.ok else 1
