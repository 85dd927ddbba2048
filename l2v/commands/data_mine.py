"""`l2v data mine ENCODER PAIRS --out FILE`: hard negatives."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from l2v.commands.parser import add_loading, new_parser
from l2v.errors import RecipeError
from l2v.mining.arguments import add_source
from l2v.mining.mine import MAX_NEGATIVES, mine_negatives
from l2v.runs.names import check_model


def main(argv: Sequence[str] | None = None) -> int:
    """Mine hard negatives: candidates by an encoder and BM25, without those that may themselves be answers."""
    args = parser().parse_intermixed_args(argv)
    _check(args)
    check_model(args.encoder)
    mine_negatives(args)
    return 0


def _check(args: argparse.Namespace) -> None:
    if not 1 <= args.number <= MAX_NEGATIVES:
        raise RecipeError(f"--number is {args.number}; mine 1 to {MAX_NEGATIVES} negatives a row")
    if args.depth < args.number:
        raise RecipeError(f"--depth is {args.depth}; use at least as many candidates as negatives ({args.number})")
    if args.relative is not None and not 0 < args.relative <= 1:
        raise RecipeError(f"--relative is {args.relative}; use a share of the positive's score, above 0 up to 1")
    if args.absolute is not None and not 0 <= args.absolute < 2:
        raise RecipeError(f"--absolute is {args.absolute}; use a distance to the positive's score, 0 up to 2")
    if args.faiss and "encoder" not in args.by:
        raise RecipeError("--faiss searches the encoder's vectors; add `encoder` to --by, or omit --faiss")


def parser() -> argparse.ArgumentParser:
    """The arguments of `l2v data mine`."""
    p = new_parser(
        "data mine", "Mine hard negatives with an encoder and BM25, without candidates that may themselves be answers.",
        "runs/NAME/supervised pairs.jsonl --out mined.jsonl --task question-da",
    )  # fmt: skip
    p.add_argument("encoder", metavar="MODEL", help="a run, a stage of it, an export or a base")
    p.add_argument("data", metavar="PAIRS", help="sample:da/train, a CSV, JSONL or Parquet file, or hub:NAME")
    p.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help=".jsonl or .parquet; a table and a picture of the scores lie next to it",
    )
    p.add_argument(
        "--number", type=int, default=4, metavar="N", help=f"negatives a row, 1 to {MAX_NEGATIVES} (default: 4)"
    )
    p.add_argument(
        "--by", nargs="+", choices=("encoder", "bm25"), default=["encoder", "bm25"],
        help="searches that find candidates (default: both, alternating)",
    )  # fmt: skip
    p.add_argument("--depth", type=int, default=50, metavar="N", help="candidates of each search (default: 50)")
    p.add_argument(
        "--relative", type=lambda t: None if t == "none" else float(t), default=0.95, metavar="SHARE",
        help="no negative scores above this share of its positive's score, or none for no limit (default: 0.95)",
    )  # fmt: skip
    p.add_argument("--absolute", type=float, metavar="X", help="no negative scores above its positive's score minus X")
    p.add_argument(
        "--cross-encoder", metavar="NAME", help="score candidates with this sentence-transformers cross-encoder"
    )
    p.add_argument(
        "--corpus", metavar="FILE", help="more documents that may become negatives (CSV, JSONL, Parquet or text)"
    )
    p.add_argument("--corpus-column", default="text", metavar="COLUMN", help="their column (default: text)")
    p.add_argument("--faiss", metavar="FACTORY", help='search a FAISS index instead, for example "IVF1024,Flat"')
    p.add_argument("--cache", metavar="FOLDER", help="keep vectors in this folder for later runs on the same texts")
    add_loading(p)
    add_source(p, pairs=True)
    return p
