"""Groups of `negatives: micro` divided among ranks: the loss and its gradient are those of one process with whole groups."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.processes import finish, start_ranks

from l2v.batch import Segment
from l2v.data.collate import collate
from l2v.data.sampler import Sampler
from l2v.training.spread import spread_groups

STEPS = 4
# Four groups of three, some with hard negatives; 24 pairs, so that the third step begins a new epoch.
STAGE = {
    "negatives": "micro", "group": 3, "batch": 12, "steps": STEPS, "save_every": 1, "keep": STEPS, "from": "base", "scale": 3,
    "clip": 0.5, "lr": 1e-3, "directions": ["query_to_doc", "doc_to_query", "doc_to_doc"], "hard_negatives": "own",
    "max_negatives": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_recipe, write_jsonl, sentences):
    """The folders of the same stage on one rank and on two, there with a gradient cache."""
    folder = tmp_path_factory.mktemp("spread")
    pairs = [
        {"query": f"Hvem {text.split(' ', 1)[1]}", "positive": text, "negatives": sentences[100 + i : 100 + i + i % 3]}
        for i, text in enumerate(sentences[:24])
    ]
    changes = STAGE | {"data": write_jsonl(folder / "uneven.jsonl", pairs)}
    recipe = tiny_recipe(folder, **{f"stages.supervised.{k}": v for k, v in changes.items()}, **{"lora.dropout": 0.1})
    found = {}
    for name, world, micro in (("one", 1, 512), ("two", 2, 104)):
        out = folder / name
        arguments = [recipe, "--stage", "supervised", f"out={out}", f"micro_tokens={micro}", "base.layers=fused"]
        finish(start_ranks([arguments] * world))
        found[name] = out / "supervised"
    return found


def losses(run) -> torch.Tensor:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([row["loss"] for row in rows if "loss" in row], dtype=torch.float64)


def first_moments(run) -> torch.Tensor:
    """A tenth of the first step's clipped gradient."""
    state = load_file(run / "checkpoints" / "step-000001" / "state.safetensors")
    return torch.cat([state[key].double().flatten() for key in sorted(state) if key.startswith("exp_avg.")])


def test_two_ranks_equal_one(runs):
    one, two = first_moments(runs["one"]), first_moments(runs["two"])
    assert one.abs().max() > 0
    assert (one - two).abs().max() <= 1e-5 * one.abs().max()
    assert len(losses(runs["one"])) == STEPS and losses(runs["one"]).min() > 0.1
    torch.testing.assert_close(losses(runs["one"]), losses(runs["two"]), rtol=1e-5, atol=0)


class Texts:
    """Examples of 2 or 3 texts; the first occurs twice in the data."""

    mixture = None
    rows = (7, 7, 2, 3, 4, 5, 6, 8, 9)

    def __init__(self):
        self.segments = np.array([2 + (i % 3 == 0) for i in range(len(self.rows))])
        self.lengths = 4 * self.segments

    def __getitem__(self, index):
        return [
            Segment(np.full(4, self.rows[index]), 0, index, column, 10 * self.rows[index] + column)
            for column in range(self.segments[index])
        ]


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("micro_tokens", [12, 40])
def test_every_group_finds_its_own_rows(world, micro_tokens):
    """Embeddings that are a function of (example, column): each group has those of its examples, in its own order."""
    examples = Texts()
    sampler = Sampler(examples, batch=9, micro_tokens=micro_tokens, seed=3, world=world, group=3)
    plan = sampler.plan(0)
    each = [spread_groups(plan, rank, examples, seed=1) for rank in range(world)]
    total = 0
    for at, pools in enumerate(plan.losses):
        embedded = []
        for units in plan.units:
            micros = [collate(examples, micro, seed=1, step=0) for micro in units[at].micros]
            embedded.append(torch.cat([torch.stack([m.example_ids_S, m.columns_S], 1) for m in micros]))
        assert each[0][at].counts == list(map(len, embedded))
        rows = torch.cat(embedded)
        seen = [rows[index].tolist() for rank in each for index in rank[at].rows]
        expected = [[[i, column] for i in pool for column in range(examples.segments[i])] for pool in pools]
        assert sorted(seen) == sorted(expected)
        total += sum(len(groups.targets_N) for rank in each for groups in rank[at].groups)
        assert {groups.total for rank in each for groups in rank[at].groups} == {9}
    assert total == 9


def test_an_example_that_occurs_twice_in_a_group_has_two_rows():
    """A source of weight 2 may bring the same example twice."""

    class Twice(Texts):
        class mixture:
            @staticmethod
            def count_pools(size):
                return 1

            @staticmethod
            def pools(seed, epoch, size):
                return [np.array([2, 5, 2, 5])]

            @staticmethod
            def swapped(*_):
                return False

    examples = Twice()
    plan = Sampler(examples, batch=4, micro_tokens=40, seed=3, world=2, group=4).plan(0)
    (unit,) = spread_groups(plan, 0, examples, seed=1)
    (rows,) = unit.rows
    assert sorted(rows.tolist()) == list(range(8)) and unit.groups[0].total == 4
