"""The MNTP loss of hidden states: the fused way and the head as it is give one loss, one accuracy and one gradient."""

import functools

import pytest
import torch
from torch import nn

from l2v.model.head import WithHead
from l2v.objectives import mntp
from l2v.objectives.mntp import mntp_loss, mntp_loss_of_hidden


class Scaled(nn.Linear):
    """A head that does more than multiply: it has to be called."""

    def forward(self, hidden_LE):
        return 0.5 * super().forward(hidden_LE)


def heads():
    frozen, biased, scaled = nn.Linear(16, 50, bias=False), nn.Linear(16, 50), Scaled(16, 50)
    for head in (frozen, biased, scaled):
        head.requires_grad_(False)
    return {"frozen": frozen, "biased": biased, "scaled": scaled, "learning": nn.Linear(16, 50)}


@pytest.mark.parametrize("count", [7.0, torch.tensor(7.0)])
@pytest.mark.parametrize("name", list(heads()))
def test_is_the_loss_of_the_heads_logits(name, count, monkeypatch):
    head, fused = heads()[name], []
    op = mntp.linear_cross_entropy
    monkeypatch.setattr(mntp, "linear_cross_entropy", lambda *a, **k: (fused.append(1), op(*a, **k))[1])
    hidden_LE, labels_L = torch.randn(9, 16, requires_grad=True), torch.randint(50, (9,))
    labels_L[:3] = head(hidden_LE).argmax(-1)[:3]
    loss, hits = WithHead(head)(functools.partial(mntp_loss_of_hidden, count=count), hidden_LE, labels_L)
    want = mntp_loss(head(hidden_LE), labels_L, 7.0)
    torch.testing.assert_close(loss, want)
    assert hits == (head(hidden_LE).argmax(-1) == labels_L).sum() >= 3 and not hits.requires_grad
    learning = [hidden_LE, *(p for p in head.parameters() if p.requires_grad)]
    for x, y in zip(torch.autograd.grad(loss, learning), torch.autograd.grad(want, learning), strict=True):
        torch.testing.assert_close(x, y)
    assert len(learning) == (3 if name == "learning" else 1)
    assert bool(fused) == (name in ("frozen", "biased"))


@pytest.mark.parametrize("name", list(heads()))
def test_no_labels_are_a_zero_that_is_part_of_the_graph(name):
    hidden_LE = torch.randn(3, 16, requires_grad=True)
    loss, hits = mntp_loss_of_hidden(heads()[name], hidden_LE[:0], torch.zeros(0, dtype=torch.long), 5.0)
    loss.backward()
    assert loss == 0 and hits == 0 and torch.equal(hidden_LE.grad, torch.zeros(3, 16))


def test_the_heads_parameters_are_the_wrappers_own():
    head = heads()["biased"]
    wrapper = WithHead(head)
    assert dict(wrapper.named_parameters(recurse=False)) == {"weight": head.weight, "bias": head.bias}
    assert len(list(wrapper.parameters())) == 2
