"""Command-line arguments that name a source, as a recipe's `data` does."""

from __future__ import annotations

import argparse

from l2v.recipe.source import Source

MAX_NEGATIVES = 7
"""Negatives that `l2v data mine` finds for a row at most."""

TEXTS = {
    "name": "configuration of a Hub data set",
    "split": "split of a Hub data set (default: train)",
    "revision": "revision of a Hub data set",
}
PAIRS = {
    "query": "column of the query (default: query)",
    "positive": "column of the positive (default: positive)",
    "negatives": "column of the rows' negatives (default: negatives); they become candidates like all others",
    "group": "column of groups; rows of the same group are never negatives of each other",
    "instruction": "column of the query's instruction",
    "document_instruction": "column of the documents' instruction",
    "task": "a task of l2v/recipe/tasks.py, for example question-da: instructions of both sides",
    "query_prompt": "instruction of every query without one",
    "document_prompt": "instruction of every document without one",
}


def add_source(parser: argparse.ArgumentParser, *, pairs: bool) -> None:
    """Options for the keys of `l2v.recipe.source.Source`."""
    group = parser.add_argument_group("reading the data, as the keys of a recipe's `data` do")
    for key, text in (TEXTS | PAIRS if pairs else TEXTS | {"text": "column of the text (default: text)"}).items():
        group.add_argument(f"--{key.replace('_', '-')}", metavar=_metavar(text), help=text)
    group.add_argument("--skip-empty", action="store_true", help="skip rows with an empty text")
    group.add_argument("--limit", type=int, metavar="N", help="read at most N rows")


def _metavar(text: str) -> str:
    return {"column": "COLUMN", "instruction": "TEXT"}.get(text.split()[0], "NAME")


def source_of(path: str, args: argparse.Namespace) -> Source:
    """The source that the arguments describe.

    Raises:
        RecipeError: if a value is not valid for a source.
    """
    keys = (*TEXTS, *PAIRS, "text", "skip_empty", "limit")
    given = {key: getattr(args, key) for key in keys if getattr(args, key, None) is not None}
    source = Source(path=path, **given)
    source.check("supervised", path)
    return source
