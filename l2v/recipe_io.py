"""Read a recipe: YAML with line numbers -> dataclasses, dotted overrides, one clear sentence for every mistake."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from l2v.errors import RecipeError
from l2v.recipe import OBJECTIVES, Recipe, Source, Stage, check
from l2v.recipe_safety import BY_HAND, refuse_secret, refuse_unsafe
from l2v.zero_config import find_config, read_config


@dataclass
class Node:
    """A YAML value (scalar, list of Node or dict of Node) and where it was written."""

    value: Any
    where: str


def shipped_folder(part: str) -> Path:
    """What comes with l2v in launch/`part`: inside an installed package, or in a checkout."""
    here = Path(__file__).resolve().parent
    installed = here / "launch" / part
    return installed if installed.is_dir() else here.parent / "launch" / part


def recipe_folder() -> Path:
    """The recipes that come with l2v."""
    return shipped_folder("recipes")


def find_recipe(name: str) -> Path:
    """A path as given, or the name of a recipe that comes with l2v."""
    return find_shipped(name, recipe_folder(), "recipe")


def find_shipped(name: str, folder: Path, what: str) -> Path:
    """A YAML file as given, or one of `folder` by its name; `what` it is called in the message."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = folder / f"{Path(name).stem if name.endswith('.yaml') else name}.yaml"
    if path.suffix != ".yaml" and shipped.is_file():
        return shipped
    known = sorted(p.stem for p in folder.glob("*.yaml"))
    raise RecipeError(f"there is no {what} '{name}': give a YAML file or one of {', '.join(known)}")


def load_recipe(name: str, overrides: typing.Sequence[str] = (), stage: str | None = None) -> Recipe:
    """Read, override and validate.

    `overrides` are `dotted.key=value` with YAML values. A key is looked up from the top; if its first part is the name
    of a stage, below that stage; and if `stage` is given, else below that one.
    """
    path = find_recipe(name)
    tree = read_tree(path)
    known = _stage_names(tree)
    if stage is not None and stage not in known:
        raise RecipeError(f"{path}: there is no stage '{stage}'{_nearest(stage, known)}")
    for text in overrides:
        refuse_secret(text)
        _override(tree, text, stage)
    refuse_unsafe(tree)
    _follow_zero_config(tree)
    return check(_build_recipe(tree), str(path))


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
    return check(_build_recipe(_plain(tree, where)), where)


def _plain(value: Any, where: str) -> Node:
    if isinstance(value, dict):
        return Node({str(k): _plain(v, where) for k, v in value.items()}, where)
    if isinstance(value, list):
        return Node([_plain(v, where) for v in value], where)
    return Node(value, where)


def read_tree(path: Path) -> Node:
    """The YAML file as nodes that know their lines; nothing but plain scalars, lists and mappings is made."""
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise RecipeError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if root is None:
        raise RecipeError(f"{path}: the file is empty")
    loader = yaml.SafeLoader("")

    def walk(node: yaml.Node) -> Node:
        where = f"{path}:{node.start_mark.line + 1}"
        if isinstance(node, yaml.MappingNode):
            out: dict[str, Node] = {}
            for key_node, value_node in node.value:
                key, at = str(key_node.value), f"{path}:{key_node.start_mark.line + 1}"
                if key in out:
                    raise RecipeError(f"{at}: the key '{key}' stands twice")
                child = walk(value_node)
                child.where = at
                out[key] = child
            return Node(out, where)
        if isinstance(node, yaml.SequenceNode):
            return Node([walk(item) for item in node.value], where)
        try:
            return Node(loader.construct_object(node, deep=True), where)
        except (yaml.YAMLError, ValueError) as error:
            raise RecipeError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None

    return walk(root)


def parse_override(text: str, example: str) -> tuple[list[str], Node]:
    """`dotted.key=value`, the value read as YAML -> the parts of the key, and the value; `example` is for the message."""
    key, equals, raw = text.partition("=")
    where = f"command line '{text}'"
    if not equals or not key.strip():
        raise RecipeError(f"{where}: an override reads key=value, for example {example}")
    try:
        value = yaml.safe_load(raw) if raw else None
    except yaml.YAMLError:
        value = raw
    return key.strip().split("."), _plain(value, where)


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
            raise RecipeError(f"{where}: unknown key '{parts[0]}'{_nearest(parts[0], valid)}; or choose a --stage")
    if parts[0] == "stages" and len(parts) > 1 and parts[1] not in stages:
        raise RecipeError(f"{where}: there is no stage '{parts[1]}'{_nearest(parts[1], stages)}")
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
    """`zero.config` becomes a path, and `zero.stage` the stage that stands in that file.

    A file named on the command line goes before a stage in the recipe; otherwise the two must agree.
    """
    zero = tree.value.get("zero") if isinstance(tree.value, dict) else None
    config = zero.value.get("config") if zero is not None and isinstance(zero.value, dict) else None
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
            f"{own.where}: zero.stage is {own.value} and {file} is for stage {stage}; leave zero.stage out, or choose another "
            "configuration"
        )
    zero.value["stage"] = Node(stage, config.where)


def _stage_names(tree: Node) -> list[str]:
    stages = tree.value.get("stages") if isinstance(tree.value, dict) else None
    return list(stages.value) if stages is not None and isinstance(stages.value, dict) else []


def _names(cls: type) -> list[str]:
    return [f.name.rstrip("_") for f in dataclasses.fields(cls)]


def _nearest(word: str, valid: typing.Iterable[str]) -> str:
    valid = list(valid)
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else f"; valid keys: {', '.join(valid)}"


def _build_recipe(tree: Node) -> Recipe:
    if not isinstance(tree.value, dict):
        raise RecipeError(f"{tree.where}: a recipe is a mapping of keys; found {_kind(tree.value)}")
    base = tree.value.get("base")
    if base is not None and isinstance(base.value, str):
        tree.value["base"] = Node({"model": base}, base.where)
    stages = tree.value.pop("stages", Node({}, tree.where))
    tree.value["stages"] = Node({}, stages.where)
    recipe = build(Recipe, tree, "")
    if not isinstance(stages.value, dict):
        raise RecipeError(f"{stages.where}: stages is a mapping of stage names; found {_kind(stages.value)}")
    shared_lora = to_dict(recipe.lora)
    for name, node in stages.value.items():
        recipe.stages[name] = _build_stage(name, node, shared_lora)
    return recipe


def _build_stage(name: str, node: Node, shared_lora: dict[str, Any]) -> Stage:
    path = f"stages.{name}"
    if not isinstance(node.value, dict):
        raise RecipeError(f"{node.where}: {path} is a mapping of keys; found {_kind(node.value)}")
    objective = node.value.get("objective")
    if objective is None:
        raise RecipeError(f"{node.where}: {path}.objective is missing; choose {', '.join(OBJECTIVES)}")
    if not isinstance(objective.value, str) or objective.value not in OBJECTIVES:
        raise RecipeError(
            f"{objective.where}: {path}.objective '{objective.value}' is unknown{_nearest(str(objective.value), OBJECTIVES)}"
        )
    own = node.value.get("lora", Node({}, node.where))
    if isinstance(own.value, dict):
        merged = {key: _plain(value, own.where) for key, value in shared_lora.items()} | own.value
        node.value["lora"] = Node(merged, own.where)
    return build(OBJECTIVES[objective.value], node, path)


def build(cls: type, node: Node, path: str) -> Any:
    """A dataclass from a mapping, its fields converted by their type hints; `path` is its dotted name in messages."""
    if not isinstance(node.value, dict):
        raise RecipeError(f"{node.where}: {path or 'the file'} is a mapping of keys; found {_kind(node.value)}")
    hints = typing.get_type_hints(cls)
    fields = {f.name.rstrip("_"): f for f in dataclasses.fields(cls)}
    for key, child in node.value.items():
        if key not in fields:
            dotted = f"{path}.{key}" if path else key
            raise RecipeError(f"{child.where}: unknown key '{dotted}'{_nearest(key, fields)}")
    given: dict[str, Any] = {}
    for key, f in fields.items():
        dotted = f"{path}.{key}" if path else key
        if key in node.value:
            given[f.name] = _convert(hints[f.name], node.value[key], dotted)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise RecipeError(f"{node.where}: the key '{dotted}' is missing")
    return cls(**given)


def _convert(hint: Any, node: Node, path: str) -> Any:
    origin, value = get_origin(hint), node.value
    if hint is Any:
        return _strip(node)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in get_args(hint) if a is not type(None)), node, path)
    if origin is Literal:
        if value in get_args(hint) and type(value) in {type(a) for a in get_args(hint)}:
            return value
        options = [str(a) for a in get_args(hint)]
        raise RecipeError(f"{node.where}: {path} is '{value}'; choose one of {', '.join(options)}")
    if origin is list:
        (item,) = get_args(hint)
        items = value if isinstance(value, list) else [node]
        return [_convert(item, child, f"{path}[{i}]") for i, child in enumerate(items)]
    if origin is tuple:
        wanted = get_args(hint)
        if not isinstance(value, list) or len(value) != len(wanted):
            raise RecipeError(f"{node.where}: {path} is a list of {len(wanted)} numbers; found {_kind(value)}")
        return tuple(_convert(t, child, f"{path}[{i}]") for i, (t, child) in enumerate(zip(wanted, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise RecipeError(f"{node.where}: {path} is a mapping of keys; found {_kind(value)}")
        return _strip(node)
    if hint is Source and isinstance(value, str):
        return Source(path=value)
    if dataclasses.is_dataclass(hint):
        return build(hint, node, path)
    return _scalar(hint, node, path)


def _scalar(hint: type, node: Node, path: str) -> Any:
    value = node.value
    if hint is float and isinstance(value, str):
        with contextlib.suppress(ValueError):  # YAML 1.1 reads 5e-5 (no dot) as a string
            value = float(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not hint:
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        raise RecipeError(f"{node.where}: {path} is {names[hint]}; found {_kind(value)}")
    return value


def _strip(node: Node) -> Any:
    if isinstance(node.value, dict):
        return {k: _strip(v) for k, v in node.value.items()}
    if isinstance(node.value, list):
        return [_strip(v) for v in node.value]
    return node.value


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    kinds = {dict: "a mapping", list: "a list", bool: str(value).lower() if isinstance(value, bool) else ""}
    return kinds.get(type(value)) or f"'{value}'"
