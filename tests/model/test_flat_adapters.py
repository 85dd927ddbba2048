"""Adapters as parts of one parameter: the gradients of separate matrices, bit for bit, delivered once."""

import pytest
import torch
from support.fused_cases import FAMILIES, batch, build, gradients
from support.step_cases import poisoned

from l2v.model.fused import FlatAdapters
from l2v.model.lora import trainable
from l2v.recipe import Lora

ALL = Lora(r=4, alpha=8, dropout=0.3)
ODD = Lora(r=3, alpha=8, dropout=0.0, targets=["q_proj", "v_proj", "down_proj"])
WIDE = {"hidden_size": 36, "head_dim": 6, "intermediate_size": 41}  # no size of which is a multiple of the alignment


def split(flat: FlatAdapters, whole: torch.Tensor, names) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in flat.split(whole, names).items()}


@pytest.mark.parametrize("recompute", ["none", "cheap", "layer"])
@pytest.mark.parametrize(("lora", "shape"), [(ALL, {}), (ODD, WIDE)], ids=["all", "odd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_separate_matrices(family, lora, shape, recompute):
    apart = build(family, "fused", lora=lora, shape=shape.items(), recompute=recompute)
    hidden, want = gradients(apart)
    flat = build(family, "fused", lora=lora, shape=shape.items(), recompute=recompute)
    names = trainable(flat)
    flat.flatten_adapters()
    assert list(trainable(flat)) == ["flat.weight"] and flat.flat.padded == bool(shape)
    with poisoned():
        same, found = gradients(flat)
    assert torch.equal(hidden, same)
    (whole,) = found.values()
    of_each = split(flat.flat, whole, names)
    assert of_each.keys() == want.keys()
    for name, gradient in want.items():
        assert torch.equal(of_each[name], gradient), name
    inside = torch.zeros_like(whole, dtype=torch.bool)
    for begin, end in flat.flat.matrices.values():
        inside[begin:end] = True
    assert (whole[~inside] == 0).all()


def test_several_forwards_accumulate_and_an_update_reaches_the_matrices():
    """As with separate matrices: two micro-batches and their sum, then AdamW."""
    models = [build("llama", "fused", lora=ALL) for _ in range(2)]
    names = [trainable(model) for model in models]
    models[1].flatten_adapters()
    for model in models:
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        outputs = [model(batch(seed), "hidden").square().mean() for seed in (0, 1)]
        for output in reversed(outputs):
            output.backward()
        optimizer.step()
    for name, matrix in names[0].items():
        assert torch.equal(matrix, names[1][name]), name


def test_an_adapter_that_is_switched_off_gets_no_gradient():
    model = build("llama", "fused", lora=ALL)
    names = trainable(model)
    model.flatten_adapters()
    module = model.decoder.get_base_model().layers[1].mlp.down_proj
    module.enable_adapters(False)
    with poisoned():
        _, found = gradients(model)
    for name, gradient in model.flat.split(found["flat.weight"], names).items():
        assert (gradient == 0).all() == ("layers.1.mlp.down_proj" in name), name


@torch.no_grad()
def test_a_forward_sees_weights_that_moved_and_adapters_that_changed():
    """What is kept between forwards is read again as soon as anything is different."""
    model, fresh = (build("qwen2", "fused", lora=ALL).eval() for _ in range(2))
    what = batch()

    def both(change) -> tuple[torch.Tensor, torch.Tensor]:
        before = model(what, "hidden")
        for each in (model, fresh):
            change(each)
        other = build("qwen2", "fused", lora=ALL).eval()
        other.load_state_dict(fresh.state_dict())
        return before, model(what, "hidden"), other

    layer = lambda m: m.decoder.get_base_model().layers[0]  # noqa: E731

    def moved(m):
        weight = layer(m).self_attn.k_proj.get_base_layer().weight
        weight.data = weight.data * 1.5

    before, after, other = both(moved)
    assert not torch.equal(before, after) and torch.equal(after, other(what, "hidden"))

    def other_bias(m):
        layer(m).self_attn.q_proj.get_base_layer().bias = torch.nn.Parameter(torch.ones(64), requires_grad=False)

    before, after, other = both(other_bias)
    assert not torch.equal(before, after) and torch.equal(after, other(what, "hidden"))
    switch = lambda on: lambda m: [x.enable_adapters(on) for x in m.modules() if hasattr(x, "lora_A")]  # noqa: E731
    before, after, _ = both(switch(False))
    assert not torch.equal(before, after)
    _, again, _ = both(switch(True))
    assert torch.equal(again, before)
    model.train()
    assert not torch.equal(model(what, "hidden"), again), "dropout"
    model.eval()
    assert torch.equal(model(what, "hidden"), again)
    model.fused.stack_weights()
    torch.testing.assert_close(model(what, "hidden"), again, rtol=1e-5, atol=1e-6)
