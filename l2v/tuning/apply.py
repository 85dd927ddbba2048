"""Read the settings that `l2v tune` found for a recipe on a device, and apply them in training."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from l2v.errors import RecipeError, UserError
from l2v.machine import device_name, on_null_gpu, processor
from l2v.recipe import Recipe
from l2v.recipe.checks import check
from l2v.recipe.shipped import find_recipe
from l2v.runs.folder import has_begun, read_stage, run_folder

KEYS = {"micro_tokens": int, "recompute": str}
"""Settings of a stage that may be tuned: they change speed and memory, and the result only by rounding."""
SHARED = {"backend": str, "kernels": str}
"""Settings that are the same for all stages of a run: `base.backend`, and whether kernels use their default configuration or
the fastest by timing (`timed`, which is L2V_AUTOTUNE=1). They are applied if all stages that will run agree."""


def tuned_file(recipe: str) -> Path:
    """The file next to a recipe, NAME.tuned.json."""
    path = find_recipe(recipe)
    return path.with_name(f"{path.stem}.tuned.json")


def place(processes: int) -> dict[str, Any]:
    """What tuned settings are valid for: device, number of processes on it, version of torch."""
    # All cores of the CPU count, however many threads a launcher gives each process.
    name = device_name(torch.device("cuda")) if torch.cuda.is_available() else f"{processor()}, {os.cpu_count()} cores"
    if on_null_gpu():
        name = "null"
    return {"device": name, "processes": processes, "torch": torch.__version__}


def read_tuned(recipe: str) -> dict[str, Any] | None:
    """The content of the tuned file, or None if it does not exist.

    Raises:
        UserError: the file is damaged.
    """
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
    """Apply the tuned settings of this device to the recipe's stages; settings that the user gave stay.

    name: the recipe as given on the command line. overrides: those of the command line. Returns lines to log.
    """
    found = read_tuned(name)
    if found is None:
        return []
    here, there = place(processes), found["place"]
    if here != there:
        other = ", ".join(f"{there.get(key)} (here: {here[key]})" for key in here if here[key] != there.get(key))
        return [f"{tuned_file(name).name} was tuned on {other} and is not applied: run l2v tune here, or remove it"]
    named = {text.partition("=")[0].strip().removeprefix("stages.") for text in overrides}
    notes = _apply_shared(recipe, found["stages"], named, tuned_file(name).name)
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
            notes.append(f"{stage_name}: {text}, {'as it began' if began else f'as {tuned_file(name).name} has it'}")
    check(recipe, str(tuned_file(name)))
    return notes


def _apply_shared(recipe: Recipe, stages: dict[str, Any], named: set[str], file: str) -> list[str]:
    """Apply the settings of the whole run; returns lines to log."""
    notes = []
    began = [recipe_then["base"]["backend"] for name in recipe.stages if (recipe_then := _began_with(recipe, name))]
    tuned = {key: {stages.get(name, {}).get("settings", {}).get(key) for name in recipe.stages} for key in SHARED}
    backends, before = set(began) or tuned["backend"], recipe.base.backend
    if len(backends) == 1 and "base.backend" not in named and (backend := backends.pop()) not in (None, before):
        recipe.base.backend = backend
        try:
            check(recipe, file)
            notes.append(f"base.backend {backend}, as {'the run began' if began else f'{file} has it'}")
        except RecipeError as error:  # the recipe has changed since
            recipe.base.backend = before
            notes.append(f"base.backend {backend} is not applied: {error}")
    if tuned["kernels"] == {"timed"} and "L2V_AUTOTUNE" not in os.environ:
        os.environ["L2V_AUTOTUNE"] = "1"  # before the first launch; its results are kept on disk for the next start
        notes.append(f"kernels timed at their first launch, as {file} has it")
    return notes


def _began_with(recipe: Recipe, name: str) -> dict[str, Any] | None:
    """The recipe that a stage with a checkpoint or an adapter began with; it resumes with the same, for the same bits."""
    folder = run_folder(recipe) / name
    try:
        then = (read_stage(folder) or {})["recipe"]
        return then if has_begun(folder) and {*KEYS} <= {*then["stages"][name]} and "backend" in then["base"] else None
    except (KeyError, TypeError):
        return None
