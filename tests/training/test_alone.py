"""Queries without a negative are counted on each rank, without communication, as one process with everything counts them."""

import json

import numpy as np
import pytest

from l2v.batch import Segment
from l2v.data.collate import collate
from l2v.data.sampler import Sampler
from l2v.recipe import Supervised
from l2v.training.alone import queries_alone
from l2v.training.spread import spread_groups


class Examples:
    """Pairs of texts, given as numbers: (query, positive, negatives)."""

    mixture = None

    def __init__(self, rows):
        self.rows = rows
        self.segments = np.array([2 + len(negatives) for *_, negatives in rows])
        self.lengths = 3 * self.segments

    def __getitem__(self, index):
        query, positive, negatives = self.rows[index]
        texts = enumerate((query, positive, *negatives))
        return [Segment(np.full(3, key), 0, index, column, key) for column, key in texts]


def counts(rows, world, **options):
    """Queries without a negative of each rank in the first step, which has all rows."""
    stage = Supervised(data=[], batch=len(rows), steps=1, lr=1.0, micro_tokens=24, **options)
    examples = Examples(rows)
    sampler = Sampler(examples, batch=stage.batch, micro_tokens=24, seed=1, world=world, group=stage.group)
    plan = sampler.plan(0)
    found = []
    for rank, units in enumerate(plan.units):
        batches = [[collate(examples, micro, seed=1, step=0) for micro in unit.micros] for unit in units]
        spread = spread_groups(plan, rank, examples, seed=1)
        found.append(queries_alone(plan, batches, rank, examples, stage, 1, spread))
    return found


@pytest.mark.parametrize("hard_negatives", ["all", "own"])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_count_what_one_process_counts(world, hard_negatives):
    generator = np.random.default_rng(3)
    totals = set()
    for _ in range(30):
        count = int(generator.integers(1, 6))
        rows = [
            (int(generator.integers(2)), 10 + int(generator.integers(2)), [20] * int(generator.integers(0, 8) == 0))
            for _ in range(count)
        ]
        ranks = counts(rows, world, hard_negatives=hard_negatives)
        assert sum(ranks) == counts(rows, 1, hard_negatives=hard_negatives)[0]
        totals.add(sum(ranks) / count)
    assert 0 in totals and len(totals) > 2


def test_within_groups_other_ranks_do_not_help():
    rows = [(1, 10 + n, []) for n in range(5)] + [(2, 16, [])]
    assert sum(counts(rows, 2)) == 0  # the other question is a negative of all, and they are of it
    assert [sum(counts(rows, world, negatives="micro", group=2)) for world in (1, 2)] == [4, 4]


def test_training_says_so_once_and_counts_every_row(run_here, tiny_recipe, tmp_path, sentences, write_jsonl):
    rows = [{"query": "Hvem er det?", "positive": text} for text in sentences[:9]]
    data = write_jsonl(tmp_path / "same.jsonl", [*rows[:8], {"query": "Hvad er det?", "positive": sentences[0]}])
    recipe = tiny_recipe(tmp_path, **{"stages.supervised.from": "base", "stages.supervised.data": data})
    output = run_here(recipe, "--stage", "supervised", "batch=3", "steps=3")
    assert "supervised: 8 of 9 queries occur more than once; their answers are not negatives of each other" in output
    (line,) = [line for line in output.splitlines() if "have no negative left" in line]
    # The other question gives the two of its batch of three a negative, unless they share its answer.
    assert "supervised: WARNING: " in line and line.count(" queries of steps 1 to ") == 1
    found = [json.loads(text) for text in (tmp_path / "run/supervised/metrics.jsonl").read_text().splitlines()]
    alone = [row.get("queries_without_negatives", 0) for row in found if "loss" in row]
    assert len(alone) == 3 and alone == sorted(alone) and alone[-1] in (6, 7)
    gained = [b - a for a, b in zip([0, *alone], alone, strict=False)]
    assert [row["loss"] == 0 for row in found if "loss" in row] == [gain == 3 for gain in gained]
