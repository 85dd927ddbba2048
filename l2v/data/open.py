"""From the sources of a recipe to the examples of a stage."""

from __future__ import annotations

from l2v.data.examples import MntpBlocks, Pairs, Views
from l2v.data.mixture import mix_sources
from l2v.data.sources import Kind, open_parts, together
from l2v.data.tokens import TextTokenizer
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
        examples = Pairs(rows, texts, max_negatives=stage.max_negatives)
    else:
        examples = Views(rows, texts)
    examples.mixture = mix_sources(sources, [len(part) for part in parts], examples.rows_of, stage)
    if examples.mixture:
        examples.notes += examples.mixture.notes
    examples.notes += guesses
    return examples
