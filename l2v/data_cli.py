"""`l2v data check [FOLDER]`, `l2v data build CONFIG`."""

from __future__ import annotations

from collections.abc import Sequence

from l2v.data import check
from l2v.data.build import command as build
from l2v.errors import RecipeError

TOOLS = {"build": build.main, "check": check.main}


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch to a tool for data sets."""
    argv = list(argv or ())
    if not argv or argv[0] not in TOOLS:
        raise RecipeError(f"l2v data needs one of: {', '.join(TOOLS)}; for example: l2v data build wiki-da")
    return TOOLS[argv[0]](argv[1:])
