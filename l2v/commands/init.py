"""`l2v init NAME --data FILE`: a commented recipe for your own data, ready to train."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from l2v.commands.parser import new_parser
from l2v.errors import UserError
from l2v.model.embedded import SMOLLM2
from l2v.recipe.new import LETTERS_A_TOKEN, OwnData, compose


def main(argv: Sequence[str] | None = None) -> int:
    """Write a commented recipe for your own data: pairs of question and answer, or texts alone."""
    args = parser().parse_args(argv)
    name = args.name.removesuffix(".yaml")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise UserError(f"the name '{args.name}' becomes the name of a folder: use letters, digits, - and _")
    out = Path(args.out or f"{name}.yaml")
    if out.suffix != ".yaml":
        raise UserError(f"--out {out}: a recipe's name ends in .yaml")
    if out.exists():
        raise UserError(f"{out} exists and was not changed; choose another name, or another file with --out")
    from l2v.data.own import look  # imported here: help and mistakes in the arguments need no torch

    data = look(args.data)
    text = compose(name, args.base, data)
    try:
        with open(out, "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from None
    print(_seen(data))
    print(f"\n{out}: {'mntp and supervised' if data.kind == 'pairs' else 'mntp and simcse'}, from {args.base}\n")
    print(_next(name, out, data))
    return 0


def parser() -> argparse.ArgumentParser:
    """The arguments of `l2v init`."""
    p = new_parser(
        "init", "Write a commented recipe for your own data: pairs of question and answer, or texts alone.",
        "mine --data questions.csv", "mine --data texts.txt --base meta-llama/Meta-Llama-3-8B-Instruct",
    )  # fmt: skip
    p.add_argument("name", metavar="NAME", help="the recipe's name: letters, digits, - and _")
    p.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="a file, folder or glob: .csv, .tsv, .jsonl, .json, .parquet, .xlsx or .txt (a text a line)",
    )
    p.add_argument(
        "--base", default=SMOLLM2, metavar="MODEL",
        help=f"the decoder, a folder or a hub name; the default trains on a CPU (default: {SMOLLM2})",
    )  # fmt: skip
    p.add_argument("--out", metavar="FILE", help="the recipe's file (default: NAME.yaml)")
    return p


def _seen(data: OwnData) -> str:
    """The content of the file and how it is read, a line each."""
    delimiter = f", delimiter {data.delimiter}" if data.delimiter else ""
    empty = f", {data.empty:,} more with an empty text (skipped)" if data.empty else ""
    read_as = ", ".join(f"{key}: {column}" for key, column in data.read_as().items())
    chosen = f"read as {read_as}" if data.files == 1 else f"each of the {data.files} files is read by its own columns"
    tokens = round(data.long_letters / LETTERS_A_TOKEN)
    notes = "".join(
        f"{note}\n" for note in data.notes if data.files > 1 or "guessed" not in note
    )  # the next line says what was guessed
    return (
        f"{data.source.path}: {data.rows:,} {data.kind}{empty}{delimiter}\n{notes}"
        f"columns {', '.join(data.columns)}; {chosen}\n"
        f"95% of the texts are shorter than about {tokens:,} tokens"
    )


def _next(name: str, out: Path, data: OwnData) -> str:
    query = shlex.quote(data.example) if data.example else '"your query"'
    column = "" if data.searched == data.document or data.files > 1 else f" --column {shlex.quote(data.document)}"
    return (
        "Next:\n"
        f"  l2v train {shlex.quote(str(out))}\n"
        f"  l2v search runs/{name} {query} --texts {shlex.quote(data.source.path)}{column}"
    )
