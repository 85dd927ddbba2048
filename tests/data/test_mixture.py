"""Sources side by side: how often each is met, who stands with whom, instructions, groups, pairs that change places."""

import collections
import json
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l2v.data.collate import collate
from l2v.data.examples import MntpBlocks, Pairs, Views
from l2v.data.mixture import Mixture, mix_sources
from l2v.data.open import open_examples
from l2v.data.sampler import Sampler
from l2v.data.sources import open_parts, open_rows, together
from l2v.data.tokens import TextTokenizer, load_tokenizer
from l2v.errors import RecipeError, UserError
from l2v.recipe import Mntp, Simcse, Source, Supervised, Template
from l2v.recipe.tasks import TASKS

COMMON = {"batch": 8, "steps": 1, "lr": 1e-4}


@dataclass
class Mixed:
    """All that a sampler asks of examples."""

    lengths: np.ndarray
    mixture: Mixture | None


def mixed(sizes, weights=None, homogeneous=False, names=None) -> Mixed:
    weights = weights or [1.0] * len(sizes)
    sources = [Source(names[i] if names else f"{i}.jsonl", weight=w) for i, w in enumerate(weights)]
    stage = Supervised(data=sources, homogeneous=homogeneous, **COMMON)
    total = sum(sizes)
    return Mixed(np.full(total, 4), mix_sources(sources, sizes, np.arange(total), stage))


def sampler(of, world=1, **options) -> Sampler:
    return Sampler(of, **{"batch": 8, "micro_tokens": 16, "seed": 42, "world": world} | options)


def units(made: Sampler, step: int) -> list[list[int]]:
    """What meets in one loss: with `group` each unit, else the examples of all ranks."""
    plan = made.plan(step)
    if made.group is None:
        return [[i for rank in plan.units for unit in rank for i in unit.examples]]
    if plan.losses:
        return [group for unit in plan.losses for group in unit]
    return [unit.examples for rank in plan.units for unit in rank if unit.examples]


def epoch_of(made: Sampler, epoch: int) -> list[int]:
    steps = range(epoch * made.steps_per_epoch, (epoch + 1) * made.steps_per_epoch)
    return [i for step in steps for unit in units(made, step) for i in unit]


def source_of(sizes, example: int) -> int:
    return int(np.searchsorted(np.cumsum(sizes), example, side="right"))


def test_without_the_new_keys_there_is_no_mixture():
    assert mixed([20, 30]).mixture is None
    assert mixed([20, 30], [1.0, 2.0]).mixture and mixed([20, 30], homogeneous=True).mixture


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_homogeneous_batches_hold_one_source_and_lose_nothing(world, group):
    sizes = [61, 17, 30, 2]
    made = sampler(mixed(sizes, homogeneous=True), world, group=group)
    for epoch in (0, 1):
        seen = []
        for step in range(epoch * made.steps_per_epoch, (epoch + 1) * made.steps_per_epoch):
            for unit in units(made, step):
                assert len({source_of(sizes, i) for i in unit}) == 1
                assert 2 <= len(unit) <= (group or 8)
                seen += unit
        assert sorted(seen) == list(range(sum(sizes)))
    assert {source_of(sizes, unit[0]) for step in range(4) for unit in units(made, step)} > {0}, "sources take turns"


def test_the_last_batches_of_a_source_are_nearly_equal():
    """17 in batches of 8: 6, 6 and 5, not 8, 8 and one without negatives."""
    made = sampler(mixed([17, 16], homogeneous=True))
    assert sorted(len(units(made, step)[0]) for step in range(made.steps_per_epoch)) == [5, 6, 6, 8, 8]


@pytest.mark.parametrize("homogeneous", [False, True])
@pytest.mark.parametrize("group", [None, 4])
def test_the_order_is_the_same_for_every_number_of_ranks(homogeneous, group):
    of = mixed([61, 17, 30], [1, 2.5, 0.3], homogeneous)
    worlds = [sampler(of, world, group=group) for world in (1, 2, 3, 4)]
    for step in reversed(range(2 * worlds[0].steps_per_epoch)):
        met = [sorted(sorted(unit) for unit in units(made, step)) for made in worlds]
        assert all(one == met[0] for one in met)


@pytest.mark.parametrize("homogeneous", [False, True])
def test_a_source_is_met_as_often_as_its_weight(homogeneous):
    sizes, weights = [40, 20, 50], [1, 2.5, 0.3]
    made = sampler(mixed(sizes, weights, homogeneous))
    total = collections.Counter()
    for epoch in range(20):
        seen = epoch_of(made, epoch)
        counts = collections.Counter(source_of(sizes, i) for i in seen)
        assert counts == {0: 40, 1: 50, 2: 15}
        assert sorted(i for i in seen if i < 40) == list(range(40)), "weight 1: every row once"
        total.update(seen)
        for source, first in enumerate((0, 40, 60)):  # no row is met again before all others of its source were
            times = [total[i] for i in range(first, first + sizes[source])]
            assert max(times) - min(times) <= 1
    assert {total[i] for i in range(60, 110)} == {6}, "20 epochs of 0.3"


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 30), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.6, 3.0), min_size=4, max_size=4),
    group=st.none() | st.integers(2, 5),
    world=st.integers(1, 4),
    homogeneous=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
)
def test_whatever_the_mixture(sizes, weights, group, world, homogeneous, seed):
    of = mixed(sizes, [2.0, *weights[1:]][: len(sizes)], homogeneous)
    made = sampler(of, world, group=group, batch=2 * (group or 4), seed=seed)
    seen = epoch_of(made, 3)
    assert len(seen) == sum(of.mixture.counts)
    assert collections.Counter(source_of(sizes, i) for i in seen) == dict(enumerate(of.mixture.counts))
    if homogeneous:
        for step in range(made.steps_per_epoch):
            assert all(len({source_of(sizes, i) for i in unit}) == 1 for unit in units(made, step))


def test_the_order_of_a_mixture_is_a_contract():
    """A run that resumes must meet the data of the run that stopped, also after an upgrade: these never change."""
    made = sampler(mixed([12, 8], [1, 0.5]))
    assert [units(made, step)[0] for step in (0, 1, 2)] == [
        [3, 2, 18, 10, 1, 7, 0, 6],
        [9, 8, 4, 12, 14, 5, 19, 11],
        [15, 0, 17, 1, 11, 2, 16, 5],
    ]
    made = sampler(mixed([12, 8], homogeneous=True), batch=6)
    assert [units(made, step)[0] for step in (0, 1, 4)] == [[18, 14, 12, 19], [4, 5, 0, 1, 3, 10], [7, 2, 10, 1, 9, 11]]


def test_a_source_of_one_row_fills_no_batch_of_its_own():
    with pytest.raises(UserError, match=r"^b\.jsonl: homogeneous batches need at least 2 .* uses 1 of 1 \(weight 1\)"):
        mixed([4, 1], homogeneous=True, names=["a.jsonl", "b.jsonl"])
    with pytest.raises(UserError, match=r"uses 1 of 9 \(weight 0\.1\); add rows, raise the weight"):
        mixed([4, 9], [1, 0.1], homogeneous=True)


def test_what_is_told_of_a_mixture():
    assert mixed([30, 5], [1, 2]).mixture.notes == [
        "0.jsonl: 30 examples, weight 1: 30 of 40 in an epoch (75.0%)",
        "1.jsonl: 5 examples, weight 2: 10 of 40 in an epoch (25.0%)",
    ]


def test_a_block_belongs_to_the_source_that_it_begins_in(bos_tokenizer_folder, write_jsonl, tmp_path, sentences):
    texts = TextTokenizer(load_tokenizer(bos_tokenizer_folder), Template(), 16)
    sources = [
        Source(
            write_jsonl(tmp_path / f"{i}.jsonl", [{"text": t} for t in sentences[10 * i : 10 * i + 10]]), weight=i + 1
        )
        for i in range(2)
    ]
    first = MntpBlocks(open_rows(sources[:1], "documents"), texts)
    tokens = int(first.lengths.sum())
    blocks = open_examples(sources, Mntp(data=sources, **COMMON), texts)
    assert blocks.mixture.members[0].tolist() == list(range(-(-tokens // 16)))
    assert blocks.mixture.counts[1] == 2 * len(blocks.mixture.members[1]) > 0


# instructions, symmetric tasks


@pytest.fixture
def pairs_file(tmp_path, write_jsonl):
    def write(rows: list[dict], name="pairs.jsonl") -> str:
        return write_jsonl(tmp_path / name, rows)

    return write


ROW = {"query": "Hvem?", "positive": "Hunden.", "negatives": ["Katten."]}


def sides(path: str, **keys) -> tuple:
    (row,) = open_rows([Source(path, **keys)], "pairs").to_list()
    return row["instruction"], row["document_instruction"]


def test_instructions_of_a_source(pairs_file):
    path = pairs_file([ROW | {"how": "Rækkens egen:"}])
    assert sides(path) == (None, None)
    assert sides(path, query_prompt="Find:") == ("Find:", None)
    assert sides(path, query_prompt="Find:", document_prompt="Svar:") == ("Find:", "Svar:")
    assert sides(path, instruction="how", query_prompt="Find:") == ("Rækkens egen:", None)
    assert sides(path, task="question-da") == (TASKS["question-da"].query, None)
    assert sides(path, task="question-da", query_prompt="Min egen:") == ("Min egen:", None)


def test_a_symmetric_task_has_one_instruction_on_both_sides(pairs_file):
    path = pairs_file([ROW | {"how": "Rækkens egen:"}])
    meaning = TASKS["same-meaning-da"]
    assert meaning.symmetric
    assert sides(path, task="same-meaning-da") == (meaning.query, meaning.query)
    assert sides(path, task="same-meaning-da", symmetric=False) == (meaning.query, None)
    assert sides(path, query_prompt="Ens:", symmetric=True) == ("Ens:", "Ens:")
    assert sides(path, instruction="how", symmetric=True) == ("Rækkens egen:",) * 2


def test_the_sample_takes_instructions_too():
    rows = open_rows([Source("sample:da/train", task="question-da", query="anything")], "pairs")
    assert set(rows["instruction"]) == {TASKS["question-da"].query}


def test_pairs_of_a_swapped_source_change_places_in_half_of_the_steps(bos_tokenizer_folder, pairs_file):
    texts = TextTokenizer(load_tokenizer(bos_tokenizer_folder), Template(), 64)
    rows = [{"query": f"Hvem {i}?", "positive": f"Hunden {i}.", "negatives": [f"Katten {i}."]} for i in range(60)]
    symmetric = {"symmetric": True, "query_prompt": "Ens:"}
    sources = [
        Source(pairs_file(rows, "fixed.jsonl"), **symmetric),
        Source(pairs_file(rows, "swap.jsonl"), swap=True, **symmetric),
    ]
    pairs = open_examples(sources, Supervised(data=sources, **COMMON), texts)

    def turned(step: int) -> list[bool]:
        out = []
        for i in range(120):
            batch = collate(pairs, [i], seed=1, step=step)
            assert batch.columns_S.tolist() == [0, 1, 2]
            keys, own = batch.text_keys_S.tolist(), [s.text_key for s in pairs[i]]
            assert keys in (own, [own[1], own[0], own[2]])
            out.append(keys != own)
        return out

    first, second = turned(0), turned(1)
    assert not any(first[:60] + second[:60])
    assert 18 <= sum(first[60:]) <= 42 and 18 <= sum(second[60:]) <= 42 and first != second
    together = collate(pairs, list(range(120)), seed=1, step=0)
    queries = together.text_keys_S[together.columns_S == 0].tolist()
    assert queries == [pairs[i][int(first[i])].text_key for i in range(120)], "the pack plays no part"


@pytest.mark.parametrize(
    ("keys", "objective", "part"),
    [
        ({"weight": 0}, "mntp", "weight is 0 and must be above 0"),
        ({"weight": float("inf")}, "supervised", "weight is inf and must be above 0"),
        ({"task": "question-dk"}, "supervised", "no task 'question-dk'; did you mean 'question-da'?"),
        ({"task": "?"}, "supervised", "no task '?'; known: search-da, "),
        ({"query_prompt": "Find:"}, "mntp", "query_prompt applies only to objective: supervised"),
        ({"task": "question-da"}, "simcse", "task applies only to objective: supervised"),
        ({"swap": True}, "simcse", "swap applies only to objective: supervised"),
        ({"group": "id"}, "mntp", "group applies only to the contrastive objectives"),
        ({"swap": True}, "supervised", "swap: true needs symmetric: true"),
        ({"symmetric": True, "document_prompt": "Svar:"}, "supervised", "document_prompt conflicts with a symmetric"),
        (
            {"task": "same-meaning-da", "document_instruction": "how"},
            "supervised",
            "document_instruction conflicts with a symmetric",
        ),
    ],
)
def test_impossible_sources_are_refused(keys, objective, part):
    with pytest.raises(RecipeError) as caught:
        Source("a.jsonl", **keys).check(objective, "x.yaml: stage 'one': data[0]")
    assert str(caught.value).startswith("x.yaml: stage 'one': data[0]: ") and part in str(caught.value)


# groups


def test_groups_reach_the_segments(bos_tokenizer_folder, pairs_file):
    texts = TextTokenizer(load_tokenizer(bos_tokenizer_folder), Template(), 64)
    rows = [ROW | {"doc": doc} for doc in (7, "7", "a", None, "")]
    sources = [
        Source(pairs_file(rows, "a.jsonl"), group="doc"),
        Source(pairs_file(rows, "b.jsonl"), group="doc"),
        Source(pairs_file(rows[:1], "c.jsonl")),
    ]
    pairs = Pairs(together(open_parts(sources, "pairs"), sources), texts)
    groups = [pairs[i][0].group for i in range(11)]
    assert groups[0] == groups[1] != groups[2] and groups[3] == groups[4] == groups[10] == -1
    assert not set(groups[:3]) & set(groups[5:8]), "the same number in another source is another group"
    assert min(groups[:3]) >= 0
    assert collate(pairs, [0, 3], seed=0, step=0).groups_S.tolist() == [groups[0]] * 3 + [-1] * 3


def test_sentences_of_a_document_are_a_group(bos_tokenizer_folder, pairs_file):
    texts = TextTokenizer(load_tokenizer(bos_tokenizer_folder), Template(), 64)
    document = "Hunden løber hurtigt gennem skoven. Katten bor i den lille by."
    path = pairs_file([{"text": document, "id": 1}, {"text": document, "id": 2}])
    source = Source(path, group="id", sentences=True)
    views = Views(open_rows([source], "sentences"), texts)
    groups = [view.group for i in range(4) for view in views[i]]
    assert len(set(groups)) == 2 and groups == sorted(groups, key=groups.index) and groups.count(groups[0]) == 4
    assert Simcse(data=[source], **COMMON).grouped


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ({"doc": 1.5}, "line 1: the field 'doc' is text or a whole number; found float"),
        ({"doc": [1]}, "line 1: the field 'doc' is text or a whole number; found list"),
        ({"doc": True}, "line 1: the field 'doc' is text or a whole number; found bool"),
        ({}, "line 1: the field 'doc' is absent; found query, positive, negatives"),
    ],
)
def test_a_bad_group_is_named(pairs_file, value, part):
    path = pairs_file([ROW | value])
    with pytest.raises(UserError) as caught:
        open_rows([Source(path, group="doc")], "pairs")
    assert part in str(caught.value) and path in str(caught.value)


# the whole way


def test_a_stage_trains_on_a_mixture(run_here, monkeypatch, tiny_recipe, tmp_path, pairs_file, sentences):
    questions = [
        {"query": f"Hvem {text.split(' ', 1)[1]}", "positive": text, "doc": i // 2}
        for i, text in enumerate(sentences[:12])
    ]
    same = [{"query": a, "positive": b} for a, b in zip(sentences[30:40], sentences[40:50], strict=True)]
    data = [
        {"path": pairs_file(questions, "q.jsonl"), "task": "question-da", "group": "doc", "weight": 2},
        {"path": pairs_file(same, "s.jsonl"), "task": "same-meaning-da", "swap": True},
    ]
    recipe = tiny_recipe(tmp_path, **{"stages.supervised.from": "base", "stages.supervised.data": data})
    monkeypatch.setenv("L2V_CHECK", "1")  # every rank writes down what it trained on
    options = ("--stage", "supervised", "--fresh", "length=120", "micro_tokens=1024", "scale=5", "homogeneous=true")

    def train(*more: str) -> tuple[str, list[dict]]:
        told = run_here(recipe, *options, *more)
        lines = (tmp_path / "run" / "supervised" / "metrics.jsonl").read_text().splitlines()
        return told, [json.loads(line) for line in lines]

    told, rows = train("steps=9", "eval_data={path: q.jsonl, group: doc}")
    assert f"{data[0]['path']}: 12 examples, weight 2: 24 of 34 in an epoch (70.6%)" in told
    audit = (tmp_path / "run" / "supervised" / "audit" / "rank-0.jsonl").read_text().splitlines()
    steps = [json.loads(line)["examples"] for line in audit]
    assert len(steps) == 9 and all(len({i < 12 for i in chosen}) == 1 for chosen in steps)
    assert collections.Counter(i for chosen in steps for i in chosen) == {i: 2 if i < 12 else 1 for i in range(22)}
    assert all(row["loss"] >= 0 for row in rows if "loss" in row) and sum("loss" in row for row in rows) == 9

    grouped, alone = rows[0]["eval_loss"], train("steps=1", "eval_data=q.jsonl")[1][0]["eval_loss"]
    assert 0 < grouped < alone, "an answer of the query's own document is no negative"
