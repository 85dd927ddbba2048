"""`l2v quantize MODEL`: what vectors of fewer bytes lose."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from l2v.commands.parser import add_loading, new_parser, next_step, quoted
from l2v.errors import UserError
from l2v.runs.names import check_model


def main(argv: Sequence[str] | None = None) -> int:
    """Print recall@10 of int8, uint8 and binary vectors, and of shorter ones, against float32."""
    args = parser().parse_intermixed_args(argv)
    if (args.texts is None) != (args.queries is None):
        raise UserError("--texts and --queries belong together; without both, the Danish sample is used")
    check_model(args.model)
    from l2v.encoder import Encoder  # loads torch and transformers, for which a mistyped name does not wait
    from l2v.evaluation.small_vectors import as_text, compare, picture

    queries, texts = _texts(args)
    encoder = Encoder.from_pretrained(args.model, precision=args.precision, trust_remote_code=args.trust_remote_code)
    vectors = (
        encoder.encode_query(queries, normalize=False, show_progress=sys.stderr.isatty()),
        encoder.encode_document(texts, normalize=False, show_progress=sys.stderr.isatty()),
    )
    rows = compare(*vectors, args.dimensions, times=args.rescore)
    table = as_text(rows, (len(queries), len(texts)))
    print(table, end="")
    if args.out:
        folder = Path(args.out)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "small_vectors.md").write_text(table, encoding="utf-8")
            facts = {
                "model": args.model,
                "queries": len(queries),
                "texts": len(texts),
                "rows": [asdict(row) for row in rows],
            }
            (folder / "small_vectors.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
            picture(rows, args.model, folder / "small_vectors.png")
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
        print(f"{folder}: small_vectors.md, small_vectors.json, small_vectors.png")
    print(next_step(f"l2v export {quoted(args.model)} FOLDER"), file=sys.stderr)
    return 0


def _texts(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    if args.texts is None:
        from l2v.data import sample

        print("the Danish sample; --texts FILE --queries FILE take your own", file=sys.stderr)
        return [each.query for each in sample.questions("heldout")], [each.text for each in sample.passages().values()]
    from l2v.search import read_corpus

    notes: list[str] = []
    found = [
        [passage.text for passage in read_corpus(file, column, notes)]
        for file, column in ((args.queries, args.query_column), (args.texts, args.column))
    ]
    return found[0], found[1]


def parser() -> argparse.ArgumentParser:
    """The arguments of `l2v quantize`."""
    p = new_parser(
        "quantize", "Compare int8, uint8 and binary vectors, and shorter ones, with float32: recall@10 and bytes.",
        "runs/smollm2-135m-da", "my-encoder --dimensions 256,128,64 --out small",
        "my-encoder --texts faq.csv --column answer --queries faq.csv --query-column question",
    )  # fmt: skip
    p.add_argument("model", metavar="MODEL", help="a run, a stage of it, an export or a base")
    p.add_argument(
        "--texts", metavar="FILE", help="texts that are searched, as l2v search reads them (default: the sample)"
    )
    p.add_argument("--column", default="text", metavar="COLUMN", help="the field that holds the text (default: text)")
    p.add_argument("--queries", metavar="FILE", help="the queries, as l2v search reads texts")
    p.add_argument("--query-column", default="query", metavar="COLUMN", help="the field of the query (default: query)")
    p.add_argument(
        "--dimensions",
        type=_numbers,
        default=[],
        metavar="LENGTHS",
        help="also cut to these lengths (trained: matryoshka)",
    )
    p.add_argument(
        "--rescore", type=int, default=4, metavar="N", help="binary: rescore N times ten candidates (default: 4)"
    )
    p.add_argument("--out", metavar="FOLDER", help="write table, numbers and a picture there")
    add_loading(p)
    return p


def _numbers(value: str) -> list[int]:
    try:
        return [int(each) for each in value.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{value}' is no list of whole numbers, such as 256,128") from None
