"""The work of a step: the sampler's plan over examples of real or assumed lengths."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from l2v.data.balance import Cost
from l2v.data.local import files_of, is_local
from l2v.data.mixture import Mixture
from l2v.data.open import open_examples
from l2v.data.sampler import Sampler, StepPlan, Unit, squares_of
from l2v.data.tokens import TextTokenizer, load_tokenizer
from l2v.plan.shapes import local_folder
from l2v.recipe import Contrastive, Recipe, Stage
from l2v.training.memory import columns_of

MAX_TOKENISED_BYTES = 64 << 20
"""Local data up to this size is tokenised to know the lengths of its texts."""
PLANNED_STEPS = 8
"""Steps that a plan averages over."""


@dataclass(frozen=True)
class Lengths:
    """Lengths of examples, as `Sampler` reads them. squares: sums of the squared lengths of their texts. real: from the data.

    mixture: how often each source is used, as training has it; None if the sources are concatenated. notes: what training
    logs about the data.
    """

    lengths: np.ndarray
    segments: np.ndarray
    squares: np.ndarray
    real: bool
    mixture: Mixture | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, examples) -> Lengths:
        """Of the examples of a stage."""
        squares, notes = squares_of(examples), tuple(examples.notes)
        return cls(examples.lengths, examples.segments, squares, True, examples.mixture, notes)

    @property
    def text(self) -> float:
        """Mean number of tokens that a token attends to."""
        uses = _uses(self.mixture, len(self.lengths))
        return float((self.squares * uses).sum() / (self.lengths * uses).sum())

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
        found = open_examples(stage.data, stage, TextTokenizer.of(tokenizer, base, stage.length))
        return Lengths.of(found)
    count, columns = stage.batch * (PLANNED_STEPS + 1), columns_of(stage)
    tokens = min(columns * stage.length, stage.micro_tokens)
    squares = np.full(count, float(tokens * stage.length))
    return Lengths(np.full(count, tokens), np.full(count, columns), squares, real=False)


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
    """The work of one rank in a step, by unit: tokens of every micro-batch, the sums of squared lengths of its texts, and
    (queries, candidates) of every loss that it computes.

    gathered: for every unit the largest number of candidates and of queries on any rank with `negatives: global`; with
    `negatives: micro` the largest number of rows, and 0.
    """

    units: list[list[int]]
    losses: list[list[tuple[int, int]]]
    squares: list[list[float]] = field(default_factory=list)
    gathered: list[tuple[int, int]] = field(default_factory=list)

    @property
    def micros(self) -> int:
        return sum(map(len, self.units))

    @property
    def largest(self) -> int:
        """Tokens of the largest micro-batch."""
        return max((tokens for unit in self.units for tokens in unit), default=0)

    @property
    def tokens(self) -> int:
        """Tokens of all micro-batches; the filler of an empty one is one."""
        return sum(map(sum, self.units))


@dataclass(frozen=True)
class Work:
    """A step: its tokens over all ranks, each rank's share, and the number of ranks without an example."""

    tokens: int
    ranks: list[Share]
    idle: int = 0

    @property
    def busiest(self) -> Share:
        """The share of the rank with most tokens."""
        return max(self.ranks, key=lambda share: share.tokens)

    @property
    def largest(self) -> int:
        """Tokens of the largest micro-batch of any rank."""
        return max(share.largest for share in self.ranks)


def sampler_of(lengths: Lengths, stage: Stage, world: int, seed: int, micro_tokens: int, cost: Cost | None) -> Sampler:
    """The sampler of training.

    Raises:
        UserError: an example is longer than the micro-batch.
    """
    return Sampler(
        lengths, batch=stage.batch, micro_tokens=micro_tokens, seed=seed, world=world, group=getattr(stage, "group", None),
        cost=cost,
    )  # fmt: skip


def work_of(
    lengths: Lengths, stage: Stage, world: int, seed: int, micro_tokens: int | None = None, steps: int = PLANNED_STEPS,
    cost: Cost | None = None,
) -> list[Work]:  # fmt: skip
    """The work of each of the first steps.

    Raises:
        UserError: an example is longer than the micro-batch.
    """
    sampler = sampler_of(lengths, stage, world, seed, micro_tokens or stage.micro_tokens, cost)
    count = max(1, min(steps, stage.steps, sampler.steps_per_epoch - 1))
    return [work_of_step(sampler.plan(step), lengths, stage) for step in range(count)]


def steps_per_epoch(lengths: Lengths, stage: Stage) -> int:
    """Steps until the data repeats, as training counts them."""
    group, longest = getattr(stage, "group", None), int(lengths.lengths.max())
    return Sampler(lengths, batch=stage.batch, micro_tokens=longest, seed=0, group=group).steps_per_epoch


def work_of_step(plan: StepPlan, lengths: Lengths, stage: Stage) -> Work:
    """The work of the sampler's plan of a step."""
    chosen = plan.examples
    losses: list[list[list[tuple[int, int]]]] = [[[] for _ in units] for units in plan.units]
    gathered: list[tuple[int, int]] = []
    if isinstance(stage, Contrastive):
        for at, column in enumerate(zip(*plan.units, strict=True)):
            counts = [_counts(unit.examples, lengths) for unit in column]
            for rank, (queries, _) in enumerate(counts):
                if plan.losses:
                    losses[rank][at] = [_counts(plan.losses[at][i], lengths) for i in plan.owned(rank, at)]
                else:  # with negatives: global, the candidates of all ranks; else there is one rank
                    losses[rank][at] = [(queries, sum(c for _, c in counts))]
            if stage.negatives == "global":
                gathered.append((max(c for _, c in counts), max(q for q, _ in counts)))
            else:
                fillers = [sum(not micro for micro in unit.micros) for unit in column]
                gathered.append((max(q + c + f for (q, c), f in zip(counts, fillers, strict=True)), 0))
    shares = [_share(units, losses[rank], gathered, lengths) for rank, units in enumerate(plan.units)]
    idle = sum(not any(unit.examples for unit in units) for units in plan.units)
    return Work(int(lengths.lengths[chosen].sum()), shares, idle)


def _share(units: list[Unit], losses, gathered, lengths: Lengths) -> Share:
    tokens = [[int(lengths.lengths[micro].sum()) if micro else 1 for micro in unit.micros] for unit in units]
    squares = [[float(lengths.squares[micro].sum()) if micro else 1.0 for micro in unit.micros] for unit in units]
    return Share(tokens, losses, squares, gathered)


def _counts(examples: list[int], lengths: Lengths) -> tuple[int, int]:
    """Number of queries and of candidates."""
    return (len(examples), int(lengths.segments[examples].sum()) - len(examples)) if examples else (0, 0)
