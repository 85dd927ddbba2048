"""YAML with line numbers to dataclasses by their type hints; every error is one sentence."""

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

from l2v.errors import RecipeError, first_line
from l2v.recipe.source import Source


@dataclass
class Node:
    """A YAML value (scalar, list of Node or dict of Node) and its location."""

    value: Any
    where: str


def read_tree(path: Path) -> Node:
    """The YAML file as nodes with line numbers; only plain scalars, lists and mappings are constructed."""
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise RecipeError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {first_line(error)}") from None
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
                    raise RecipeError(f"{at}: the key '{key}' appears twice")
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
    """`dotted.key=value`, the value read as YAML -> the parts of the key, and the value; `example` is shown in the message."""
    key, equals, raw = text.partition("=")
    where = f"command line '{text}'"
    if not equals or not key.strip():
        raise RecipeError(f"{where}: an override has the form key=value, for example {example}")
    try:
        value = yaml.safe_load(raw) if raw else None
    except yaml.YAMLError:
        value = raw
    return key.strip().split("."), plain_node(value, where)


def nearest(word: str, valid: typing.Iterable[str]) -> str:
    valid = list(valid)
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else f"; valid keys: {', '.join(valid)}"


def build(cls: type, node: Node, path: str) -> Any:
    """A dataclass from a mapping, its fields converted by their type hints; `path` is its dotted name in messages."""
    if not isinstance(node.value, dict):
        raise RecipeError(f"{node.where}: {path or 'the file'} is a mapping of keys; found {kind_of(node.value)}")
    hints = typing.get_type_hints(cls)
    fields = {f.name.rstrip("_"): f for f in dataclasses.fields(cls)}
    for key, child in node.value.items():
        if key not in fields:
            dotted = f"{path}.{key}" if path else key
            raise RecipeError(f"{child.where}: unknown key '{dotted}'{nearest(key, fields)}")
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
        return _convert_union(get_args(hint), node, path)
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
            raise RecipeError(f"{node.where}: {path} is a list of {len(wanted)} numbers; found {kind_of(value)}")
        return tuple(_convert(t, child, f"{path}[{i}]") for i, (t, child) in enumerate(zip(wanted, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise RecipeError(f"{node.where}: {path} is a mapping of keys; found {kind_of(value)}")
        return _strip(node)
    if hint is Source and isinstance(value, str):
        return Source(path=value)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, node, path)
    return _scalar(hint, node, path)


def _convert_union(hints: tuple[Any, ...], node: Node, path: str) -> Any:
    """A value that may be nothing, one of some words, or of one other type."""
    value = node.value
    if value is None and type(None) in hints:
        return None
    words = [word for hint in hints if get_origin(hint) is Literal for word in get_args(hint)]
    if isinstance(value, str) and value in words:
        return value
    others = [hint for hint in hints if hint is not type(None) and get_origin(hint) is not Literal]
    if not others:
        raise RecipeError(
            f"{node.where}: {path} is {kind_of(value)}; choose one of {', '.join(map(str, words))}, or null"
        )
    hint = others[0]
    return _scalar(hint, node, path, words) if words else _convert(hint, node, path)


def _scalar(hint: type, node: Node, path: str, words: typing.Sequence[str] = ()) -> Any:
    """words: valid values of another kind, for the message."""
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
        valid = " or ".join([names[hint], *words])
        raise RecipeError(f"{node.where}: {path} is {valid}; found {kind_of(value)}")
    return value


def _strip(node: Node) -> Any:
    if isinstance(node.value, dict):
        return {k: _strip(v) for k, v in node.value.items()}
    if isinstance(node.value, list):
        return [_strip(v) for v in node.value]
    return node.value


def kind_of(value: Any) -> str:
    if value is None:
        return "nothing"
    kinds = {dict: "a mapping", list: "a list", bool: str(value).lower() if isinstance(value, bool) else ""}
    return kinds.get(type(value)) or f"'{value}'"


def plain_node(value: Any, where: str) -> Node:
    if isinstance(value, dict):
        return Node({str(k): plain_node(v, where) for k, v in value.items()}, where)
    if isinstance(value, list):
        return Node([plain_node(v, where) for v in value], where)
    return Node(value, where)
