"""`l2v export RUN FOLDER`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from l2v.commands.parser import add_loading, new_parser
from l2v.runs.names import check_model


def main(argv: Sequence[str] | None = None) -> int:
    """Merge an encoder and write it for transformers and sentence-transformers."""
    args = parser().parse_intermixed_args(argv)
    check_model(args.run)
    from l2v.encoder import Encoder  # loads torch and transformers, for which a mistyped name does not wait

    encoder = Encoder.from_pretrained(
        args.run, args.adapter, precision=args.precision, length=args.length, trust_remote_code=args.trust_remote_code
    )
    encoder.save(args.folder)
    dtype = "bf16" if "bfloat16" in str(encoder.model.decoder.dtype) else "fp32"
    print(
        f"{args.folder}: written, {dtype}, texts of up to {encoder.max_length} tokens; "
        f"SentenceTransformer('{args.folder}') loads it"
    )
    folder = shlex.quote(args.folder)
    print(f"next: l2v search {folder} --texts FILE, or l2v push {folder} OWNER/NAME", file=sys.stderr)
    return 0


def parser() -> argparse.ArgumentParser:
    """The arguments of `l2v export`."""
    p = new_parser(
        "export",
        "Merge an encoder and write it for transformers and sentence-transformers.",
        "runs/llama3-8b-da my-encoder", "runs/llama3-8b-da my-encoder --precision bf16 --length 1024",
    )  # fmt: skip
    p.add_argument("run", metavar="MODEL", help="a run, a stage of it, or a base")
    p.add_argument("folder", metavar="FOLDER", help="where to write")
    p.add_argument("--adapter", action="append", default=[], metavar="NAME", help="a further adapter, merged in order")
    p.add_argument("--length", type=int, metavar="N", help="tokens of a text (default: the run's, or 512)")
    add_loading(p)
    return p
