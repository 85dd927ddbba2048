"""Claim a stage's folder for a recipe, find what the stage starts from, and publish its adapter at the end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError

from l2v.errors import RecipeError, UserError
from l2v.files import reason, replace_text, sync
from l2v.model.adapter_file import holds_weights, weights_sha256
from l2v.model.full import save_weights
from l2v.model.lora import WEIGHTS, save_adapter, sha256
from l2v.recipe import Recipe
from l2v.recipe.load import from_dict, to_dict
from l2v.runs.folder import ADAPTER, MODEL, STAGE_FILE, has_begun, is_trained, read_stage, result_of, run_folder

# May change when a run resumes: they affect memory, speed and logging, not the trained weights. `steps` may grow as well.
CHANGEABLE_KEYS = {
    "log_every", "eval_every", "eval_data", "save_every", "keep", "skip_limit", "micro_tokens", "recompute",
}  # fmt: skip
TRAINED_STEPS = "adapter_steps"
"""In stage.json while a trained stage trains longer: the steps of the adapter that it still has."""


@dataclass(frozen=True)
class Claimed:
    """done: the stage is trained. grown_from: the steps that the recipe had before, if it now has more; else None."""

    done: bool
    grown_from: int | None = None


def merged_adapters(recipe: Recipe, name: str) -> list[tuple[str, dict[str, str]]]:
    """What is merged into the base before a stage, oldest first: published adapters, then earlier stages.

    An earlier stage without LoRA replaces all before it.
    """
    chain = recipe.chain(name)
    oldest = recipe.stages[chain[0] if chain else name]
    out: list[tuple[str, dict[str, str]]] = [(adapter, {}) for adapter in oldest.adapters or []]
    for earlier in chain:
        trained = result_of(run_folder(recipe) / earlier)
        if trained is None:
            raise UserError(
                f"stage '{name}' starts from '{earlier}', which is not trained yet ({run_folder(recipe) / earlier / ADAPTER} is "
                "missing): train it first, or omit --stage, or give adapters=[...]"
            )
        if holds_weights(trained):  # which has all before it merged
            out = []
        out.append((str(trained), {"stage": earlier}))
    return out


def _identity(folder: Path) -> str | None:
    """The hash of an adapter's or a model's weights; None if they are not on this machine."""
    if holds_weights(folder):
        return weights_sha256(folder)
    return sha256(folder / WEIGHTS) if (folder / WEIGHTS).is_file() else None


def claim(recipe: Recipe, name: str, folder: Path, facts: dict[str, Any], fresh: bool) -> Claimed:
    """Claim the stage's folder for this recipe.

    Raises:
        UserError: if the folder belongs to another recipe or program, or cannot be written.
    """
    parents = [adapter for adapter, _ in merged_adapters(recipe, name)]
    facts = facts | {"merged": [_identity(Path(parent)) or parent for parent in parents]}
    mark, grown_from = folder / STAGE_FILE, None
    try:
        if fresh and mark.is_file():
            shutil.rmtree(folder)
        if folder.is_dir() and any(folder.iterdir()) and not mark.is_file():
            raise UserError(f"{folder} is not empty and not a run of l2v: choose another folder with out=...")
        if mark.is_file():
            before = json.loads(mark.read_text(encoding="utf-8"))
            # A start that failed on a wrong path has nothing to keep.
            if has_begun(folder) and (changed := difference(before, facts)):
                raise UserError(f"{folder} {changed}")
            grown_from = _grown_from(before, facts) if has_begun(folder) else None
            if is_trained(folder):
                trained_steps = before.get(TRAINED_STEPS, grown_from)
                if trained_steps is None:
                    return Claimed(done=True)
                facts |= {TRAINED_STEPS: trained_steps}
        folder.mkdir(parents=True, exist_ok=True)
        _write(mark, facts)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}; choose another folder with out=...") from None
    except json.JSONDecodeError:
        raise UserError(f"{mark}: damaged; remove {folder} or choose another folder with out=...") from None
    return Claimed(done=False, grown_from=grown_from)


def recorded_negatives(folder: Path) -> int | None:
    """The `max_negatives` that a stage began with, if it has begun and that is a number; else None.

    A recipe that now says `auto`, which is the default, continues with this number: earlier versions wrote their default.
    """
    before = read_stage(folder) if has_begun(folder) else None
    try:
        found = before["recipe"]["stages"][before["stage"]]["max_negatives"] if before else None
    except (KeyError, TypeError):
        return None
    return found if isinstance(found, int) else None


def difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Why the second run does not continue the first, as the rest of a sentence about its folder; None if it does."""
    start_again = "choose another folder with out=..., or start from scratch with --fresh"
    if before.get("stage") != now["stage"]:
        return f"belongs to another recipe: its stage is '{before.get('stage')}'; {start_again}"
    name = now["stage"]
    if before.get("merged") != now["merged"]:
        return (
            "was trained from an adapter that was trained again, trained longer or replaced since: train it again from the new "
            f"one with --fresh --stage {name}, or choose another folder with out=..."
        )
    for key, was, is_now in _changes(before, now):
        if key == f"stages.{name}.steps":
            if was > is_now:
                return (
                    f"was claimed for {was:,} steps, and {key} is now {is_now:,}: a stage can be trained longer, not shorter; "
                    f"use {key}={was}, or {start_again}"
                )
        elif key.rsplit(".", 1)[-1] not in CHANGEABLE_KEYS:
            key, was, is_now = _leaf(key, was, is_now)
            old, new = (_shown(value, beside) for value, beside in ((was, is_now), (is_now, was)))
            back = "" if isinstance(was, list | dict) else f"use {key}={old}, or "
            return f"belongs to another recipe: {key} was {old} and is now {new}; {back}{start_again}"
    return None


def _changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, old value, new value) of what differs between two runs of a stage."""
    name, new = now["stage"], now["recipe"]
    try:  # keys that an earlier version did not have get their defaults
        old = to_dict(from_dict(before["recipe"], STAGE_FILE))
    except RecipeError:
        old = before["recipe"]
    stage, stage_now = old["stages"].get(name, {}), new["stages"][name]
    pairs = [(f"stages.{name}.{k}", stage.get(k), v) for k, v in stage_now.items()]
    pairs += [(f"base.{k}", old["base"].get(k), v) for k, v in new["base"].items()]
    pairs += [("seed", old["seed"], new["seed"])]
    for key, was, is_now in pairs:
        if key == f"stages.{name}.decay_steps":  # a number up to `steps` is another way to write `end`
            was, is_now = _decay_end(was, stage.get("steps", 0)), _decay_end(is_now, stage.get("steps", 0))
        if was != is_now:
            yield key, was, is_now


def _leaf(key: str, was: Any, is_now: Any) -> tuple[str, Any, Any]:
    """The first value that differs inside two like lists or mappings, so that a message shows no whole source."""
    if isinstance(was, list) and isinstance(is_now, list) and len(was) == len(is_now):
        at = next(i for i, (one, two) in enumerate(zip(was, is_now, strict=True)) if one != two)
        return _leaf(key if len(was) == 1 else f"{key}.{at}", was[at], is_now[at])
    if isinstance(was, dict) and isinstance(is_now, dict):
        name = next((name for name in is_now if was.get(name) != is_now[name]), None)
        if name is not None:
            return _leaf(f"{key}.{name}", was.get(name), is_now[name])
    return key, was, is_now


def _shown(value: Any, beside: Any) -> str:
    """A value as JSON; a mapping beside none (`lora: null`) is not written out."""
    mapping = isinstance(value, dict) and beside is None
    return "a mapping of keys" if mapping else json.dumps(value, ensure_ascii=False)


def _decay_end(decay_steps: int | str | None, steps: int) -> int | str | None:
    return "end" if isinstance(decay_steps, int) and decay_steps <= steps else decay_steps


def _grown_from(before: dict[str, Any], now: dict[str, Any]) -> int | None:
    was, is_now = (facts["recipe"]["stages"][now["stage"]]["steps"] for facts in (before, now))
    return was if was < is_now else None


def _write(mark: Path, facts: dict[str, Any]) -> None:
    replace_text(mark, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


def publish(decoder, weights: dict[str, torch.Tensor], folder: Path, lineage: dict[str, Any]) -> None:
    """Write the adapter of a trained stage, or its model if it has no LoRA, atomically; one of fewer steps is replaced.

    Raises:
        UserError: if the disk is full or the folder cannot be written.
    """
    adapter = isinstance(decoder, PeftModel)
    name = ADAPTER if adapter else MODEL
    partial, old = folder / f".{name}.partial", folder / f".{name}.old"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        (save_adapter if adapter else save_weights)(decoder, weights, partial, lineage)
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        if is_trained(folder):  # a crash between the two renames leaves the last checkpoint, which is published again
            shutil.rmtree(old, ignore_errors=True)
            (folder / name).rename(old)
        partial.rename(folder / name)
        sync(folder)
        shutil.rmtree(old, ignore_errors=True)
        facts = read_stage(folder) or {}
        if facts.pop(TRAINED_STEPS, None) is not None:
            _write(folder / STAGE_FILE, facts)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{folder / name}: cannot be written: {reason(error)}; free some space and start the same command again; it "
            "resumes from the newest checkpoint"
        ) from None
