"""How a model runs a packed batch: all texts in one sequence, or a row each; and with which attention."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn

from l2v.batch import PackedBatch, moved

Layout = Literal["packed", "padded", "rows"]
FULLEST = 0.75
"""Rows of one forward are padded to the longest; one that fills less than this begins the next forward."""


@dataclass(frozen=True)
class ForwardPath:
    """layout: `packed` puts all texts into one sequence, `padded` gives each a row, `rows` as well, only texts of one length
    together, so that nothing is padded. attention: the name of transformers' attention implementation.
    """

    layout: Layout
    attention: str

    @property
    def name(self) -> str:
        """As messages say it."""
        return f"{self.layout}, attention {self.attention}"


def set_path(model: nn.Module, path: ForwardPath) -> None:
    """Record on a model how its batches run; `PackedDecoder` follows it."""
    for each in {id(m): m for m in (model, getattr(model, "base_model", model))}.values():
        each.l2v_path = path


def path_of(decoder: nn.Module, backend: str) -> ForwardPath:
    """What `set_path` recorded; a decoder that was built otherwise runs packed."""
    inner: Any = decoder.get_base_model() if isinstance(decoder, PeftModel) else decoder
    return getattr(inner, "l2v_path", None) or ForwardPath("packed", backend)


@dataclass(frozen=True)
class Grid:
    """Some texts of a batch as rows, n of them, padded on the right to t tokens.

    tokens_nt: int64, which token of the batch; 0 in padding. valid_nt: bool. slots: int64, places of the tokens in the
    flattened grid. places: int64, their places in the batch. rows: which texts. lengths: theirs.
    """

    tokens_nt: torch.Tensor
    valid_nt: torch.Tensor
    slots: torch.Tensor
    places: torch.Tensor
    rows: list[int]
    lengths: list[int]

    @classmethod
    def of(cls, batch: PackedBatch, rows: list[int]) -> Grid:
        """Built on the host, where the lengths are, so that nothing waits for the device."""
        starts = torch.tensor([0, *batch.lengths]).cumsum(0)[torch.tensor(rows)]
        lengths = [batch.lengths[row] for row in rows]
        column_t = torch.arange(max(lengths))
        valid_nt = column_t < torch.tensor(lengths)[:, None]
        tokens_nt = (starts[:, None] + column_t).masked_fill(~valid_nt, 0)
        slots, where = valid_nt.flatten().nonzero()[:, 0], batch.input_ids_T.device
        places = tokens_nt.flatten()[slots]
        return cls(
            moved(tokens_nt, where), moved(valid_nt, where), moved(slots, where), moved(places, where), rows, lengths
        )


def grids(batch: PackedBatch, layout: Layout, *, at_once: bool) -> list[Grid]:
    """The forwards of a batch, longest texts first; at_once: one for all texts."""
    order = sorted(range(len(batch.lengths)), key=lambda row: -batch.lengths[row])
    parts: list[list[int]] = []
    for row in order:
        longest = batch.lengths[parts[-1][0]] if parts else 0
        least = 0 if at_once else longest if layout == "rows" else FULLEST * longest
        if not parts or batch.lengths[row] < least:
            parts.append([])
        parts[-1].append(row)
    return [Grid.of(batch, part) for part in parts]


def accepted(decoder: nn.Module) -> set[str] | None:
    """Names that a model's forward takes; None if it passes any name on to its layers."""
    inner: Any = decoder.get_base_model() if isinstance(decoder, PeftModel) else decoder
    parameters = inspect.signature(inner.forward).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters}


def takes_positions(decoder: nn.Module) -> bool:
    """Whether a model's forward has `position_ids`."""
    inner: Any = decoder.get_base_model() if isinstance(decoder, PeftModel) else decoder
    return "position_ids" in inspect.signature(inner.forward).parameters


def first_position(decoder: nn.Module) -> int:
    """The id of a text's first position: padding_idx + 1 in RoBERTa's table of learned positions, else 0."""
    table = _position_table(decoder)
    return 0 if table is None or table.padding_idx is None else table.padding_idx + 1


def position_limit(decoder: nn.Module) -> tuple[int, str] | None:
    """Tokens of the longest text that a base takes, and what limits them as the end of a sentence; None without a limit."""
    table = _position_table(decoder)
    if table is not None:
        offset = getattr(table, "offset", 0)  # OPT and BioGPT skip the first entries themselves
        most = table.num_embeddings - (offset if isinstance(offset, int) else 0) - first_position(decoder)
        return most, f"the base has {most:,} learned positions"
    config: Any = decoder.config
    text = config.get_text_config()
    found = [getattr(text, "rope_parameters", None), getattr(text, "rope_scaling", None)]
    ropes = [rope for rope in found if isinstance(rope, dict)]
    by_kind = [inner for rope in ropes for inner in rope.values() if isinstance(inner, dict)]
    for rope in ropes + by_kind:
        if rope.get("rope_type", rope.get("type")) in ("longrope", "dynamic"):
            stated = rope.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            most = stated or text.max_position_embeddings
            return most, f"beyond {most:,} the rotary positions of this base depend on the longest text of a batch"
    return None


def _position_table(decoder: nn.Module) -> nn.Embedding | None:
    names = ("position_embeddings", "embed_positions", "wpe", "positions_embed")
    tables = (m for n, m in decoder.named_modules() if isinstance(m, nn.Embedding) and n.rsplit(".", 1)[-1] in names)
    return next(tables, None)
