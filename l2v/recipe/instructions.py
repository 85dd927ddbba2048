"""The instructions that an encoder was trained with. A leaf of the import tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from l2v.errors import UserError
from l2v.recipe.schema import Recipe, Supervised

Side = Literal["query", "document"]
SIDES: tuple[Side, ...] = ("query", "document")


@dataclass(frozen=True)
class Instructions:
    """What training put before queries and before documents: every different instruction, "" for none.

    by_row: the sides of which the rows had instructions of their own, which only the data knows.
    """

    query: tuple[str, ...] = ()
    document: tuple[str, ...] = ()
    by_row: tuple[str, ...] = ()

    @classmethod
    def trained(cls, recipe: Recipe, stage: str) -> Instructions:
        """Those of the last supervised stage up to `stage`; none if there is no such stage."""
        for name in [stage, *reversed(recipe.chain(stage))]:
            if isinstance(found := recipe.stages[name], Supervised):
                break
        else:
            return cls()
        prompts = [source.prompts() for source in found.data]
        own = {"query" for source in found.data if source.instruction}
        own |= {"document" for source in found.data if source.document_instruction}
        if any(s.instruction and p.symmetric for s, p in zip(found.data, prompts, strict=True)):
            own.add("document")  # a symmetric source has the query's instruction on both sides
        return cls(
            tuple(dict.fromkeys(p.query for p in prompts)),
            tuple(dict.fromkeys(p.document or "" for p in prompts)),
            tuple(sorted(own)),
        )

    @classmethod
    def of_json(cls, values: Mapping[str, Sequence[str]]) -> Instructions:
        """From the lists of an export's file."""
        return cls(**{key: tuple(value) for key, value in values.items()})

    def unclear(self, side: Side) -> str | None:
        """Why there is not one instruction for a side, as part of a sentence; None if there is one, or none at all."""
        if side in self.by_row:
            return f"the rows that it was trained on have their own {side} instructions"
        found: Any = getattr(self, side)
        if len(found) > 1:
            return f"it was trained with {len(found)} {side} instructions: " + ", ".join(f"'{text}'" for text in found)
        return None

    def one(self, side: Side) -> str | None:
        """The instruction of a side; None for plain texts.

        Raises:
            UserError: there are several.
        """
        if why := self.unclear(side):
            raise UserError(f"{why}; choose one with instruction=..., '' for none")
        found = getattr(self, side)
        return found[0] or None if found else None
