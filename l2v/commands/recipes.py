"""`l2v recipes [NAME]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import yaml

from l2v.commands.parser import new_parser
from l2v.errors import RecipeError
from l2v.recipe.extends import extended
from l2v.recipe.load import load_recipe, to_dict
from l2v.recipe.shipped import find_recipe, recipe_folder


def main(argv: Sequence[str] | None = None) -> int:
    """List the shipped recipes, or print one as a start for your own."""
    args = parser().parse_args(argv)
    if args.resolved and not args.name:
        raise RecipeError("--resolved needs the name of a recipe, or a YAML file")
    if args.resolved:
        print(yaml.safe_dump(to_dict(load_recipe(args.name)), sort_keys=False, allow_unicode=True, width=120), end="")
    elif args.name:
        path = find_recipe(args.name)
        print(path.read_text(encoding="utf-8"), end="")
        if parents := extended(path):  # on stderr: stdout may be redirected to a file
            print(
                f"{path.stem} extends {', which extends '.join(parents)}; --resolved prints all keys", file=sys.stderr
            )
    else:
        for path in sorted(recipe_folder().glob("*.yaml")):
            recipe = load_recipe(str(path))
            print(f"{path.stem:<28}{recipe.base.model}: {', '.join(recipe.order())}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The arguments of `l2v recipes`."""
    p = new_parser(
        "recipes",
        "List the shipped recipes, or print one as a start for your own.",
        "llama3-8b-da > mine.yaml",
        "mine.yaml --resolved",
    )
    p.add_argument("name", nargs="?", metavar="RECIPE", help="print this one, or a YAML file")
    p.add_argument(
        "--resolved", action="store_true", help="print every key, with what the recipe extends and all defaults"
    )
    return p
