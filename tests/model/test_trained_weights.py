"""Fused layers whose own weights are trained: the gradients of transformers' layers, for every weight."""

import pytest
import torch
from support.fused_cases import FAMILIES, batch, build, distance, gradients

from l2v.batch import Segment, pack
from l2v.model.lora import trainable
from l2v.recipe import Lora

BIASES = {"qwen2": {}, "llama": {"attention_bias": True, "mlp_bias": False}}


def trained(family, layers, **kwargs):
    model = build(family, layers, shape=BIASES.get(family, {}), **kwargs)
    model.decoder.requires_grad_(True)
    return model


@pytest.mark.parametrize("recompute", ["none", "cheap", "layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_has_the_gradient_of_plain_layers(family, recompute):
    wanted_hidden, wanted = gradients(trained(family, "plain", attention_dropout=0.2))
    hidden, found = gradients(trained(family, "fused", recompute=recompute, attention_dropout=0.2))
    assert set(found) == {
        f"decoder.{name}" for name, _ in build(family, "plain", shape=BIASES.get(family, {})).decoder.named_parameters()
    }
    assert (hidden - wanted_hidden).abs().max() <= 1e-5 * wanted_hidden.abs().max()
    for name in wanted:
        assert distance({name: found[name]}, {name: wanted[name]}) <= 2e-5, name
        assert wanted[name].any(), name


def vectors_and_gradients(model, what):
    model.train()
    out = model(what, "vectors")
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(11))
    parameters = trainable(model)
    return out.detach(), dict(
        zip(parameters, torch.autograd.grad((out * weight).sum(), list(parameters.values())), strict=True)
    )


@pytest.mark.parametrize("start", [0, 3], ids=["all tokens", "read tokens"])
def test_pooled_vectors_train_the_last_norm(start):
    what = pack([Segment(torch.arange(3, 9).numpy(), start), Segment(torch.arange(20, 31).numpy(), start)])
    wanted, exact = vectors_and_gradients(trained("llama", "plain"), what)
    found, grads = vectors_and_gradients(trained("llama", "fused"), what)
    assert (found - wanted).abs().max() <= 1e-6
    assert distance(grads, exact) <= 1e-5 and grads["decoder.norm.weight"].any()


def test_some_weights_of_a_group_and_adapters_beside_them():
    """What PEFT's modules_to_save leaves: adapters, and single weights that are trained."""
    models = []
    for layers in ("plain", "fused"):
        model = build("qwen2", layers, lora=Lora(r=5, alpha=10, dropout=0.1))
        for name, parameter in model.decoder.named_parameters():
            if (
                "layers.1.self_attn.k_proj.base_layer" in name
                or "layers.2.mlp.up_proj.base_layer" in name
                or name.endswith("layers.0.post_attention_layernorm.weight")
            ):
                parameter.requires_grad_(True)
        models.append(gradients(model))
    (wanted_hidden, wanted), (hidden, found) = models
    assert distance(found, wanted) <= 1e-5
    assert sum("lora" not in name for name in found) == 4 and torch.allclose(
        hidden, wanted_hidden, rtol=1e-5, atol=1e-6
    )


def test_frozen_weights_get_no_gradient_and_cost_nothing():
    model = build("llama", "fused", lora=Lora(r=5))
    assert not any(group.trained() for spec in model.fused.specs for group in spec.groups)
    model.train()(batch(), "hidden").sum().backward()
    assert all(p.grad is None for n, p in model.named_parameters() if "lora" not in n)
    model.decoder.requires_grad_(True)  # also after a forward that kept its lookups
    model(batch(), "hidden").sum().backward()
    assert all(p.grad is not None for n, p in model.decoder.named_parameters() if "embed" not in n)


def test_bf16_is_as_near_to_fp32_as_plain_bf16():
    _, exact = gradients(trained("llama", "plain"))
    errors = {}
    for layers in ("plain", "fused"):
        _, found = gradients(trained("llama", layers, dtype=torch.bfloat16))
        flat = torch.cat([(found[k].float() - exact[k]).flatten() for k in exact])
        errors[layers] = flat.norm() / torch.cat([g.flatten() for g in exact.values()]).norm()
    assert errors["fused"] <= 1.1 * errors["plain"] and errors["fused"] < 0.03
