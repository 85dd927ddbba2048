"""What `l2v tune` found for a recipe on a device, and how training takes it up."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from l2v.errors import RecipeError, UserError
from l2v.machine import device_name, processor
from l2v.model.load import device
from l2v.recipe import Recipe
from l2v.recipe.checks import check
from l2v.recipe.shipped import find_recipe
from l2v.runs.folder import has_begun, read_stage, run_folder

KEYS = {"micro_tokens": int, "recompute": str}
"""What may be tuned of a stage, because it changes where and how fast it runs and, but for rounding, not what it learns."""
SHARED = {"backend": str, "kernels": str}
"""The same for all stages of a run: `base.backend`, and whether kernels take their default configuration or the one that is
fastest by the clock (`timed`, which is L2V_AUTOTUNE=1). Applied where all stages that are to run agree."""


def tuned_file(recipe: str) -> Path:
    """The file beside a recipe, NAME.tuned.json."""
    path = find_recipe(recipe)
    return path.with_name(f"{path.stem}.tuned.json")


def place(processes: int) -> dict[str, Any]:
    """What a choice holds for: device, processes on it, version of torch."""
    # A processor's cores are the machine's, whatever number of threads a launcher leaves to each process.
    name = device_name(device()) if torch.cuda.is_available() else f"{processor()}, {os.cpu_count()} cores"
    return {"device": name, "processes": processes, "torch": torch.__version__}


def read_tuned(recipe: str) -> dict[str, Any] | None:
    """The file's content, None where there is none. Errors: UserError if it is damaged."""
    path = tuned_file(recipe)
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for stage in found["stages"].values():
            if not all(isinstance(stage["settings"][key], kind) for key, kind in (KEYS | SHARED).items()):
                raise TypeError
        found["place"]["device"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: run l2v tune again, or remove it") from None
    return found


def apply_tuned(recipe: Recipe, name: str, overrides: Sequence[str], processes: int) -> list[str]:
    """Put the tuned settings of this device into the recipe's stages; what the user named stays.

    name: the recipe as it was given. overrides: of the command line. Returns what to tell the user, one line each.
    """
    found = read_tuned(name)
    if found is None:
        return []
    here, there = place(processes), found["place"]
    if here != there:
        other = ", ".join(f"{there.get(key)} (here: {here[key]})" for key in here if here[key] != there.get(key))
        return [f"{tuned_file(name).name} was tuned on {other} and is not applied: run l2v tune here, or remove it"]
    named = {text.partition("=")[0].strip().removeprefix("stages.") for text in overrides}
    told = _apply_shared(recipe, found["stages"], named, tuned_file(name).name)
    for stage_name, stage in recipe.stages.items():
        settings = found["stages"].get(stage_name, {}).get("settings", {})
        began = _began_with(recipe, stage_name)
        if began:
            settings = began["stages"][stage_name]
        chosen = {k: settings[k] for k in KEYS if k in settings and not named & {k, f"{stage_name}.{k}"}}
        if chosen and stage.length <= chosen.get("micro_tokens", stage.micro_tokens):
            for key, value in chosen.items():
                setattr(stage, key, value)
            text = ", ".join(f"{key} {value}" for key, value in chosen.items())
            told.append(f"{stage_name}: {text}, {'as it began' if began else f'as {tuned_file(name).name} has it'}")
    check(recipe, str(tuned_file(name)))
    return told


def _apply_shared(recipe: Recipe, stages: dict[str, Any], named: set[str], file: str) -> list[str]:
    """Set what holds for the whole run; returns what to tell."""
    told = []
    began = [recipe_then["base"]["backend"] for name in recipe.stages if (recipe_then := _began_with(recipe, name))]
    tuned = {key: {stages.get(name, {}).get("settings", {}).get(key) for name in recipe.stages} for key in SHARED}
    backends, before = set(began) or tuned["backend"], recipe.base.backend
    if len(backends) == 1 and "base.backend" not in named and (backend := backends.pop()) not in (None, before):
        recipe.base.backend = backend
        try:
            check(recipe, file)
            told.append(f"base.backend {backend}, as {'the run began' if began else f'{file} has it'}")
        except RecipeError as error:  # the recipe has changed since
            recipe.base.backend = before
            told.append(f"base.backend {backend} is not applied: {error}")
    if tuned["kernels"] == {"timed"} and "L2V_AUTOTUNE" not in os.environ:
        os.environ["L2V_AUTOTUNE"] = "1"  # before the first launch; what it finds is kept on disk for the next start
        told.append(f"kernels timed at their first launch, as {file} has it")
    return told


def _began_with(recipe: Recipe, name: str) -> dict[str, Any] | None:
    """The recipe that a stage with a checkpoint or an adapter began with: it goes on so, and its bits stay what they were."""
    folder = run_folder(recipe) / name
    try:
        then = (read_stage(folder) or {})["recipe"]
        return then if has_begun(folder) and {*KEYS} <= {*then["stages"][name]} and "backend" in then["base"] else None
    except (KeyError, TypeError):
        return None
