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
