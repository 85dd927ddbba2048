"""`l2v search RUN "tekst"`: semantic search from the shell."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from l2v.data import sample
from l2v.data.sources import open_rows
from l2v.encoder import Encoder
from l2v.errors import UserError
from l2v.recipe import Source


def main(argv: Sequence[str] | None = None) -> int:
    """Find the texts that lie nearest to a query; vectors of a corpus are kept beside the run for the next search."""
    p = argparse.ArgumentParser(prog="l2v search", description=main.__doc__)
    p.add_argument("run", help="a run, a stage of it, an export or a base")
    p.add_argument("query", help="what to look for")
    p.add_argument(
        "--texts", help="CSV, JSONL, Parquet or text file to search (default: the passages of the Danish sample)"
    )
    p.add_argument(
        "--column", default="text", help="the field that holds the text (default: text, or a common name like it)"
    )
    p.add_argument("--instruction", help="instruction that stands before the query")
    p.add_argument("--top", type=int, default=3, help="how many to show (default: 3)")
    args = p.parse_intermixed_args(argv)
    if not args.query.strip():
        raise UserError("the query is empty; say what to look for")
    if args.top < 1:
        raise UserError(f"--top is {args.top}; show at least 1")
    if args.texts:
        notes: list[str] = []
        texts = open_rows([Source(path=args.texts, text=args.column, skip_empty=True)], "documents", notes)["text"]
        for note in notes:
            print(note, file=sys.stderr)
    else:
        texts = [p.text for p in sample.passages().values()]
    texts = list(texts)
    encoder = Encoder.from_pretrained(args.run)
    texts_ME = _vectors(encoder, texts, Path(args.run))
    scores_M = texts_ME @ encoder.encode(args.query, instruction=args.instruction)
    console = Console(soft_wrap=True)
    for at in np.argsort(-scores_M)[: args.top]:
        console.print(f"{scores_M[at]:.3f}  {texts[at]}", highlight=False, markup=False)
    return 0


def _vectors(encoder: Encoder, texts: list[str], run: Path) -> np.ndarray:
    """The corpus's vectors, from the cache if the same encoder saw the same texts before."""
    from l2v.batch import mix
    from l2v.data.tokens import text_key

    model_key = text_key(
        str(encoder.lineage) + encoder.tokenizer.fingerprint() + str(next(encoder.model.parameters()).dtype)
    )
    key = mix(model_key, *(text_key(text) for text in texts))
    folder = run if run.is_dir() else None
    cache = folder / ".search" / f"{key:016x}.npy" if folder else None
    if cache and cache.is_file():
        return np.load(cache, allow_pickle=False)
    vectors_ME = encoder.encode(texts, show_progress=True)
    if cache:
        try:
            cache.parent.mkdir(exist_ok=True)
            with open(cache, "wb") as file:
                np.save(file, vectors_ME, allow_pickle=False)
        except OSError:
            cache.unlink(missing_ok=True)  # only the next search's speed depends on it
    return vectors_ME
