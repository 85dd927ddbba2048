"""The layout of a run folder: RUN/STAGE/stage.json, RUN/STAGE/adapter/ or RUN/STAGE/model/, RUN/STAGE/metrics.jsonl.

`stage.json` holds the recipe that a stage began with. A stage is trained once it has its adapter, or, without LoRA, its model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from l2v.errors import UserError
from l2v.recipe import Recipe
from l2v.recipe.load import from_dict

STAGE_FILE = "stage.json"
ADAPTER, MODEL = "adapter", "model"
"""Where a stage's adapter lies, and where the weights of a stage without LoRA."""


def run_folder(recipe: Recipe) -> Path:
    """Where a recipe's run lives."""
    return Path(recipe.out or f"runs/{recipe.name}")


def is_stage(folder: Path) -> bool:
    """Whether a folder is a stage of a run."""
    return (folder / STAGE_FILE).is_file()


def stage_folders(run: Path) -> list[Path]:
    """Folders of all stages of a run that have begun, by name; empty where the folder is no run."""
    return sorted(mark.parent for mark in run.glob(f"*/{STAGE_FILE}")) if run.is_dir() else []


def result_of(stage: Path) -> Path | None:
    """The folder that a stage has trained, its adapter or its model; None if it has none yet."""
    return next((stage / name for name in (ADAPTER, MODEL) if (stage / name).is_dir()), None)


def is_trained(stage: Path) -> bool:
    """Whether a stage has its adapter or its model."""
    return result_of(stage) is not None


def has_begun(stage: Path) -> bool:
    """Whether a stage has a checkpoint, or is trained."""
    return is_trained(stage) or any(stage.glob("checkpoints/step-*"))


def read_stage(stage: Path) -> dict[str, Any] | None:
    """The content of a stage's stage.json; None where it does not exist or cannot be read."""
    try:
        return json.loads((stage / STAGE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def stage_recipe(stage: Path) -> Recipe:
    """The recipe that a stage began with.

    Raises:
        UserError: stage.json is damaged.
    """
    mark = stage / STAGE_FILE
    try:
        return from_dict(json.loads(mark.read_text(encoding="utf-8"))["recipe"], str(mark))
    except (OSError, ValueError, KeyError):
        raise UserError(f"{mark}: damaged; train the stage again with --fresh") from None


def trained_stages(run: Path) -> dict[str, Recipe]:
    """The trained stages of a run and the recipe of each, every stage after the one it starts from.

    Raises:
        UserError: no stage of the run is trained, or a stage.json is damaged.
    """
    recipes = {folder.name: stage_recipe(folder) for folder in stage_folders(run) if is_trained(folder)}
    if not recipes:
        raise UserError(f"{run}: none of its stages is trained yet; finish 'l2v train' first")
    order = {name: at for recipe in recipes.values() for at, name in enumerate(recipe.order())}
    return {name: recipes[name] for name in sorted(recipes, key=lambda name: order.get(name, -1))}
