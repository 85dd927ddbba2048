"""The settings and labels of one InfoNCE call: all but its embeddings."""

from dataclasses import dataclass
from typing import Literal

import torch

from l2v_kernels.info_nce.quantize import Quantize

Direction = Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]

DIRECTIONS: tuple[Direction, ...] = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


@dataclass(frozen=True)
class Settings:
    """The settings of a call. Hashable, without tensors."""

    directions: tuple[Direction, ...]
    joint: bool
    """One softmax over the scores of all directions; otherwise one softmax a direction, averaged."""
    margin: float | None
    """A candidate whose cosine exceeds the positive's by more than this is not a negative."""
    prefixes: tuple[int, ...]
    """Matryoshka: lengths of the prefixes, ascending; columns beyond the last one are not used."""
    offset: int
    """Row n of the queries is number offset + n of all queries."""
    workspace: int
    """Bytes that scores and their coefficients may take at once."""
    variant: Literal["chunked", "fused"] | None = None
    quantize: Quantize | None = None
    """Embeddings are compared as these small vectors; see `quantize`."""

    @property
    def prefix_slices(self) -> tuple[tuple[int, int], ...]:
        """(begin, end) of the slice of E that each prefix adds to the one before."""
        return tuple(zip((0, *self.prefixes[:-1]), self.prefixes, strict=True))

    def code_rows(self, x_nE: torch.Tensor) -> int:
        """How many rows' codes fit a quarter of the workspace."""
        return max(1, self.workspace // 4 // (x_nE.shape[1] * x_nE.element_size()))


@dataclass(frozen=True)
class Labels:
    """Which texts belong together. int64 tensors on the embeddings' device; I kinds of ids; a negative id equals nothing."""

    targets_N: torch.Tensor
    query_ids_NI: torch.Tensor | None
    candidate_ids_MI: torch.Tensor | None
    all_query_ids_QI: torch.Tensor | None
    owners_M: torch.Tensor | None
    """Number (among all queries) of the query that a candidate was given with, negative for none."""
    restricted_M: torch.Tensor | None
    """bool: only the owner is compared with this candidate."""
