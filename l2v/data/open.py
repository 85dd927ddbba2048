"""From the sources of a recipe to the examples of a stage."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from l2v.data.examples import MntpBlocks, Pairs, Views
from l2v.data.mixture import mix_sources
from l2v.data.sources import Kind, open_parts, together
from l2v.data.tokens import TextTokenizer
from l2v.errors import UserError
from l2v.recipe import Mntp, Source, Stage, Supervised


def open_examples(sources: list[Source], stage: Stage, texts: TextTokenizer) -> MntpBlocks | Pairs | Views:
    """Rows to examples, by objective; the mixture of the sources is attached to them."""
    kinds: dict[type[Stage], Kind] = {Mntp: "documents", Supervised: "pairs"}
    kind = kinds.get(type(stage), "sentences")
    guesses: list[str] = []
    parts = open_parts(sources, kind, guesses)
    rows = together(parts, sources)
    examples: MntpBlocks | Pairs | Views
    if isinstance(stage, Mntp):
        examples = MntpBlocks(rows, texts, document_mask=stage.document_mask)
    elif isinstance(stage, Supervised):
        examples = Pairs(rows, texts, max_negatives=stage.max_negatives, mask_duplicates=stage.mask_duplicates)
    else:
        examples = Views(rows, texts)
    examples.mixture = mix_sources(sources, [len(part) for part in parts], examples.rows_of, stage)
    if examples.mixture:
        examples.notes += examples.mixture.notes
    examples.notes += guesses
    return examples


def settled(stage: Stage, segments: np.ndarray) -> Stage:
    """The stage with `max_negatives` as a number: the most that one of its examples has.

    segments: int64, texts of every example.

    Raises:
        UserError: `hard_negatives: own`, and no example has any.
    """
    if not isinstance(stage, Supervised):
        return stage
    most = int(segments.max()) - 2
    if stage.hard_negatives == "own" and not most:
        paths = ", ".join(source.path for source in stage.data)
        raise UserError(
            f"hard_negatives: own compares a query with its own hard negatives, and no row of {paths} has any: mine some "
            "(l2v data mine), name their column (negatives) or use hard_negatives: all"
        )
    return replace(stage, max_negatives=most)
