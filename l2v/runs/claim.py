"""Claim a stage's folder for a recipe, find what the stage starts from, and publish its adapter at the end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from l2v.errors import RecipeError, UserError
from l2v.files import reason, replace_text, sync
from l2v.model.lora import WEIGHTS, save_adapter, sha256
from l2v.recipe import Recipe
from l2v.recipe.load import from_dict, to_dict
from l2v.runs.folder import ADAPTER, STAGE_FILE, has_begun, is_trained, run_folder

# May change when a run resumes: they affect memory, speed and logging, not the trained weights.
CHANGEABLE_KEYS = {"log_every", "eval_every", "save_every", "keep", "micro_tokens", "recompute", "eval_data"}


def merged_adapters(recipe: Recipe, name: str) -> list[tuple[str, dict[str, str]]]:
    """What is merged into the base before a stage, oldest first: published adapters, then earlier stages."""
    chain = recipe.chain(name)
    oldest = recipe.stages[chain[0] if chain else name]
    out: list[tuple[str, dict[str, str]]] = [(adapter, {}) for adapter in oldest.adapters or []]
    for earlier in chain:
        adapter = run_folder(recipe) / earlier / ADAPTER
        if not adapter.is_dir():
            raise UserError(
                f"stage '{name}' starts from '{earlier}', which is not trained yet ({adapter} is missing): train it first, "
                "or omit --stage, or give adapters=[...]"
            )
        out.append((str(adapter), {"stage": earlier}))
    return out


def claim(recipe: Recipe, name: str, folder: Path, facts: dict[str, Any], fresh: bool) -> str:
    """Claim the stage's folder for this recipe: "done" if the stage is trained, else "go".

    Raises:
        UserError: if the folder belongs to another recipe or program, or cannot be written.
    """
    parents = [adapter for adapter, _ in merged_adapters(recipe, name)]
    facts = facts | {"merged": [sha256(Path(p) / WEIGHTS) if (Path(p) / WEIGHTS).is_file() else p for p in parents]}
    mark = folder / STAGE_FILE
    try:
        if fresh and mark.is_file():
            shutil.rmtree(folder)
        if folder.is_dir() and any(folder.iterdir()) and not mark.is_file():
            raise UserError(f"{folder} is not empty and not a run of l2v: choose another folder with out=...")
        if mark.is_file():
            before = json.loads(mark.read_text(encoding="utf-8"))
            changed = difference(before, facts)
            if changed and has_begun(folder):  # a start that failed on a wrong path has nothing to keep
                raise UserError(
                    f"{folder} belongs to another recipe: {changed}; choose another folder with out=..., "
                    "or start from scratch with --fresh"
                )
            if is_trained(folder):
                return "done"
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(mark, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}; choose another folder with out=...") from None
    except json.JSONDecodeError:
        raise UserError(f"{mark}: damaged; remove {folder} or choose another folder with out=...") from None
    return "go"


def difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first difference between two runs of a stage, as part of a sentence; None if the second continues the first."""
    if before.get("stage") != now["stage"]:
        return f"its stage is '{before.get('stage')}'"
    name = now["stage"]
    try:  # keys that an earlier version did not have get their defaults
        old = to_dict(from_dict(before["recipe"], STAGE_FILE))
    except RecipeError:
        old = before["recipe"]
    new = now["recipe"]
    pairs = [(f"stages.{name}.{k}", old["stages"].get(name, {}).get(k), v) for k, v in new["stages"][name].items()]
    pairs += [(f"base.{k}", old["base"].get(k), v) for k, v in new["base"].items()]
    pairs += [("seed", old["seed"], new["seed"])]
    if before.get("merged") != now["merged"]:
        return "an adapter that it starts from was trained again or replaced since"
    for key, was, is_now in pairs:
        if was != is_now and key.rsplit(".", 1)[-1] not in CHANGEABLE_KEYS:
            return f"{key} was {json.dumps(was)} and is now {json.dumps(is_now)}"
    return None


def publish(decoder, weights: dict[str, torch.Tensor], folder: Path, lineage: dict[str, Any]) -> None:
    """Write the adapter of a trained stage atomically.

    Raises:
        UserError: if the disk is full or the folder cannot be written.
    """
    partial = folder / ".adapter.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        save_adapter(decoder, weights, partial, lineage)
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        partial.rename(folder / ADAPTER)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{folder / 'adapter'}: cannot be written: {reason(error)}; free some space and start the same command again; it "
            "resumes from the newest checkpoint"
        ) from None
