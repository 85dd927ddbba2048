"""The work of a step: the sampler's plan over examples of real or assumed lengths."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from l2v.data.examples import MntpBlocks
from l2v.data.local import files_of, is_local
from l2v.data.mixture import Mixture
from l2v.data.open import open_examples
from l2v.data.sampler import Sampler, StepPlan
from l2v.data.tokens import TextTokenizer, load_tokenizer
from l2v.plan.shapes import local_folder
from l2v.recipe import Contrastive, Mntp, Recipe, Stage
from l2v.training.memory import columns_of

MAX_TOKENISED_BYTES = 64 << 20
"""Local data up to this size is tokenised to know the lengths of its texts."""
PLANNED_STEPS = 8
"""Steps that a plan averages over."""


@dataclass(frozen=True)
class Lengths:
    """Lengths of examples, as `Sampler` reads them. text: mean tokens that a token attends to. real: from the data.

    mixture: how often each source is used, as training has it; None if the sources are concatenated. notes: what training
    logs about the data.
    """

    lengths: np.ndarray
    segments: np.ndarray
    text: float
    real: bool
    mixture: Mixture | None = None
    notes: tuple[str, ...] = ()

    @property
    def an_epoch(self) -> int:
        """Examples of an epoch, by the weights of the sources."""
        return sum(self.mixture.counts) if self.mixture else len(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)


def lengths_of(recipe: Recipe, name: str) -> Lengths:
    """Lengths of the stage's data, if data and tokenizer are local and the data is small; else the longest allowed.

    Raises:
        UserError: local data does not exist or cannot be read.
    """
    stage = recipe.stages[name]
    if _is_here(recipe, stage):
        base = recipe.base
        tokenizer = load_tokenizer(str(local_folder(base.tokenizer or base.model)), revision=base.revision)
        found = open_examples(stage.data, stage, TextTokenizer(tokenizer, base.template, stage.length))
        per_text = found.lengths / found.segments
        tokens = found.lengths * _uses(found.mixture, len(found.lengths))
        text = float((tokens * per_text).sum() / tokens.sum())
        if isinstance(found, MntpBlocks) and isinstance(stage, Mntp) and stage.document_mask:
            # Attention stays within a document, and a document within its block.
            documents = np.diff(found.ends, prepend=0)
            text = float((documents * np.minimum(documents, stage.length)).sum() / documents.sum())
        return Lengths(found.lengths, found.segments, text, True, found.mixture, tuple(found.notes))
    count, columns = stage.batch * (PLANNED_STEPS + 1), columns_of(stage)
    tokens = min(columns * stage.length, stage.micro_tokens)
    return Lengths(np.full(count, tokens), np.full(count, columns), float(stage.length), real=False)


def _uses(mixture: Mixture | None, count: int) -> np.ndarray:
    """How often an epoch uses each example: float64 [count]."""
    uses = np.ones(count)
    if mixture:
        for members, used in zip(mixture.members, mixture.counts, strict=True):
            uses[members] = used / max(len(members), 1)
    return uses


def _is_here(recipe: Recipe, stage: Stage) -> bool:
    """Whether data and tokenizer can be read in seconds and without a download.

    Raises:
        UserError: a local source has no file.
    """
    total, all_local = 0, True
    for source in stage.data:
        if source.path.startswith("sample:"):
            continue
        if not is_local(source):
            all_local = False
            continue
        total += sum(file.stat().st_size for file in files_of(source))
    folder = local_folder(recipe.base.tokenizer or recipe.base.model)
    return all_local and total <= MAX_TOKENISED_BYTES and any(folder.glob("tokenizer*"))


@dataclass(frozen=True)
class Share:
    """The work of the busiest rank in a step: tokens of every micro-batch by unit, and queries and candidates by unit."""

    units: list[list[int]]
    queries: list[int]
    candidates: list[int]
    idle: int = 0
    """Ranks without work in this step."""
    most: list[tuple[int, int]] = field(default_factory=list)
    """With `negatives: global`, for every unit the largest number of candidates and of queries on any rank."""

    @property
    def micros(self) -> int:
        return sum(map(len, self.units))

    @property
    def largest(self) -> int:
        """Tokens of the largest micro-batch."""
        return max((tokens for unit in self.units for tokens in unit), default=0)


def shares(
    lengths: Lengths, stage: Stage, world: int, seed: int, micro_tokens: int | None = None, steps: int = PLANNED_STEPS
) -> list[tuple[int, Share]]:
    """(tokens of all ranks, the busiest rank's share) for each of the first steps.

    Raises:
        UserError: an example is longer than the micro-batch.
    """
    sampler = Sampler(
        lengths, batch=stage.batch, micro_tokens=micro_tokens or stage.micro_tokens, seed=seed, world=world,
        group=getattr(stage, "group", None),
    )  # fmt: skip
    count = max(1, min(steps, stage.steps, sampler.steps_per_epoch - 1))
    return [_busiest(sampler.plan(step), lengths, stage) for step in range(count)]


def steps_per_epoch(lengths: Lengths, stage: Stage) -> int:
    """Steps until the data repeats, as training counts them."""
    group, longest = getattr(stage, "group", None), int(lengths.lengths.max())
    return Sampler(lengths, batch=stage.batch, micro_tokens=longest, seed=0, group=group).steps_per_epoch


def _busiest(plan: StepPlan, lengths: Lengths, stage: Stage) -> tuple[int, Share]:
    tokens = lengths.lengths
    total = int(sum(tokens[unit.examples].sum() for units in plan.units for unit in units if unit.examples))
    loads = [sum(int(tokens[unit.examples].sum()) for unit in units if unit.examples) for units in plan.units]
    units = plan.units[int(np.argmax(loads))]
    micros = [[int(tokens[micro].sum()) if micro else 1 for micro in unit.micros] for unit in units]
    queries = [len(unit.examples) for unit in units]
    candidates = [_counts(unit.examples, lengths)[0] for unit in units]
    most: list[tuple[int, int]] = []
    if isinstance(stage, Contrastive) and stage.negatives == "global":
        columns = [
            [_counts(unit.examples, lengths) for unit in column] for column in zip(*plan.units, strict=True)
        ]  # by unit, then by rank
        candidates = [sum(c for column in columns for c, _ in column)] * len(units)
        most = [(max(c for c, _ in column), max(q for _, q in column)) for column in columns]
    return total, Share(micros, queries, candidates, sum(load == 0 for load in loads), most)


def _counts(examples: list[int], lengths: Lengths) -> tuple[int, int]:
    """Number of candidates and of queries."""
    return (int(lengths.segments[examples].sum()) - len(examples), len(examples)) if examples else (0, 0)
