"""Which queries have no negative left, against the definition of the loss; and answers of one question, which are none."""

import itertools
import warnings

import pytest
import torch

from l2v.objectives import contrastive
from l2v.objectives.contrastive import Groups, contrastive_loss
from l2v.objectives.negatives import without_negatives

GTE = ["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]


def batch(*examples):
    """(columns, keys, groups) of examples (query, positive, negatives, group), texts as numbers."""
    columns, keys, groups = [], [], []
    for query, positive, negatives, group in examples:
        columns += range(2 + len(negatives))
        keys += [query, positive, *negatives]
        groups += [group] * (2 + len(negatives))
    return torch.tensor(columns), torch.tensor(keys), torch.tensor(groups)


def compared(examples, row, *, mask_duplicates=True, mask_groups=False, own=False):
    """The (kind, example, place) of the negatives of a query, by the words of the documentation."""
    query, positive, _, group = examples[row]
    for at, (other, answer, negatives, its) in enumerate(examples):
        for place, text in enumerate([answer, *negatives]):
            same_text = mask_duplicates and text in (query, positive)
            answers_it = mask_duplicates and place == 0 and other == query
            same_group = mask_groups and place == 0 and group >= 0 and its == group
            foreign = own and place > 0 and at != row
            if (at, place) != (row, 0) and not (same_text or answers_it or same_group or foreign):
                yield "document", at, place
        shares = (mask_duplicates and {query, positive} & {other}) or (mask_duplicates and positive == answer)
        if at != row and not shares and not (mask_groups and group >= 0 and its == group):
            yield "query", at, 0


def random_examples(generator, count):
    def draw(high):
        return int(torch.randint(high, (), generator=generator))

    return [(draw(3), 3 + draw(3), [6 + draw(2) for _ in range(draw(3))], draw(3) - 1) for _ in range(count)]


OPTIONS = [{"mask_duplicates": a, "mask_groups": b, "own": c} for a, b, c in itertools.product((True, False), repeat=3)]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(k for k, v in o.items() if v) or "none")
def test_the_count_and_the_loss_follow_the_definition(options):
    """The loss in float64 over exactly the documents that the words name; a query without any has a gradient of 0."""
    generator = torch.Generator().manual_seed(7)
    seen = set()
    for trial in range(40):
        examples = random_examples(generator, 1 + trial % 4)
        columns, keys, own_groups = batch(*examples)
        groups = Groups.from_columns(columns, keys, own_groups)
        vectors = torch.randn(len(columns), 6, generator=generator, dtype=torch.float64)
        unit = vectors / vectors.norm(dim=1, keepdim=True)
        starts = [0, *itertools.accumulate(2 + len(e[2]) for e in examples)]
        losses, alone, alone_with_queries = [], [], []
        for row in range(len(examples)):
            met = list(compared(examples, row, **options))
            documents = [starts[at] + 1 + place for kind, at, place in met if kind == "document"]
            scores = 5 * unit[[starts[row] + 1, *documents]] @ unit[starts[row]]
            losses.append(torch.logsumexp(scores, 0) - scores[0])
            alone.append(not documents)
            alone_with_queries.append(not met)
        names = {"mask_duplicates": options["mask_duplicates"], "mask_groups": options["mask_groups"]}
        found = contrastive_loss(vectors, groups, scale=5, own_negatives=options["own"], warn=False, **names)
        torch.testing.assert_close(found, torch.stack(losses).mean())
        for with_queries, expected in ((False, alone), (True, alone_with_queries)):
            count = without_negatives(groups, own_negatives=options["own"], with_queries=with_queries, **names)
            assert count.tolist() == expected
        seen |= set(alone)
    assert seen == {True, False}


@pytest.mark.parametrize("directions", [["query_to_doc"], ["query_to_doc", "doc_to_query"], GTE], ids=len)
def test_a_second_answer_is_no_negative_in_any_direction(directions):
    """Moving the vector of a second answer to the same question changes the loss of that question not at all."""
    columns, keys, _ = batch((1, 10, [], -1), (1, 11, [], -1), (2, 12, [13], -1))
    torch.manual_seed(3)
    vectors = torch.randn(7, 8)

    def first_gradient(keys):
        leaf = vectors.clone().requires_grad_()
        groups = Groups.from_columns(columns, keys, query_counts=None)
        groups.queries_N, groups.targets_N = groups.queries_N[:1], groups.targets_N[:1]
        groups.query_keys_N2, groups.query_groups_N = groups.query_keys_N2[:1], groups.query_groups_N[:1]
        loss = contrastive_loss(leaf, groups, scale=3, directions=directions, warn=False)
        return torch.autograd.grad(loss, leaf)[0]

    gradient = first_gradient(keys)
    assert gradient[3].abs().max() == 0 and gradient[5].abs().max() > 0 and gradient[6].abs().max() > 0
    assert first_gradient(torch.arange(7))[3].abs().max() > 0  # another question's answer


def test_a_hard_negative_of_the_same_question_stays_a_negative():
    columns, keys, _ = batch((1, 10, [11], -1), (1, 12, [], -1))
    groups = Groups.from_columns(columns, keys)
    assert groups.questions_M.tolist() == [1, -1, 1]
    options = {"mask_duplicates": True, "mask_groups": False, "own_negatives": False, "with_queries": False}
    assert without_negatives(groups, **options).tolist() == [False, False]
    assert without_negatives(groups, **options | {"own_negatives": True}).tolist() == [False, True]


def test_equal_ids_do_not_change_a_bit_of_other_losses():
    """Where no question occurs twice, the ids of questions hide nothing: the bits are those without them."""
    torch.manual_seed(5)
    columns, keys, _ = batch(*((n, 100 + n % 5, [200 + n], -1) for n in range(8)))
    vectors, groups = torch.randn(len(columns), 16), Groups.from_columns(columns, keys)
    with_ids = contrastive_loss(vectors, groups, scale=20, directions=GTE)
    groups.questions_M = torch.full_like(groups.questions_M, -1)
    assert torch.equal(contrastive_loss(vectors, groups, scale=20, directions=GTE), with_ids)


def test_a_loss_without_negatives_warns_once_with_a_count(monkeypatch):
    monkeypatch.setattr(contrastive, "_warned", [])
    columns, keys, _ = batch((1, 10, [], -1), (2, 10, [], -1), (3, 10, [12], -1))
    groups = Groups.from_columns(columns, keys)
    with pytest.warns(UserWarning, match=r"^2 of 3 queries have no negative left, so they teach nothing: ") as told:
        contrastive_loss(torch.randn(7, 4), groups, scale=20, own_negatives=True)
        contrastive_loss(torch.randn(7, 4), groups.to("cpu"), scale=20, own_negatives=True)
    assert len(told) == 1 and told[0].filename == __file__
    monkeypatch.setattr(contrastive, "_warned", [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        contrastive_loss(torch.randn(7, 4), groups, scale=20)  # the hard negative of the third serves the first two


def test_labels_on_a_device_are_read_where_they_came_from(monkeypatch):
    monkeypatch.setattr(contrastive, "_warned", [])
    groups = Groups.from_columns(*batch((1, 10, [], -1), (1, 11, [], -1))[:2])
    moved = groups.to("meta")
    assert moved.keys_M.device.type == "meta" and moved.on_host is groups
    options = {"mask_duplicates": True, "mask_groups": False, "own_negatives": False, "with_queries": False}
    with pytest.warns(UserWarning, match="2 of 2 queries"):
        contrastive._warn_of_lonely(moved, **options)
