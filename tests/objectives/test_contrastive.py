import math

import pytest
import torch

from l2v.objectives.contrastive import Groups, contrastive_loss
from l2v.objectives.mntp import mntp_loss

COLUMNS = torch.tensor([0, 1, 2, 0, 1, 0, 1, 2, 3])  # one negative, none, two


def naive(vectors: torch.Tensor, scale: float, banned: set[tuple[int, int]] = frozenset()) -> torch.Tensor:
    """Row by row in float64: queries at 0, 3, 5; candidates all the others."""
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    queries, candidates, targets = [0, 3, 5], [1, 2, 4, 6, 7, 8], [1, 4, 6]
    total = 0.0
    for q, t in zip(queries, targets, strict=True):
        logits = {c: scale * (unit[q] * unit[c]).sum() for c in candidates if (q, c) not in banned}
        total = total - logits[t] + torch.logsumexp(torch.stack(list(logits.values())), 0)
    return total / 3


@pytest.mark.parametrize("scale", [1.0, 20.0, 50.0])
def test_loss_and_gradient_equal_a_row_by_row_float64(scale):
    torch.manual_seed(0)
    vectors = torch.randn(9, 12)
    exact = vectors.double().requires_grad_()
    naive(exact, scale).backward()
    ours = vectors.clone().requires_grad_()
    loss = contrastive_loss(ours, Groups.from_columns(COLUMNS, torch.arange(9)), scale=scale)
    loss.backward()
    torch.testing.assert_close(loss.double(), naive(exact, scale), rtol=1e-5, atol=1e-6)
    assert (ours.grad - exact.grad).abs().max() <= 1e-5 * exact.grad.abs().max()


def test_a_candidate_with_the_positives_text_is_no_negative():
    torch.manual_seed(1)
    vectors, keys = torch.randn(9, 12), torch.arange(9)
    keys[4] = keys[1]  # the second query's positive is the first one's text
    groups = Groups.from_columns(COLUMNS, keys)
    masked = contrastive_loss(vectors, groups, scale=10)
    torch.testing.assert_close(masked, naive(vectors.double(), 10, {(0, 4), (3, 1)}).float())
    torch.testing.assert_close(
        contrastive_loss(vectors, groups, scale=10, mask_duplicates=False), naive(vectors.double(), 10).float()
    )


def test_a_candidate_with_the_querys_own_text_is_no_negative():
    torch.manual_seed(1)
    vectors, keys = torch.randn(9, 12), torch.arange(9)
    keys[7] = keys[3]  # a negative of the third example repeats the second query
    groups = Groups.from_columns(COLUMNS, keys)
    masked = contrastive_loss(vectors, groups, scale=10)
    torch.testing.assert_close(masked, naive(vectors.double(), 10, {(3, 7)}).float())


def test_rows_of_one_group_are_no_negatives_of_each_other():
    """The first and the third example are of one group; their hard negatives are as wrong as ever."""
    torch.manual_seed(4)
    vectors, keys = torch.randn(9, 12), torch.arange(9)
    of_group = torch.tensor([5, 5, 5, -1, -1, 5, 5, 5, 5])
    groups = Groups.from_columns(COLUMNS, keys, of_group)
    expected = naive(vectors.double(), 10, {(0, 6), (5, 1)}).float()
    torch.testing.assert_close(contrastive_loss(vectors, groups, scale=10, mask_groups=True), expected)
    alone = contrastive_loss(vectors, groups, scale=10, mask_groups=True, mask_duplicates=False)
    torch.testing.assert_close(alone, expected)
    plain = contrastive_loss(vectors, Groups.from_columns(COLUMNS, keys), scale=10)
    assert torch.equal(contrastive_loss(vectors, groups, scale=10), plain)
    assert torch.equal(contrastive_loss(vectors, Groups.from_columns(COLUMNS, keys), scale=10, mask_groups=True), plain)
    keys[4] = keys[1]  # a text that stands twice is hidden beside
    both = contrastive_loss(vectors, Groups.from_columns(COLUMNS, keys, of_group), scale=10, mask_groups=True)
    torch.testing.assert_close(both, naive(vectors.double(), 10, {(0, 6), (5, 1), (0, 4), (3, 1)}).float())


def test_own_negatives_meet_their_query_alone():
    torch.manual_seed(2)
    vectors, groups = torch.randn(9, 12), Groups.from_columns(COLUMNS, torch.arange(9))
    others = {(0, 7), (0, 8), (3, 2), (3, 7), (3, 8), (5, 2)}
    own = contrastive_loss(vectors, groups, scale=10, own_negatives=True)
    torch.testing.assert_close(own, naive(vectors.double(), 10, others).float())


def test_all_directions_in_one_softmax():
    """GTE, row by row: queries among themselves, documents among themselves, but for those of the same example."""
    torch.manual_seed(3)
    vectors = torch.randn(9, 12, dtype=torch.float64)
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    scores = 10 * unit @ unit.T
    examples = [[0, 1, 2], [3, 4], [5, 6, 7, 8]]
    expected = 0.0
    for query, positive, *own in examples:
        other_queries = [e[0] for e in examples if e[0] != query]
        other_documents = [d for e in examples if e[0] != query for d in e[1:]]
        met = [scores[query, d] for d in (positive, *own, *other_documents)] + [scores[query, q] for q in other_queries]
        met += [scores[positive, q] for q in (query, *other_queries)] + [scores[positive, d] for d in other_documents]
        expected = expected + torch.logsumexp(torch.stack(met), 0) - scores[query, positive]
    groups = Groups.from_columns(COLUMNS, torch.arange(9))
    directions = ["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
    torch.testing.assert_close(contrastive_loss(vectors, groups, scale=10, directions=directions), expected / 3)


def test_a_share_is_numbered_among_all_ranks():
    groups = Groups.from_columns(COLUMNS, torch.arange(9), query_counts=[2, 3, 1], counts=[5, 6, 1], rank=1, total=12)
    assert groups.targets_N.tolist() == [5, 7, 8]
    assert groups.owners_M.tolist() == [2, 2, 3, 4, 4, 4]
    assert groups.hard_M.tolist() == [False, True, False, False, True, True]
    assert groups.query_keys_N2.tolist() == [[1, 0], [4, 3], [6, 5]]
    assert groups.total == 12
    with pytest.raises(ValueError, match="rank 0 holds 3 queries and 6 candidates; announced were the queries"):
        Groups.from_columns(COLUMNS, torch.arange(9), query_counts=[2, 3, 1], counts=[5, 6, 1])
    with pytest.raises(ValueError, match="rank 1 holds 3 queries"):
        Groups.from_columns(COLUMNS, torch.arange(9), query_counts=[6], counts=[5, 6, 1], rank=1)


def test_no_negatives_is_no_loss_and_no_rows_is_zero():
    vectors = torch.randn(2, 4, requires_grad=True)
    assert contrastive_loss(vectors, Groups.from_columns(torch.tensor([0, 1]), torch.arange(2)), scale=20).item() == 0
    empty = contrastive_loss(vectors, Groups.from_columns(torch.tensor([-1, -1]), torch.arange(2)), scale=20)
    empty.backward()
    assert empty.item() == 0 and vectors.grad.abs().max() == 0


def test_a_query_without_its_positive_is_an_error():
    with pytest.raises(ValueError, match="2 queries and 1 positives"):
        Groups.from_columns(torch.tensor([0, 1, 0]), torch.arange(3))


def test_mntp_loss_is_the_sum_over_the_global_count():
    logits = torch.zeros(3, 8, requires_grad=True)
    loss = mntp_loss(logits, torch.tensor([1, 2, 3]), 6)
    assert loss.item() == pytest.approx(3 * math.log(8) / 6)
    none = mntp_loss(logits[:0], torch.tensor([], dtype=torch.long), 6)
    none.backward()
    assert none.item() == 0 and logits.grad.abs().max() == 0
