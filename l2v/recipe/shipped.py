"""Files shipped with l2v in launch/: recipes, data configurations, DeepSpeed configurations."""

from __future__ import annotations

import difflib
import re
import shlex
from pathlib import Path

from l2v.errors import RecipeError

DATA = (".csv", ".tsv", ".jsonl", ".parquet", ".txt")
"""Endings of files that hold rows, not a recipe."""


def shipped_folder(part: str) -> Path:
    """The folder launch/`part`: inside an installed package, or in a checkout."""
    here = Path(__file__).resolve().parents[1]
    installed = here / "launch" / part
    return installed if installed.is_dir() else here.parent / "launch" / part


def recipe_folder() -> Path:
    """The recipes that come with l2v."""
    return shipped_folder("recipes")


def find_recipe(name: str) -> Path:
    """A path as given, or the name of a recipe that comes with l2v.

    Raises:
        RecipeError: there is none; the message names a recipe file of that name, or the command that writes one for data.
    """
    path = Path(name)
    if name.lower().removesuffix(".gz").endswith(DATA) and path.is_file():
        run = re.sub(r"[^A-Za-z0-9_-]+", "-", path.name.partition(".")[0]).strip("-") or "mine"
        raise RecipeError(
            f"{name} is data, not a recipe: 'l2v init {run} --data {shlex.quote(name)}' writes a recipe for it, {run}.yaml"
        )
    if not path.is_file() and not _shipped(name).is_file() and Path(f"{name}.yaml").is_file():
        raise RecipeError(f"no recipe '{name}'; did you mean '{name}.yaml'?")
    if name.endswith((".yaml", ".yml")) and not path.is_file() and path.parent.is_dir():
        names = [file.name for file in path.parent.glob("*.y*ml")]
        if close := difflib.get_close_matches(path.name, names, n=1, cutoff=0.6):
            raise RecipeError(f"no recipe '{name}'; did you mean '{path.with_name(close[0])}'?")
    return find_shipped(name, recipe_folder(), "recipe")


def _shipped(name: str) -> Path:
    return recipe_folder() / f"{name}.yaml"


def find_shipped(name: str, folder: Path, what: str) -> Path:
    """A YAML file as given, or one of `folder` by its name; `what` is the kind of file in the message."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = folder / f"{Path(name).stem if name.endswith('.yaml') else name}.yaml"
    if path.suffix != ".yaml" and shipped.is_file():
        return shipped
    known = sorted(p.stem for p in folder.glob("*.yaml"))
    raise RecipeError(f"no {what} '{name}': give a YAML file or one of {', '.join(known)}")
