"""Blocks of scores, one a direction, and the tiles of them that exist at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from l2v_kernels.info_nce.settings import Direction, Labels, Settings


@dataclass
class Side:
    """Embeddings in one role: queries, candidates, or the queries of all ranks."""

    x_nE: torch.Tensor
    exact_Pn: torch.Tensor
    """1 / norm of each prefix of each row, 0 for a zero vector, in float64: rounded only after it is multiplied."""
    inverse_Pn: torch.Tensor
    """The same, rounded to the dtype of sums; rows in memory as `Side.of` was told, zero beyond n."""

    inverse_step_n: torch.Tensor | None = None
    """1 / step of each row where rows are compared quantised; see `quantize`. Norms are then of their codes."""
    codes: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    """From rows and their 1 / step to codes, in which they are compared."""

    def compared(self, at: slice | torch.Tensor) -> torch.Tensor:
        """[r, E]: these rows as they are multiplied: as they are, or their codes, which exist for a tile at a time."""
        if self.codes is None or self.inverse_step_n is None:
            return self.x_nE[at]
        return self.codes(self.x_nE[at], self.inverse_step_n[at])

    @classmethod
    def of(cls, x_nE: torch.Tensor, exact_Pn: torch.Tensor, multiple: int = 1) -> "Side":
        """multiple: rows of inverse_Pn in memory are as long as the next multiple of it."""
        (P, n), dtype = exact_Pn.shape, sum_dtype(x_nE)
        rest = -n % multiple
        if not rest:
            return cls(x_nE, exact_Pn, exact_Pn.to(dtype))
        padded = torch.empty(P, n + rest, dtype=dtype, device=x_nE.device)
        padded[:, n:].zero_()
        return cls(x_nE, exact_Pn, padded[:, :n].copy_(exact_Pn))


@dataclass
class Block:
    """All scores of one direction: [N, columns]."""

    direction: Direction
    columns: Side
    targets_N: torch.Tensor
    """Each row's own column: its positive, or the query itself."""
    column_ids_nI: torch.Tensor | None
    keep_target: bool
    """Whether a row's own column is a term of the softmax (the pair) or never (a text with itself)."""
    minus: bool
    """Whether the loss subtracts the own column's score here."""
    statistic: int
    """The index of the softmax that the terms belong to."""

    @property
    def of_docs(self) -> bool:
        """Whether rows are the positives, not the queries."""
        return self.direction.startswith("doc")

    @property
    def to_docs(self) -> bool:
        """Whether columns are the candidates, not the queries."""
        return self.direction.endswith("to_doc")


@dataclass
class Tile:
    """One piece of a block, r rows by c columns, as views of what belongs to whole rows and columns."""

    block: Block
    rows: slice
    columns: slice
    row_scale_Pr: torch.Tensor
    """scale / norm, so that score = dot * row_scale * column_scale."""
    column_scale_Pc: torch.Tensor
    targets_r: torch.Tensor
    row_ids_rI: torch.Tensor | None
    column_ids_cI: torch.Tensor | None
    owners_c: torch.Tensor | None
    restricted_c: torch.Tensor | None
    hide_own: bool
    """Exclude all candidates of a row's own query (doc_to_doc)."""
    limit_Pr: torch.Tensor | None
    """Scores above it are false negatives."""
    first_number: int
    """Number of the first row among all queries."""

    @property
    def first_column(self) -> int:
        return self.columns.start

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start


def sum_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which matmuls of x are summed."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def blocks(candidates: Side, everyone: Side, labels: Labels, settings: Settings) -> list[Block]:
    """The blocks in a fixed order, query_to_doc first."""
    targets_N = labels.targets_N
    own_N: torch.Tensor | None = None
    out: list[Block] = []
    for direction in settings.directions:
        to_docs = direction.endswith("to_doc")
        if not to_docs and own_N is None:
            own_N = torch.arange(settings.offset, settings.offset + len(targets_N), device=targets_N.device)
        out.append(
            Block(
                direction,
                columns=candidates if to_docs else everyone,
                targets_N=targets_N if to_docs or own_N is None else own_N,
                column_ids_nI=labels.candidate_ids_MI if to_docs else labels.all_query_ids_QI,
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
    """The tile of a block at these rows and columns; nothing is copied."""
    ids = block.column_ids_nI
    hide_own = block.direction == "doc_to_doc" and labels.owners_M is not None
    restricted = labels.restricted_M if block.to_docs else None
    owners = labels.owners_M if hide_own or restricted is not None else None
    return Tile(
        block,
        rows,
        columns,
        row_scale_Pr=row_scale_PN[:, rows],
        column_scale_Pc=block.columns.inverse_Pn[:, columns],
        targets_r=block.targets_N[rows],
        row_ids_rI=None if ids is None or labels.query_ids_NI is None else labels.query_ids_NI[rows],
        column_ids_cI=None if ids is None else ids[columns],
        owners_c=None if owners is None else owners[columns],
        restricted_c=None if restricted is None else restricted[columns],
        hide_own=hide_own,
        limit_Pr=None if limit_PN is None else limit_PN[:, rows],
        first_number=settings.offset + rows.start,
    )


def tile_shape(n_rows: int, n_columns: int, scores: int) -> tuple[int, int]:
    """(rows, columns) of a tile of at most `scores` scores.

    Every row of tiles reads and writes the gradient of the columns, every column of tiles that of the rows: nearly square
    tiles move the fewest bytes. Sides are multiples of 128, which suit GEMM tiles.
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
