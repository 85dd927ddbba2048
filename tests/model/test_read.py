"""The last layer computes only what is read: the same vectors, losses and gradients, for fewer tokens."""

from unittest import mock

import pytest
import torch
from support.fused_cases import FAMILIES, build, distance

from l2v.batch import Segment, pack
from l2v.model.lora import trainable
from l2v.model.pooling import pool, pool_weights
from l2v.model.read import PickRows, Read
from l2v.recipe import Lora
from l2v_kernels.swiglu import op as swiglu

NOISY = {"lora": Lora(r=5, alpha=10, dropout=0.1), "attention_dropout": 0.2}
LENGTHS = (9, 2, 21, 6, 9)
LABELS = [0, 3, 9, 11, 12, 30, 46]


def half(empty: bool = False):
    """Half of each text is a header that is not pooled; with `empty` the last text is nothing else."""
    generator = torch.Generator().manual_seed(4)
    parts = [
        Segment(torch.randint(3, 96, (n,), generator=generator).numpy(), n // 2, example=i)
        for i, n in enumerate(LENGTHS)
    ]
    if empty:
        parts[-1].pool_start = LENGTHS[-1]
    return pack(parts, seed=7, step=2, label_index=LABELS, labels=[5] * len(LABELS))


def seen(model, batch, want, how="mean"):
    """What is asked for, and the gradients of a fixed random projection of it; `all`: read from the states of all tokens."""
    model.train()
    model.pooling = how
    if want == "all":
        hidden_TE = model(batch, "hidden")
        out = hidden_TE[batch.label_index_L] if how == "labels" else pool(hidden_TE, batch, how)
    elif want == "loss":
        out = model(batch, "loss", lambda head, hidden_LE, labels_L: hidden_LE)
    else:
        out = model(batch, want)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    (out.double() * weight).sum().backward()
    gradients = {name: parameter.grad for name, parameter in trainable(model).items()}
    model.zero_grad(set_to_none=True)
    return out.detach(), gradients


@pytest.mark.parametrize(
    ("family", "how"),
    [(family, "labels") for family in FAMILIES]
    + [("llama", how) for how in ("mean", "weighted_mean", "first", "last")],
)
def test_equals_float64_of_all_tokens(family, how):
    want = "loss" if how == "labels" else "vectors"
    wanted = seen(build(family, "fused", dtype=torch.float64, **NOISY), half(), "all", how)
    assert max(errors(seen(build(family, "fused", dtype=torch.float64, **NOISY), half(), want, how), wanted)) <= 1e-12
    single = build(family, "fused", **NOISY)
    found, of_all = (errors(seen(single, half(), what, how), wanted) for what in (want, "all"))
    for error, other in zip(found, of_all, strict=True):
        assert error <= max(1e-6, 1.1 * other)  # norms of heads amplify rounding, whatever is read


def errors(found, wanted):
    """The largest error of the result and of the gradients, each by its largest entry."""
    (out, grads), (exact, exact_grads) = found, wanted
    return float((out.double() - exact).abs().max() / exact.abs().max()), distance(grads, exact_grads)


@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_recomputing_changes_no_bit(recompute):
    wanted, grads = seen(build("llama", "fused", recompute="cheap", **NOISY), half(), "loss", "labels")
    found, others = seen(build("llama", "fused", recompute=recompute, **NOISY), half(), "loss", "labels")
    assert torch.equal(found, wanted) and all(torch.equal(others[k], grads[k]) for k in grads)


@pytest.mark.parametrize("how", ["mean", "last"])
def test_a_text_without_pooled_tokens_gives_zeros(how):
    exact, grads64 = seen(build("llama", "fused", dtype=torch.float64, **NOISY), half(empty=True), "all", how)
    found, grads = seen(build("llama", "fused", **NOISY), half(empty=True), "vectors", how)
    assert not found[-1].any() and (found.double() - exact).abs().max() <= 1e-6 * exact.abs().max()
    assert distance(grads, grads64) <= 1e-6


def rows(model, batch, want="vectors"):
    """Rows that each layer's MLP computes."""
    model.eval()
    with torch.no_grad(), mock.patch.object(swiglu, "forward", wraps=swiglu.forward) as spy:
        model(batch, want, lambda head, hidden_LE, labels_L: hidden_LE)
    return [len(call.args[0]) for call in spy.call_args_list]


def test_only_what_is_read_goes_through_the_last_mlp():
    model, T = build("llama", "fused"), sum(LENGTHS)
    pooled = sum(n - n // 2 for n in LENGTHS)
    assert rows(model, half(), "loss") == [T, T, len(LABELS)]
    assert rows(model, half(), "logits") == [T, T, len(LABELS)]
    assert rows(model, half()) == [T, T, pooled]
    assert rows(model, half(), "hidden") == [T, T, T]
    model.pooling = "last"
    assert rows(model, half()) == [T, T, len(LENGTHS)]
    assert rows(model, half(empty=True)) == [T, T, pooled - 5], "one text has no last pooled token"


def test_nothing_is_picked_where_nearly_all_is_read_or_nothing():
    model, T = build("llama", "fused"), 40
    ids = torch.arange(3, 23).numpy()
    for start, wanted in ((0, T), (1, T), (2, T - 4), (20, T)):
        assert rows(model, pack([Segment(ids, start), Segment(ids, start)])) == [T, T, wanted]
    assert rows(model, pack([Segment(ids), Segment(ids)]), "loss") == [T, T, T], "no labels"


def test_flat_adapters_and_gathered_layers_get_the_same_gradients():
    wanted, grads = seen(build("llama", "fused", **NOISY), half(), "loss", "labels")
    flat = build("llama", "fused", **NOISY)
    names = trainable(flat)
    flat.flatten_adapters()
    assert torch.equal(flat.train()(half(), "loss", lambda head, hidden_LE, labels_L: hidden_LE), wanted)
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    out = flat(half(), "loss", lambda head, hidden_LE, labels_L: hidden_LE)
    (out.double() * weight).sum().backward()
    parts = flat.flat.split(flat.flat.weight.grad, names)
    assert all(torch.equal(parts[name], grads[name]) for name in grads)
    gathered = build("llama", "fused", **NOISY)
    gathered.as_units()
    found, others = seen(gathered, half(), "loss", "labels")
    assert torch.equal(found, wanted) and all(torch.equal(others[name], grads[name]) for name in grads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_picked_rows_have_their_own_gradient(dtype):
    x = torch.randn(6, 3, dtype=dtype, requires_grad=True)
    index = torch.tensor([1, 2, 5])
    weight = torch.randn(3, 3, dtype=dtype)
    picked = PickRows.apply(x, index)
    picked.backward(weight)
    assert torch.equal(picked, x.detach()[index]) and torch.equal(x.grad[index], weight)
    assert not x.grad[[0, 3, 4]].any()


@pytest.mark.parametrize("how", ["mean", "weighted_mean", "first", "last"])
def test_rows_weights_and_borders(how):
    batch = half()
    read = Read.of(batch, "vectors", how)
    weights_R, borders = read.pooled
    whole_T = pool_weights(batch, how)
    assert torch.equal(weights_R, whole_T[read.index_R]) and borders.dtype == torch.int32
    assert weights_R.sum() == whole_T.sum(), "nothing with a weight is left out"
    segments_T = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    found = torch.arange(len(LENGTHS)).repeat_interleave(borders.diff().long())
    assert torch.equal(segments_T[read.index_R], found)
