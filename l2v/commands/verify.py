"""`l2v verify FOLDER`."""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from l2v.commands.parser import new_parser
from l2v.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Compare an export in every engine that is installed with l2v; 1 if one gives other vectors."""
    args = parser().parse_args(argv)
    if not Path(args.folder).is_dir():
        raise UserError(f"{args.folder}: no such folder; give the folder that 'l2v export' wrote")
    if args.url and importlib.util.find_spec("openai") is None:
        raise UserError("--url needs the package openai: pip install 'l2v[eval]'")
    from l2v.serving.verify import COSINE, ENTRY, NEAREST, RECALL, engines_of, verify

    folder = Path(args.folder)
    engines = engines_of(folder, args.url, args.url_precision)
    found = verify(folder, against=args.against, engines=engines, log=lambda line: print(line, file=sys.stderr))
    exact = found.precision == "fp32"
    half = f"1 - cosine {COSINE:g}, recall@{NEAREST} {RECALL:g}"
    limit = f"largest difference of an entry {ENTRY:g}; in half precision {half}" if exact else half
    print(f"{args.folder}: {found.texts} texts, {found.cut} of them cut, in {found.precision} ({limit})")
    width = max(len(row.engine) for row in found.rows)
    print(f"  {'engine':{width}}  {'':7}  {'entry':>8}  {'1 - cos':>8}  {f'recall@{NEAREST}':>9}")
    for row in found.rows:
        ran = not math.isnan(row.entry)
        word = {True: "same", False: "DIFFERS", None: "lossy" if ran else "skipped"}[row.same]
        numbers = f"{row.entry:8.1e}  {row.cosine:8.1e}  {row.recall:9.3f}" if ran else " " * 29
        print(f"  {row.engine:{width}}  {word:7}  {numbers}  {row.note}".rstrip())
    return 0 if found.same else 1


def parser() -> argparse.ArgumentParser:
    """The arguments of `l2v verify`."""
    p = new_parser(
        "verify",
        "Give 64 texts to every engine that is installed, and compare its vectors with l2v's; exit code 1 if they differ.",
        "my-encoder", "my-encoder --against runs/llama3-8b-da", "my-encoder --url http://127.0.0.1:8000/v1",
    )  # fmt: skip
    p.add_argument("folder", metavar="FOLDER", help="an export")
    p.add_argument(
        "--against", metavar="MODEL", help="the run that it was made from; default: the export in l2v itself"
    )
    p.add_argument(
        "--url", action="append", default=[], metavar="URL",
        help="also a server of the export with OpenAI's interface (vLLM, Text Embeddings Inference): URL or URL#MODEL",
    )  # fmt: skip
    p.add_argument(
        "--url-precision", choices=("fp32", "fp16", "bf16"), default="fp16",
        help="what the servers compute in, which decides how far they may differ (default: %(default)s)",
    )  # fmt: skip
    return p
