"""Read a recipe: a YAML file or a shipped name, dotted overrides, checks; and recipes as plain values."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

from l2v.errors import RecipeError
from l2v.recipe.checks import check
from l2v.recipe.extends import read_recipe
from l2v.recipe.safety import BY_HAND, refuse_code, refuse_secret, refuse_unsafe
from l2v.recipe.schema import OBJECTIVES, Recipe, Stage
from l2v.recipe.shipped import find_recipe
from l2v.recipe.typed_yaml import Node, build, kind_of, nearest, parse_override, plain_node
from l2v.recipe.zero import find_config, read_config


def load_recipe(name: str, overrides: typing.Sequence[str] = (), stage: str | None = None) -> Recipe:
    """Read, override and validate.

    `overrides` are `dotted.key=value` with YAML values. A key is looked up from the top; if its first part is the name
    of a stage, below that stage; otherwise below `stage`, if it is given.
    """
    path = find_recipe(name)
    tree = _tree(path, overrides, stage)
    refuse_unsafe(tree)
    refuse_code(tree)
    _follow_zero_config(tree)
    return check(_build_recipe(tree), str(path))


def where_of(name: str, overrides: typing.Sequence[str], stage: str | None, key: typing.Sequence[str | int]) -> str:
    """The file and line, or the override, that a key of a loaded recipe comes from; of a key without one, what it belongs to.

    key: its parts, numbers for places in a list; a list of one may be written as its item.
    """
    node = _tree(find_recipe(name), overrides, stage)
    for part in key:
        value = node.value
        if isinstance(part, int):
            node = value[part] if isinstance(value, list) and part < len(value) else node
        elif isinstance(value, dict) and part in value:
            node = value[part]
    return node.where


def _tree(path: Path, overrides: typing.Sequence[str], stage: str | None) -> Node:
    """The recipe file with its overrides."""
    tree = read_recipe(path)
    known = _stage_names(tree)
    if stage is not None and stage not in known:
        raise RecipeError(f"{path}: no stage '{stage}'{nearest(stage, known)}")
    for text in overrides:
        refuse_secret(text)
        _override(tree, text, stage)
    return tree


def to_dict(value: Any) -> Any:
    """A recipe (or a part of it) as plain JSON-able values, `from_` written as `from`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name.rstrip("_"): to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {k: to_dict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_dict(v) for v in value]
    return value


def from_dict(tree: dict[str, Any], where: str) -> Recipe:
    """The recipe that `to_dict` wrote; `where` names its file in messages."""
    return check(_build_recipe(plain_node(tree, where)), where)


def _override(tree: Node, text: str, stage: str | None) -> None:
    parts, new = parse_override(text, "stages.mntp.steps=100")
    where = new.where
    stages = _stage_names(tree)
    if parts[0] not in _names(Recipe):
        if parts[0] in stages:
            parts = ["stages", *parts]
        elif stage is not None:
            parts = ["stages", stage, *parts]
        else:
            valid = sorted([*_names(Recipe), *stages])
            if parts[0] in {name for kind in OBJECTIVES.values() for name in _names(kind)}:
                key = ".".join(parts)
                raise RecipeError(
                    f"{where}: '{key}' is a key of a stage: write stages.{next(iter(stages), 'NAME')}.{key}=..., or choose "
                    "a --stage"
                )
            raise RecipeError(f"{where}: unknown key '{parts[0]}'{nearest(parts[0], valid)}; or choose a --stage")
    if parts[0] == "stages" and len(parts) > 1 and parts[1] not in stages:
        raise RecipeError(f"{where}: no stage '{parts[1]}'{nearest(parts[1], stages)}")
    at = tree
    for part in parts[:-1]:
        if not isinstance(at.value, dict):
            at.value = {"model": Node(at.value, at.where)} if parts[0] == "base" else {}
        at = at.value.setdefault(part, Node({}, where))
    if not isinstance(at.value, dict):
        at.value = {"model": Node(at.value, at.where)} if parts[0] == "base" else {}
    old = at.value.get(parts[-1])
    if parts == ["base"] and old is not None and isinstance(old.value, dict) and not isinstance(new.value, dict):
        old.value["model"] = new
    else:
        at.value[parts[-1]] = new


def _follow_zero_config(tree: Node) -> None:
    """`zero.config` becomes a path, and `zero.stage` the stage in that file.

    A file named on the command line overrides a stage in the recipe; otherwise the two must agree.
    """
    zero = tree.value.get("zero") if isinstance(tree.value, dict) else None
    if zero is None or not isinstance(zero.value, dict):
        return
    config = zero.value.get("config")
    if config is None or not isinstance(config.value, str):
        return
    file = find_config(config.value)
    config.value = str(file)
    stage, own = read_config(file).get("zero_optimization", {}).get("stage"), zero.value.get("stage")
    if stage is None:
        return
    overruled = config.where.startswith(BY_HAND) and not (own and own.where.startswith(BY_HAND))
    if own is not None and own.value != stage and not overruled:
        raise RecipeError(
            f"{own.where}: zero.stage is {own.value} and {file} is for stage {stage}; remove zero.stage, or choose another "
            "configuration"
        )
    zero.value["stage"] = Node(stage, config.where)


def _stage_names(tree: Node) -> list[str]:
    stages = tree.value.get("stages") if isinstance(tree.value, dict) else None
    return list(stages.value) if stages is not None and isinstance(stages.value, dict) else []


def _names(cls: type) -> list[str]:
    return [f.name.rstrip("_") for f in dataclasses.fields(cls)]


def _build_recipe(tree: Node) -> Recipe:
    if not isinstance(tree.value, dict):
        raise RecipeError(f"{tree.where}: a recipe is a mapping of keys; found {kind_of(tree.value)}")
    base = tree.value.get("base")
    if base is not None and isinstance(base.value, str):
        tree.value["base"] = Node({"model": base}, base.where)
    stages = tree.value.pop("stages", Node({}, tree.where))
    tree.value["stages"] = Node({}, stages.where)
    recipe = build(Recipe, tree, "")
    if not isinstance(stages.value, dict):
        raise RecipeError(f"{stages.where}: stages is a mapping of stage names; found {kind_of(stages.value)}")
    shared_lora = to_dict(recipe.lora)
    for name, node in stages.value.items():
        recipe.stages[name] = _build_stage(name, node, shared_lora)
    return recipe


def _build_stage(name: str, node: Node, shared_lora: dict[str, Any] | None) -> Stage:
    """shared_lora: the keys of the recipe's `lora`, which a stage's own replace one by one; None: all weights are trained."""
    path = f"stages.{name}"
    if not isinstance(node.value, dict):
        raise RecipeError(f"{node.where}: {path} is a mapping of keys; found {kind_of(node.value)}")
    objective = node.value.get("objective")
    if objective is None:
        raise RecipeError(f"{node.where}: {path}.objective is missing; choose {', '.join(OBJECTIVES)}")
    if not isinstance(objective.value, str) or objective.value not in OBJECTIVES:
        raise RecipeError(
            f"{objective.where}: {path}.objective '{objective.value}' is unknown{nearest(str(objective.value), OBJECTIVES)}"
        )
    own = node.value.get("lora")
    if own is None and shared_lora is None:
        node.value["lora"] = Node(None, node.where)
    elif own is None or isinstance(own.value, dict):
        where, keys = (node.where, {}) if own is None else (own.where, own.value)
        merged = {key: plain_node(value, where) for key, value in (shared_lora or {}).items()} | keys
        node.value["lora"] = Node(merged, where)
    return build(OBJECTIVES[objective.value], node, path)
