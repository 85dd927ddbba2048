"""A source of a recipe: where rows come from, how they are read and mixed. A leaf of the import tree."""

from __future__ import annotations

import math
from dataclasses import dataclass

from l2v.errors import RecipeError
from l2v.recipe.tasks import Task, find_task

PAIR_KEYS = ("task", "query_prompt", "document_prompt", "symmetric", "score", "min_score")


@dataclass
class Source:
    """Rows to train on: a file, a folder, a glob, `hub:NAME` or `sample:da/train`; and what its columns are called.

    Files: CSV, TSV, JSON, JSONL, Parquet, Excel, text (`l2v.data.raw`), also compressed. text, query, positive, negatives:
    columns; a default that the file lacks is guessed from common names (`l2v.data.columns`). `negatives: negative_*` takes
    the columns negative_1, negative_2 and so on. A list in `positive` is several answers: a pair each.

    score: a column of numbers, guessed as well; pairs below `min_score` are skipped, by default those with 0 where the
    scores are 0 and 1. whole: a text file is one text, not a text a line. skip_empty: skip rows with an empty text;
    skip_bad: and those that cannot be read, up to half of the source; both are counted and logged.

    weight: how often a row is used in an epoch; it may be a fraction. group: a column; rows with the same value are never
    negatives of each other. query_prompt, document_prompt: instruction of every row without one in the columns
    `instruction` and `document_instruction`; task: names both (`l2v.recipe.tasks`). symmetric: the query's instruction is used on
    both sides; swap: query and positive are exchanged in half of the steps.
    """

    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    text: str = "text"
    query: str = "query"
    positive: str = "positive"
    negatives: str = "negatives"
    instruction: str | None = None
    document_instruction: str | None = None
    group: str | None = None
    score: str | None = None
    min_score: float | None = None
    weight: float = 1.0
    task: str | None = None
    query_prompt: str | None = None
    document_prompt: str | None = None
    symmetric: bool | None = None
    swap: bool = False
    skip_empty: bool = False
    skip_bad: bool = False
    whole: bool = False
    sentences: bool = False
    limit: int | None = None

    def prompts(self) -> Task:
        """The instructions of both sides: those of `task`, overridden by the source's own keys."""
        named = find_task(self.task) if self.task else Task("")
        symmetric = named.symmetric if self.symmetric is None else self.symmetric
        query = self.query_prompt or named.query
        document = query if symmetric else self.document_prompt or named.document
        return Task(query, document or None, symmetric)

    def check(self, objective: str, at: str) -> None:
        """Check the values of a source.

        Raises:
            RecipeError: if a value is not valid, or does not apply to this objective.
        """
        try:
            symmetric = self.prompts().symmetric
        except RecipeError as error:
            raise RecipeError(f"{at}: task: {error}") from None
        trouble = None
        given = [key for key in PAIR_KEYS if getattr(self, key) is not None] + ["swap"] * self.swap
        if not 0 < self.weight < math.inf:
            trouble = f"weight is {self.weight} and must be above 0; 1 uses every row once in an epoch"
        elif self.limit is not None and self.limit < 1:
            trouble = f"limit is {self.limit} and must be at least 1; null takes all rows"
        elif given and objective != "supervised":
            trouble = f"{given[0]} applies only to objective: supervised"
        elif self.group and objective == "mntp":
            trouble = "group applies only to the contrastive objectives"
        elif self.swap and not symmetric:
            trouble = "swap: true needs symmetric: true (or a symmetric task), because queries become documents"
        elif symmetric and (self.document_prompt or self.document_instruction):
            key = "document_prompt" if self.document_prompt else "document_instruction"
            trouble = f"{key} conflicts with a symmetric task, whose instruction is used on both sides; remove it"
        if trouble:
            raise RecipeError(f"{at}: {trouble}")
