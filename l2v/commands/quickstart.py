"""`l2v quickstart`: the whole recipe on the embedded default, scored on held-out questions."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from l2v.commands.parser import new_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate, export, search; everything is written below `runs/gemma-3-270m-da` (or out=...)."""
    args = parser().parse_intermixed_args(argv)
    # Imported here: help and mistakes in the arguments need no torch.
    from l2v.quickstart.run import run_quickstart

    run_quickstart(args.overrides, share=args.share, count=args.questions, fresh=args.fresh)
    return 0


def parser() -> argparse.ArgumentParser:
    """The arguments of `l2v quickstart`."""
    p = new_parser(
        "quickstart", "Train, score, export and search a small Danish encoder, all below runs/gemma-3-270m-da.",
        "--share 0.1 --questions 42", "base=smollm2-135m-instruct", "out=my/folder",
    )  # fmt: skip
    p.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="base=NAME, or dotted keys of the recipe, for example stages.mntp.steps=20",
    )
    p.add_argument(
        "--share",
        type=float,
        metavar="SHARE",
        help="share of the recipe's steps to train (default: by the machine's speed)",
    )
    p.add_argument(
        "--questions", type=int, metavar="N", help="score only N of the held-out questions, against their own passages"
    )
    p.add_argument("--fresh", action="store_true", help="train again, even if the run exists")
    return p
