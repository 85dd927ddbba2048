"""What one InfoNCE call is asked to do, apart from its embeddings."""

from dataclasses import dataclass
from typing import Literal

import torch

Direction = Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]

DIRECTIONS: tuple[Direction, ...] = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


@dataclass(frozen=True)
class Settings:
    """The numbers of a call. Hashable and without tensors, so that it also keys tuned configurations."""

    directions: tuple[Direction, ...]
    joint: bool
    """One softmax over the scores of all directions; otherwise one softmax a direction, averaged."""
    margin: float | None
    """A candidate whose cosine exceeds the positive's by more than this is no negative."""
    prefixes: tuple[int, ...]
    """Matryoshka: lengths of the prefixes, ascending; the last one is what is used of E."""
    offset: int
    """Row n of the queries is number offset + n of all queries."""
    workspace: int
    """Bytes that scores and their coefficients may take at once."""
    variant: Literal["chunked", "fused"] | None = None

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """(begin, end) of what each prefix adds to the one before."""
        return tuple(zip((0, *self.prefixes[:-1]), self.prefixes, strict=True))


@dataclass(frozen=True)
class Labels:
    """Who belongs to whom. int64 tensors on the embeddings' device; ids have K kinds, and a negative id equals nothing."""

    targets_N: torch.Tensor
    query_ids_NK: torch.Tensor | None
    candidate_ids_MK: torch.Tensor | None
    all_query_ids_QK: torch.Tensor | None
    owners_M: torch.Tensor | None
    """Number (among all queries) of the query that a candidate was given with, negative for none."""
    restricted_M: torch.Tensor | None
    """bool: only the owner sees this candidate."""
