"""`l2v export RUN FOLDER`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from l2v.encoder import Encoder


def main(argv: Sequence[str] | None = None) -> int:
    """Merge an encoder and write it for transformers and sentence-transformers."""
    p = argparse.ArgumentParser(prog="l2v export", description=main.__doc__)
    p.add_argument("run", help="a run, a stage of it, or a base")
    p.add_argument("folder", help="where to write")
    p.add_argument("--adapter", action="append", default=[], help="a further adapter, merged in order")
    p.add_argument("--precision", choices=["auto", "bf16", "fp32"], help="of the weights (default: the run's)")
    args = p.parse_intermixed_args(argv)
    encoder = Encoder.from_pretrained(args.run, args.adapter, precision=args.precision)
    encoder.save(args.folder)
    print(f"{args.folder}: written; SentenceTransformer('{args.folder}') loads it")
    return 0
