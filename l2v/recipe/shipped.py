"""Files shipped with l2v in launch/: recipes, data configurations, DeepSpeed configurations."""

from __future__ import annotations

from pathlib import Path

from l2v.errors import RecipeError


def shipped_folder(part: str) -> Path:
    """The folder launch/`part`: inside an installed package, or in a checkout."""
    here = Path(__file__).resolve().parents[1]
    installed = here / "launch" / part
    return installed if installed.is_dir() else here.parent / "launch" / part


def recipe_folder() -> Path:
    """The recipes that come with l2v."""
    return shipped_folder("recipes")


def find_recipe(name: str) -> Path:
    """A path as given, or the name of a recipe that comes with l2v."""
    return find_shipped(name, recipe_folder(), "recipe")


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
