"""Instructions by task and side: the tables of `l2v.recipe.tasks` for the Danish tasks, mteb's own for the rest, or none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from l2v.errors import UserError, first_line
from l2v.recipe.instructions import Instructions, Side
from l2v.recipe.tasks import DANISH, ENGLISH, EVALUATED, TASKS

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata

# Retrieval is asymmetric: the instruction describes the search, so it precedes queries only.
ASYMMETRIC = ("Retrieval", "Reranking", "InstructionRetrieval", "InstructionReranking")
SIDES = ("query", "document")
TRAINED = "trained"

TABLES: dict[str, Mapping[str, Any]] = {"en": ENGLISH, "da": DANISH, "mteb": {}, "off": {}, TRAINED: {}}


class Prompts:
    """Chooses the instruction of a text: `en`, `da` (the words of training), `trained`, `mteb` (mteb's own alone), `off`, or the
    user's YAML file.

    trained: only what the encoder itself was trained with (`Instructions`). A file maps a task's name, or its type, to a
    text, or to {query: ..., document: ...}; an empty text means none. Tasks that it does not name use mteb's own. A task's
    name takes precedence over its type.
    """

    def __init__(self, choice: str = "en") -> None:
        self.choice = choice
        known = TABLES.get(choice)
        self.table: Mapping[str, Any] = _read(Path(choice)) if known is None else known

    def instruction(self, metadata: TaskMetadata, side: str | None, trained: Instructions | None = None) -> str | None:
        """The instruction for one side of a task (`query`, `document`, or None if both sides are the same).

        trained: those of the encoder, for the choice `trained`.

        Raises:
            UserError: the choice is `trained`, and the encoder was trained with several for this side.
        """
        if self.choice == "off":
            return None
        if self.choice == TRAINED:
            return _trained(metadata, side, trained or Instructions())
        for entry in (self.table.get(metadata.name), self.table.get(metadata.type), metadata.prompt):
            if entry is None:
                continue
            if isinstance(entry, str):
                return None if metadata.type in ASYMMETRIC and side == "document" else entry or None
            return entry.get(side or "query") or None
        return None


def _trained(metadata: TaskMetadata, side: str | None, trained: Instructions) -> str | None:
    """That of the kind of task, if training had it; for a search, the one of its side; for other tasks none."""
    kind = EVALUATED.get(metadata.name)
    own: Side = "document" if side == "document" else "query"
    if kind and TASKS[kind].query in trained.query:
        return TASKS[kind].query if own == "query" or TASKS[kind].symmetric else TASKS[kind].document
    return trained.one(own) if metadata.type in ASYMMETRIC else None


def _read(path: Path) -> dict[str, Any]:
    names = "en, da, mteb, off, trained, or a YAML file"
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"--prompts {path}: no such table or file; use {names}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {first_line(error)}") from None
    if not isinstance(table, dict):
        raise UserError(f"{path}: must map task names or types to instructions")
    for task, entry in table.items():
        good = isinstance(entry, str) or (
            isinstance(entry, dict) and set(entry) <= set(SIDES) and all(isinstance(v, str) for v in entry.values())
        )
        if not good:
            raise UserError(f"{path}: {task} must be a text, or a mapping of query and document to texts")
    return table
