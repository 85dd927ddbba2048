from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l2v.data.balance import even_out
from l2v.data.sampler import Sampler, StepPlan
from l2v.errors import UserError


@dataclass
class Lengths:
    """All that a sampler asks of examples."""

    lengths: np.ndarray


def examples(count: int, low: int = 2, high: int = 60, seed: int = 0) -> Lengths:
    return Lengths(np.random.default_rng(seed).integers(low, high, count))


def sampler(of: Lengths, world: int = 1, **options) -> Sampler:
    return Sampler(of, **{"batch": 8, "micro_tokens": 128, "seed": 42, "world": world} | options)


def by_rank(plan: StepPlan) -> list[list[int]]:
    return [[i for unit in units for i in unit.examples] for units in plan.units]


def chosen(plan: StepPlan) -> list[int]:
    return [i for rank in by_rank(plan) for i in rank]


def assert_in_step(plan: StepPlan, world: int) -> None:
    assert len(plan.units) == world
    shapes = [[len(unit.micros) for unit in units] for units in plan.units]
    assert all(shape == shapes[0] for shape in shapes) and len(shapes[0]) >= 1
    assert min(shapes[0]) >= 1


@pytest.mark.parametrize("group", [None, 2, 4])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [64, 61, 3])
def test_an_epoch_sees_every_example_once(world, group, count):
    made = sampler(examples(count), world, group=group)
    assert made.steps_per_epoch == -(-count // 8)
    for epoch in (0, 1):
        plans = [made.plan(epoch * made.steps_per_epoch + at) for at in range(made.steps_per_epoch)]
        seen = [i for plan in plans for i in chosen(plan)]
        assert sorted(seen) == list(range(count))
        sizes = [len(chosen(plan)) for plan in plans]
        assert sizes == [8] * (count // 8) + [count % 8] * (count % 8 > 0)


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_have_equal_numbers_of_everything(world, group):
    made = sampler(examples(61), world, group=group)
    for step in range(2 * made.steps_per_epoch):
        assert_in_step(made.plan(step), world)


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_no_micro_batch_exceeds_the_token_budget(world, group):
    of = examples(61)
    made = sampler(of, world, group=group, micro_tokens=70)
    several = 0
    for step in range(made.steps_per_epoch):
        for units in made.plan(step).units:
            for unit in units:
                assert all(of.lengths[micro].sum() <= 70 for micro in unit.micros)
                several += len(unit.micros) > 1
    assert several


def test_micro_batches_are_no_smaller_than_need_be():
    of = Lengths(np.full(32, 16))
    plan = sampler(of, batch=32, micro_tokens=128).plan(0)
    assert [len(micro) for micro in plan.units[0][0].micros] == [8, 8, 8, 8]
    exact = sampler(of, batch=32, micro_tokens=512).plan(0)
    assert [len(micro) for micro in exact.units[0][0].micros] == [32]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_carry_nearly_equal_tokens(world):
    of = examples(256, low=2, high=200)
    made = sampler(of, world, batch=64, micro_tokens=4096)
    for step in range(made.steps_per_epoch):
        loads = [int(of.lengths[rank].sum()) for rank in by_rank(made.plan(step))]
        assert max(loads) - min(loads) <= 200
        assert max(loads) <= 1.05 * sum(loads) / world


@pytest.mark.parametrize("seed", range(5))
def test_one_long_text_is_weighed_up_by_short_ones(seed):
    of = Lengths(np.array([300] + [10] * 63))
    plan = sampler(of, 2, batch=64, micro_tokens=300, seed=seed).plan(0)
    loads = [int(of.lengths[rank].sum()) for rank in by_rank(plan)]
    assert max(loads) - min(loads) <= 10


@pytest.mark.parametrize("group", [None, 2, 4])
def test_every_world_size_trains_on_the_same_examples(group):
    of = examples(61)
    worlds = [sampler(of, world, group=group) for world in (1, 2, 3, 4)]
    for step in range(20):
        sets = [sorted(chosen(made.plan(step))) for made in worlds]
        assert all(one == sets[0] for one in sets)


@pytest.mark.parametrize("world", [2, 3, 8])
def test_every_world_size_has_the_same_groups(world):
    """One rank embeds a group at a time; several ranks embed a part of each, and its loss still has all of it."""
    of = examples(64)
    whole, split = sampler(of, group=4), sampler(of, world, group=4)
    for step in range(8):
        plan = split.plan(step)
        groups = [unit.examples for unit in whole.plan(step).units[0]]
        assert all(len(group) == 4 for group in groups) and not whole.plan(step).losses
        assert [group for unit in plan.losses for group in unit] == groups
        for at, unit in enumerate(plan.losses):  # a group's texts are all embedded in the unit of its loss
            embedded = sorted(i for units in plan.units for i in units[at].examples)
            assert embedded == sorted(i for group in unit for i in group)


def test_no_rank_is_idle_while_others_have_several_examples():
    """Four groups of eight on eight ranks."""
    of = examples(320, low=20, high=60)
    made = sampler(of, 8, batch=32, group=8, micro_tokens=4096)
    for step in range(made.steps_per_epoch):
        plan = made.plan(step)
        assert len(plan.losses) == 1 and all(len(rank) == 4 for rank in by_rank(plan))


def test_groups_that_do_not_fit_one_micro_batch_are_embedded_in_turn():
    """Two ranks, four groups of 64 tokens. A second encoding is needed only if one group on two ranks exceeds micro_tokens."""
    of = Lengths(np.full(16, 16))
    for micro_tokens, groups, micros in (
        (128, [4], 1),
        (127, [2, 2], 1),
        (64, [2, 2], 1),
        (63, [1] * 4, 1),
        (31, [1] * 4, 2),
    ):
        plan = sampler(of, 2, batch=16, group=4, micro_tokens=micro_tokens).plan(0)
        assert [len(unit) for unit in plan.losses] == groups
        assert [[len(unit.micros) for unit in units] for units in plan.units] == [[micros] * len(groups)] * 2


def test_the_last_micro_batch_is_full():
    """A gradient cache encodes all others twice."""
    of = Lengths(np.full(40, 10))
    plan = sampler(of, 2, batch=40, micro_tokens=120).plan(0)
    assert [[len(micro) for micro in unit.micros] for units in plan.units for unit in units] == [[8, 12]] * 2


def test_a_rank_with_fewer_micro_batches_divides_what_it_has():
    of = Lengths(np.array([50, 50, 20, 20, 20, 20, 20]))
    plan = sampler(of, 2, batch=7, micro_tokens=60).plan(0)
    assert_in_step(plan, 2)
    assert all(micro for units in plan.units for unit in units for micro in unit.micros)


class Waves:
    """Time rises by one with every begun 100 tokens."""

    def weights(self, tokens_N, squares_N):
        return tokens_N

    def times(self, tokens_N, squares_N):
        return np.ceil(tokens_N / 100)


def test_exchanges_avoid_a_wave_that_equal_tokens_would_begin():
    """101 and 97 tokens: the first has begun a second hundred. With 40 and 38 exchanged both have 99."""
    tokens, squares = np.array([61, 40, 59, 38]), np.zeros(4)
    owners = np.array([0, 0, 1, 1])
    assert Waves().times(np.bincount(owners, tokens), squares).max() == 2
    evened = even_out(owners, tokens, squares, 2, Waves(), 1000)
    assert np.bincount(evened, tokens).max() <= 100 and evened.sum() == 2
    assert (owners == [0, 0, 1, 1]).all()  # not changed in place
    assert (even_out(owners, tokens, squares, 2, Waves(), 100) == owners).all()  # several micro-batches each


def test_the_plan_is_a_function_of_seed_and_step():
    of = examples(61)
    first, second = sampler(of), sampler(of)
    forwards = [first.plan(step) for step in range(20)]
    assert [second.plan(step) for step in reversed(range(20))] == forwards[::-1]
    other = sampler(of, seed=43)
    assert [chosen(other.plan(step)) for step in range(8)] != [chosen(plan) for plan in forwards[:8]]


def test_epochs_differ_in_order():
    made = sampler(examples(64))
    epochs = [[i for at in range(8) for i in chosen(made.plan(epoch * 8 + at))] for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != list(range(64))


def test_the_order_is_a_contract():
    """A run that resumes must meet the data of the run that stopped, also after an upgrade: these never change."""
    made = sampler(Lengths(np.full(20, 4)))
    assert chosen(made.plan(0)) == [6, 17, 3, 15, 4, 14, 16, 13]
    assert chosen(made.plan(2)) == [19, 0, 5, 12]
    assert chosen(made.plan(3)) == [7, 1, 5, 9, 4, 17, 6, 16]


def test_the_epoch_is_told_as_a_fraction():
    made = sampler(examples(20))
    assert [round(made.plan(step).epoch, 4) for step in range(4)] == [0.3333, 0.6667, 1.0, 1.3333]


def test_a_batch_larger_than_the_data_is_one_short_step():
    made = sampler(examples(5), batch=64, micro_tokens=4096)
    assert made.steps_per_epoch == 1
    assert sorted(chosen(made.plan(3))) == [0, 1, 2, 3, 4]


def test_a_rank_without_examples_keeps_in_step():
    plan = sampler(examples(2), world=3).plan(0)
    assert sorted(map(len, by_rank(plan))) == [0, 1, 1]
    assert_in_step(plan, 3)


def test_a_too_long_example_is_named():
    of = Lengths(np.array([5, 129, 7]))
    with pytest.raises(UserError, match=r"example 1 has 129 tokens .* micro_tokens is 128; raise micro"):
        sampler(of)
    sampler(of, micro_tokens=129)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    groups=st.none() | st.integers(2, 5),
    per_batch=st.integers(1, 4),
    world=st.integers(1, 5),
    spare=st.integers(0, 100),
    seed=st.integers(0, 2**63 - 1),
)
def test_whatever_the_shape(lengths, groups, per_batch, world, spare, seed):
    of, batch = Lengths(np.array(lengths)), per_batch * (groups or 3)
    budget = max(lengths) + spare
    made = Sampler(of, batch=batch, micro_tokens=budget, seed=seed, world=world, group=groups)
    seen = []
    for step in range(made.steps_per_epoch):
        plan = made.plan(step)
        assert_in_step(plan, world)
        assert len(chosen(plan)) <= batch
        micros = [micro for units in plan.units for unit in units for micro in unit.micros]
        assert all(of.lengths[micro].sum() <= budget for micro in micros if micro)
        seen += chosen(plan)
        loads = [int(of.lengths[rank].sum()) for rank in by_rank(plan)]
        if not groups or world > 1:  # by unit
            units = len(plan.units[0])
            assert max(loads) - min(loads) <= units * max(lengths)
    assert sorted(seen) == list(range(len(lengths)))
