"""`l2v data TOOL ...`: build a data set from raw text, check one, mine hard negatives, make queries."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence

from l2v.commands.parser import dispatcher_help
from l2v.errors import RecipeError

TOOLS = {
    "build": "build a data set from raw text",
    "check": "check data before training on it",
    "mine": "mine hard negatives for pairs",
    "synthesize": "let a language model write queries for passages",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch to a tool for data sets."""
    argv = list(argv or ())
    if not argv or argv[0] in ("-h", "--help"):
        does = "Make, check and extend training data."
        print(dispatcher_help("data", does, "tool", TOOLS, ["build wiki-da", "check my-folder"]))
        return 0
    if argv[0] not in TOOLS:
        near = difflib.get_close_matches(argv[0], TOOLS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise RecipeError(f"l2v data has no tool '{argv[0]}'; choose one of {', '.join(TOOLS)}{hint}")
    return importlib.import_module(f"l2v.commands.data_{argv[0]}").main(argv[1:])
