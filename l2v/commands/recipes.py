"""`l2v recipes [NAME]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from l2v.recipe.load import load_recipe
from l2v.recipe.shipped import find_recipe, recipe_folder


def main(argv: Sequence[str] | None = None) -> int:
    """List the recipes that come with l2v, or print one as a start for your own."""
    p = argparse.ArgumentParser(prog="l2v recipes", description=main.__doc__)
    p.add_argument("name", nargs="?", help="print this one")
    args = p.parse_args(argv)
    if args.name:
        print(find_recipe(args.name).read_text(encoding="utf-8"), end="")
        return 0
    for path in sorted(recipe_folder().glob("*.yaml")):
        recipe = load_recipe(str(path))
        print(f"{path.stem:<28}{recipe.base.model}: {', '.join(recipe.order())}")
    return 0
