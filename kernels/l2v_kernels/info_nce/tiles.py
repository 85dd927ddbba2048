"""The blocks of scores that the directions ask for, and the pieces of them that exist at one time."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from l2v_kernels.info_nce.settings import Direction, Labels, Settings


@dataclass
class Side:
    """Embeddings in one role: queries, candidates, or the queries of all ranks."""

    x_nE: torch.Tensor
    exact_Pn: torch.Tensor
    """1 / norm of each prefix of each row, 0 for a zero vector, in float64: whatever multiplies it is rounded after."""
    inverse_Pn: torch.Tensor
    """The same in the dtype of sums."""

    @classmethod
    def of(cls, x_nE: torch.Tensor, exact_Pn: torch.Tensor) -> "Side":
        return cls(x_nE, exact_Pn, exact_Pn.to(sum_dtype(x_nE)))


@dataclass
class Block:
    """All scores of one direction: [N, columns]."""

    direction: Direction
    columns: Side
    targets_N: torch.Tensor
    """Each row's own column: its positive, or the query itself."""
    column_ids_CK: torch.Tensor | None
    keep_target: bool
    """Whether a row's own column is one of its terms (the pair) or never (a text with itself)."""
    minus: bool
    """Whether the loss subtracts the own column's score here."""
    statistic: int
    """Which softmax the terms belong to."""

    @property
    def of_docs(self) -> bool:
        """Rows are the positives, not the queries."""
        return self.direction.startswith("doc")

    @property
    def to_docs(self) -> bool:
        return self.direction.endswith("to_doc")


@dataclass
class Tile:
    """One piece of a block, R rows by C columns, as views of what belongs to whole rows and columns."""

    block: Block
    rows: slice
    columns: slice
    row_scale_PR: torch.Tensor
    """scale / norm, so that score = dot * row_scale * column_scale."""
    column_scale_PC: torch.Tensor
    targets_R: torch.Tensor
    row_ids_RK: torch.Tensor | None
    column_ids_CK: torch.Tensor | None
    owners_C: torch.Tensor | None
    restricted_C: torch.Tensor | None
    hide_own: bool
    """Hide all that its owner was given with (doc_to_doc)."""
    limit_PR: torch.Tensor | None
    """Scores above are false negatives."""
    first_number: int
    """Number of the first row among all queries."""

    @property
    def first_column(self) -> int:
        return self.columns.start

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start


def sum_dtype(x: torch.Tensor) -> torch.dtype:
    """What products of x are summed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def blocks(candidates: Side, everyone: Side, labels: Labels, settings: Settings) -> list[Block]:
    """The blocks in a fixed order, query_to_doc first."""
    N = len(labels.targets_N)
    numbers_N = None
    out = []
    for direction in settings.directions:
        to_docs = direction.endswith("to_doc")
        if not to_docs and numbers_N is None:
            numbers_N = torch.arange(settings.offset, settings.offset + N, device=labels.targets_N.device)
        out.append(
            Block(
                direction,
                columns=candidates if to_docs else everyone,
                targets_N=labels.targets_N if to_docs else numbers_N,
                column_ids_CK=labels.candidate_ids_MK if to_docs else labels.all_query_ids_QK,
                keep_target=direction in ("query_to_doc", "doc_to_query"),
                minus=direction == "query_to_doc" or not settings.joint,
                statistic=0 if settings.joint else len(out),
            )
        )
    return out


def tile(
    block: Block,
    rows: slice,
    columns: slice,
    row_scale_PN: torch.Tensor,
    limit_PN: torch.Tensor | None,
    labels: Labels,
    settings: Settings,
) -> Tile:
    """The piece of a block; nothing is copied."""
    ids = block.column_ids_CK
    hide_own = block.direction == "doc_to_doc" and labels.owners_M is not None
    restricted = labels.restricted_M if block.to_docs else None
    owners = labels.owners_M if hide_own or restricted is not None else None
    return Tile(
        block,
        rows,
        columns,
        row_scale_PR=row_scale_PN[:, rows],
        column_scale_PC=block.columns.inverse_Pn[:, columns],
        targets_R=block.targets_N[rows],
        row_ids_RK=None if ids is None else labels.query_ids_NK[rows],
        column_ids_CK=None if ids is None else ids[columns],
        owners_C=None if owners is None else owners[columns],
        restricted_C=None if restricted is None else restricted[columns],
        hide_own=hide_own,
        limit_PR=None if limit_PN is None else limit_PN[:, rows],
        first_number=settings.offset + rows.start,
    )


def tile_shape(n_rows: int, n_columns: int, scores: int) -> tuple[int, int]:
    """Rows and columns of a tile of at most `scores` scores.

    The gradient of the columns is read and written once for every tile above the last, that of the rows once for every
    tile beside it: nearly square tiles move the least. Sides are multiples of 128, as products like them.
    """
    if n_rows * n_columns <= scores:
        return n_rows, n_columns
    side = max(1, int(scores**0.5))
    rows = min(n_rows, side)
    columns = min(n_columns, max(1, scores // rows))
    rows = min(n_rows, max(1, scores // columns))
    rows, columns = (
        n if n == limit or n < 128 else n // 128 * 128 for n, limit in ((rows, n_rows), (columns, n_columns))
    )
    return rows, columns


def spans(total: int, step: int) -> Iterator[slice]:
    """Slices of at most `step` that cover `total`."""
    for begin in range(0, total, max(1, step)):
        yield slice(begin, min(begin + step, total))
