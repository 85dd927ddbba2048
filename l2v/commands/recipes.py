"""`l2v recipes [NAME]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from l2v.commands.parser import new_parser
from l2v.recipe.load import load_recipe
from l2v.recipe.shipped import find_recipe, recipe_folder


def main(argv: Sequence[str] | None = None) -> int:
    """List the recipes that come with l2v, or print one as a start for your own."""
    args = parser().parse_args(argv)
    if args.name:
        print(find_recipe(args.name).read_text(encoding="utf-8"), end="")
        return 0
    for path in sorted(recipe_folder().glob("*.yaml")):
        recipe = load_recipe(str(path))
        print(f"{path.stem:<28}{recipe.base.model}: {', '.join(recipe.order())}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The arguments of `l2v recipes`."""
    p = new_parser(
        "recipes",
        "List the recipes that come with l2v, or print one as a start for your own.",
        "llama3-8b-da > mine.yaml",
    )
    p.add_argument("name", nargs="?", metavar="RECIPE", help="print this one")
    return p
