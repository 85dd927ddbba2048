"""The recipe's keys as Markdown tables: fields of its dataclasses, explained by the comments of llama3-8b-da.yaml.

python docs/site/recipe_keys.py    prints them
"""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path

from l2v.recipe import OBJECTIVES, Base, Contrastive, Lora, Recipe, Source, Stage, Template, Tracking, Zero

ROOT = Path(__file__).resolve().parents[2]
COMMENTED = ROOT / "launch" / "recipes" / "llama3-8b-da.yaml"
KEY = re.compile(r"^(?P<indent> *)(?:# )?(?P<item> {2}|- )?(?P<key>[a-z_]+):.*?(?:\s+# (?P<comment>.*))?$")
CONTINUED = re.compile(r"^ {20,}# (.*)$")
TYPE = re.compile(
    r"^(?:text|whole number|number|list|mapping|true \| false)(?:, end)?(?: or null| \| null| or auto)?\b[;:]? ?"
)
VALUES = re.compile(r"^\w+(?: \| \w+)+(?:[;,] | (?=\()|$)")
SECTIONS: list[
    tuple[str, str, type, type | None]
] = [  # heading, where its keys stand in the file, class, class it extends
    ("Top level", "", Recipe, None),
    ("`base`", "base", Base, None),
    ("`base.template`", "template", Template, None),
    ("`lora`", "lora", Lora, None),
    ("`zero`", "zero", Zero, None),
    ("`tracking`", "tracking", Tracking, None),
    ("Every stage", "stage", Stage, None),
    ("Stages with `objective: mntp`", "stage", OBJECTIVES["mntp"], Stage),
    ("Stages with `objective: simcse` or `supervised`", "stage", Contrastive, Stage),
    ("Stages with `objective: simcse`", "stage", OBJECTIVES["simcse"], Contrastive),
    ("Stages with `objective: supervised`", "stage", OBJECTIVES["supervised"], Contrastive),
    ("Keys of a source in `data` and `eval_data`", "source", Source, None),
]


def comments(path: Path = COMMENTED) -> dict[tuple[str, str], str]:
    """The first comment of each key, by the section that it stands in; keys that are commented out count too."""
    found: dict[tuple[str, str], str] = {}
    top, below, last = "", "", None
    for line in path.read_text(encoding="utf-8").splitlines():
        if more := CONTINUED.match(line):
            if last:
                found[last] += " " + more[1]
            continue
        last, match = None, KEY.match(line)
        if not match:
            continue
        key, depth = match["key"], len(match["indent"])
        if match["item"]:
            section = "source"
        elif depth == 0:
            section, top = "", key
        elif depth == 2:
            section, below = top, key
        else:
            section = "stage" if top == "stages" else below
        if match["comment"] and (section, key) not in found:
            last = (section, key)
            found[last] = match["comment"]
    return found


def tables() -> str:
    """All keys with type, default and meaning. Raises KeyError for a key that the commented recipe does not explain."""
    explained, parts = comments(), []
    for heading, section, kind, parent in SECTIONS:
        inherited = {(field.name, field.default) for field in dataclasses.fields(parent)} if parent else set()
        hints = typing.get_type_hints(kind)
        lines = [f"## {heading}", "", "| key | type | default | meaning |", "|-|-|-|-|"]
        for field in dataclasses.fields(kind):
            if (field.name, field.default) in inherited or (parent and field.name == "objective"):
                continue
            key = field.name.rstrip("_")
            cells = [f"`{key}`", _type(hints[field.name]), _default(field), _meaning(explained[section, key])]
            lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
        if not section:  # a key of the file, not of the recipe that is read from it
            lines.append(f"| `extends` | text or null | `null` | {_meaning(explained[section, 'extends'])} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _type(hint: typing.Any) -> str:
    """A type as a user writes its values."""
    words = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}
    if hint in words:
        return words[hint]
    origin, of = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in of)
    if origin in (list, tuple):
        return "one source or a list" if of[0] is Source else "list of " + _type(of[0])
    if origin is dict or dataclasses.is_dataclass(hint):
        return "mapping"
    return " or ".join(_type(part) for part in of)  # a union


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{_yaml(field.default)}`"
    if field.default_factory is dataclasses.MISSING:
        return "required"
    made = field.default_factory()
    return "see below" if dataclasses.is_dataclass(made) else f"`{_yaml(made)}`"


def _yaml(value: typing.Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return "{}" if value == {} else '""' if value == "" else str(value)


def _meaning(comment: str) -> str:
    """The comment without the type or the list of values that it begins with; the table has those in a column."""
    return VALUES.sub("", TYPE.sub("", comment)) or comment


if __name__ == "__main__":
    print(tables(), end="")
