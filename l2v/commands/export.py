"""`l2v export RUN FOLDER`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from l2v.commands.parser import new_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Merge an encoder and write it for transformers and sentence-transformers."""
    args = parser().parse_intermixed_args(argv)
    # Imported here: help and mistakes in the arguments need no torch.
    from l2v.encoder import Encoder

    encoder = Encoder.from_pretrained(args.run, args.adapter, precision=args.precision)
    encoder.save(args.folder)
    print(f"{args.folder}: written; SentenceTransformer('{args.folder}') loads it")
    return 0


def parser() -> argparse.ArgumentParser:
    """The arguments of `l2v export`."""
    p = new_parser(
        "export",
        "Merge an encoder and write it for transformers and sentence-transformers.",
        "runs/llama3-8b-da my-encoder",
    )
    p.add_argument("run", metavar="MODEL", help="a run, a stage of it, or a base")
    p.add_argument("folder", metavar="FOLDER", help="where to write")
    p.add_argument("--adapter", action="append", default=[], metavar="NAME", help="a further adapter, merged in order")
    p.add_argument("--precision", choices=["auto", "bf16", "fp32"], help="of the weights (default: the run's)")
    return p
