"""The frozen base in fewer bits: FP8 (emulated) against transformers' own layers with the same rounding, NF4 by bitsandbytes."""

import importlib.util
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.fused_cases import FAMILIES, SHAPE, batch, build, distance, gradients
from torch import nn

from l2v.errors import RecipeError, UserError
from l2v.model.fused.spec import base_of
from l2v.model.load import inner_model, load_model
from l2v.model.lora import add_lora, merge_adapters, save_adapter, trainable
from l2v.model.packed import PackedDecoder
from l2v.model.quantize import check_base_precision, check_fused, notice, to_fp8, to_nf4
from l2v.recipe import Base, Lora
from l2v.training.frozen import frozen_checksum
from l2v_kernels.fp8 import Fp8Weight, quantize_rows

LORA = Lora(r=5, alpha=10, dropout=0.1)
NOISY = {"lora": LORA, "attention_dropout": 0.2}
CPU = torch.device("cpu")
GROUPS = ("qkv", "o", "gate_up", "down")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes (extra nf4)"
)


@pytest.fixture(autouse=True)
def _emulate(monkeypatch):
    monkeypatch.setenv("L2V_FP8", "emulate")


def fp8(family="llama", **kwargs):
    model = build(family, "fused", **NOISY | kwargs)
    to_fp8(model.fused, model.decoder)
    return model


class Rounded(torch.autograd.Function):
    """x W^T of numbers rounded to e4m3, written down once more for transformers' layers."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        q, scale = quantize_rows(x.flatten(0, -2))
        y = (q.float() * scale[:, None]) @ weight.dequantized().t()
        return y.unflatten(0, x.shape[:-1]).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        q, scale = quantize_rows(dy.flatten(0, -2), ctx.weight.scale_O)
        dx = (q.float() * scale[:, None]) @ ctx.weight.rows_OE.float()
        return dx.unflatten(0, dy.shape[:-1]).to(dy.dtype), None


def rounded(family, **kwargs):
    """transformers' own layers and PEFT's own LoRA, whose frozen linears round."""
    model = build(family, "plain", **NOISY | kwargs)
    for layer in model.decoder.get_base_model().layers:
        for part in (layer.self_attn, layer.mlp):
            for linear in (base_of(m) for m in part.children() if isinstance(base_of(m), nn.Linear)):
                weight = Fp8Weight.of([linear.weight.detach()])

                def forward(x, weight=weight, linear=linear):
                    y = Rounded.apply(x, weight)
                    return y if linear.bias is None else y + linear.bias

                linear.forward = forward
    return model


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_is_the_plain_model_with_rounded_numbers(family):
    """As near as a number that lies between two of e4m3 and falls to the other side for its last bit of fp32, which moves
    Gemma's batches farther: one of six has to have few of them. The full weights are much farther away, so that the rounding
    is really there."""
    model, reference = fp8(family), rounded(family)
    for seed in range(6):
        (hidden, found), (want_hidden, want) = (gradients(each, batch(seed)) for each in (model, reference))
        if relative(hidden, want_hidden) <= 5e-3 and distance(found, want) <= 5e-3:
            break
    else:
        pytest.fail("no batch agrees")
    full_hidden, full = gradients(build(family, "plain", **NOISY), batch(seed))
    assert 2e-2 < relative(hidden, full_hidden) < 1e-1 and 2e-2 < distance(found, full) < 0.5


@pytest.mark.parametrize(
    "shape", [{"attention_bias": True, "mlp_bias": True}, {"hidden_size": 40}], ids=["bias", "odd"]
)
def test_fp8_of_other_shapes(shape):
    want_hidden, want = gradients(rounded("llama", shape=shape))
    hidden, found = gradients(fp8(shape=shape))
    assert relative(hidden, want_hidden) <= 5e-3 and distance(found, want) <= 5e-3


def test_recomputing_changes_no_bit():
    hidden, want = gradients(fp8(recompute="none"))
    for recompute in ("cheap", "layer"):
        other, found = gradients(fp8(recompute=recompute))
        assert torch.equal(hidden, other) and all(torch.equal(found[k], want[k]) for k in want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_segment_sees_no_other(dtype):
    """No bit of another segment's output or gradient, though the token that changes is by far the largest of the pack."""
    model = fp8(dtype=dtype).train()
    found = []
    for change in (False, True):
        what = batch()
        if change:
            what.input_ids_T[10] = (what.input_ids_T[10] + 7) % 90
        embedded = []

        def keep(_, __, output, kept=embedded, change=change):
            kept.append(output.detach().requires_grad_())
            if change:
                kept[0].data[0, 10] *= 1000
            return kept[0]

        hook = model.fused.inner.embed_tokens.register_forward_hook(keep)
        hidden = model(what, "hidden")
        hook.remove()
        found.append((hidden.detach(), torch.autograd.grad(hidden.float().square().sum(), embedded[0])[0][0]))
    second = slice(8, 27)  # segments of 7, 1 and 19 tokens
    for before, after in zip(*found, strict=True):
        assert torch.equal(before[:8], after[:8]) and torch.equal(before[27:], after[27:])
        assert not torch.equal(before[second], after[second])


def test_weights_are_two_bytes_in_all_and_the_full_ones_are_gone():
    model = build("llama", "fused", dtype=torch.bfloat16, **NOISY)
    before = {k: (p, p.shape, p.dtype) for k, p in model.decoder.named_parameters()}
    linears = [base_of(m) for spec in model.fused.specs for m in spec.linears]
    weights = sum(linear.weight.numel() for linear in linears)
    to_fp8(model.fused, model.decoder)
    assert {k: (p, p.shape, p.dtype) for k, p in model.decoder.named_parameters()} == before
    for linear in linears:
        assert linear.weight.untyped_storage().nbytes() == 2 and linear.weight.isnan().all()
    held = [spec.module.get_submodule(f"fp8_{name}") for spec in model.fused.specs for name in GROUPS]
    found = sum(b.numel() * b.element_size() for one in held for b in one.buffers())
    rows = sum(linear.weight.shape[0] for linear in linears)
    assert found == 2 * weights + 4 * rows
    assert not any("fp8" in key for key in model.state_dict())


def test_a_cast_changes_no_bit():
    held, x = fp8(dtype=torch.bfloat16).fused.specs[0].qkv.quantized, torch.randn(5, 48).bfloat16()
    want = held.linears().matmul(x)
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(held.to(dtype).linears().matmul(x), want)


def test_what_does_not_know_of_fp8_gets_no_number():
    """transformers' own forward, which multiplies by weights that were freed."""
    model, one = fp8().eval(), batch(lengths=(9,))
    ids = {"input_ids": one.input_ids_T[None], "position_ids": one.position_ids_T[None]}
    with torch.no_grad():
        assert model.decoder(**ids, **model._attention(one))[0].isnan().all()


def test_the_checksum_covers_fp8():
    model, other = fp8(), fp8()
    assert frozen_checksum(model) == frozen_checksum(other)
    other.fused.specs[1].down.quantized.rows_NK[3, 4] ^= 1
    assert frozen_checksum(model) != frozen_checksum(other)


def test_adapters_are_the_same_files_and_nothing_else_is_written(tmp_path):
    model = fp8(dtype=torch.bfloat16)
    plain = build("llama", "plain", dtype=torch.bfloat16, **NOISY)
    for folder, one in (("fp8", model), ("plain", plain)):
        one.decoder.save_pretrained(tmp_path / folder / "peft")
        save_adapter(one.decoder, trainable(one.decoder), tmp_path / folder / "ours", {})
    for kind in ("peft", "ours"):
        ours, theirs = (
            load_file(tmp_path / folder / kind / "adapter_model.safetensors") for folder in ("fp8", "plain")
        )
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    base = build("llama", "plain", dtype=torch.bfloat16).decoder
    PeftModel.from_pretrained(base, tmp_path / "fp8" / "peft")
    for call in (
        model.decoder.merge_and_unload,
        model.decoder.merge_adapter,
        model.decoder.base_model.merge_and_unload,
        lambda: model.decoder.get_base_model().save_pretrained(tmp_path / "base"),
    ):
        with pytest.raises(
            UserError, match=r"a base in FP8 cannot be saved or merged: load it with base.base_precision: same"
        ):
            call()
    assert not (tmp_path / "base").exists()


def base(**kwargs):
    return Base(model="tiny", init="random", config=SHAPE | {"model_type": "llama"}, **kwargs)


def test_where_fp8_is_refused(monkeypatch):
    check_base_precision(base(base_precision="fp8"), CPU, torch.float32)
    monkeypatch.setenv("L2V_FP8", "emulated")
    with pytest.raises(UserError, match="L2V_FP8 is 'emulated'; set it to emulate, or leave it unset"):
        check_base_precision(base(base_precision="fp8"), CPU, torch.bfloat16)
    monkeypatch.delenv("L2V_FP8")
    check_base_precision(base(), CPU, torch.float32)
    with pytest.raises(
        UserError, match=r"fp8 cannot run here: there is no GPU, .* sm_89; use base.base_precision: same"
    ):
        check_base_precision(base(base_precision="fp8"), CPU, torch.bfloat16)
    monkeypatch.setattr("l2v_kernels.fp8.matmul._cuda_obstacle", lambda _: "NVIDIA A100 is sm_80, and FP8 needs sm_89")
    with pytest.raises(UserError, match=r"cannot run here: NVIDIA A100 is sm_80, .*; use base.base_precision: same"):
        check_base_precision(base(base_precision="fp8"), torch.device("cuda", 0), torch.bfloat16)
    monkeypatch.setattr("l2v_kernels.fp8.matmul._cuda_obstacle", lambda _: None)
    with pytest.raises(UserError, match=r"fp8 gives bf16 results, and base.precision is fp32; use bf16, or"):
        check_base_precision(base(base_precision="fp8", precision="fp32"), torch.device("cuda", 0), torch.float32)
    check_base_precision(base(base_precision="fp8"), torch.device("cuda", 0), torch.bfloat16)


def test_weights_that_fp8_does_not_take(monkeypatch):
    model = build("llama", "fused", **NOISY)
    base_of(model.fused.specs[1].gate_up.modules[1]).weight.data[3, 4] = torch.inf
    with pytest.raises(UserError, match=r"the weights of layer 1, gate_up hold infinity or NaN; the base is damaged"):
        to_fp8(model.fused, model.decoder)
    monkeypatch.delenv("L2V_FP8")
    model = build("llama", "fused", shape={"hidden_size": 40}, **NOISY)
    with pytest.raises(
        UserError, match=r"multiples of 16, and layer 0, qkv has \[\(64, 40\), \(32, 40\), \(32, 40\)\]"
    ):
        to_fp8(model.fused, model.decoder)
    model = build("llama", "fused", **NOISY)
    base_of(model.fused.specs[0].qkv.modules[2]).weight.ds_id = 0  # as ZeRO-3 marks what it shards
    with pytest.raises(UserError, match=r"fp8 does not support ZeRO stage 3 \(zero.config\)"):
        to_fp8(model.fused, model.decoder)


@pytest.fixture
def recipe(tiny_recipe, tmp_path):
    return lambda **overrides: tiny_recipe(tmp_path, **{"stages.supervised.from": "base"} | overrides)


def refusal(output):
    lines = [line for line in output.splitlines() if line.startswith("l2v: ")]
    assert len(lines) == 1 and "Traceback" not in output, output
    return lines[0]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            {"base.base_precision": "fp8", "zero.stage": 3},
            "fp8 cannot be combined with zero.stage: 3, which shards the weights",
        ),
        (
            {"base.base_precision": "nf4", "zero.stage": 3},
            "nf4 cannot be combined with zero.stage: 3, which shards the weights",
        ),
        ({"base.base_precision": "fp8", "base.layers": "plain"}, "fp8 needs fused layers; use base.layers: auto, or"),
        (
            {"base.base_precision": "fp8", "base.backend": "sdpa", "stages.simcse.attention_dropout": 0},
            "and those need",
        ),
        ({"base.base_precision": "nf4", "base.layers": "fused"}, "nf4 runs on plain layers; use base.layers: auto, or"),
        ({"base.base_precision": "int8"}, "base.base_precision is 'int8'; choose one of same, fp8, nf4"),
    ],
)
def test_a_recipe_mistake_is_one_sentence(run_here, recipe, overrides, says):
    said = refusal(run_here(recipe(**overrides), "--stage", "mntp", expect=2))
    assert says in said and "tiny.yaml" in said and "base.base_precision" in said


def test_training_is_refused_before_anything_is_loaded(run_here, recipe, monkeypatch):
    monkeypatch.setattr("l2v.training.build.load_model", None)
    monkeypatch.delenv("L2V_FP8")
    said = refusal(run_here(recipe(**{"base.base_precision": "fp8"}), "--stage", "mntp", expect=1))
    assert "base.base_precision: fp8 cannot run here: there is no GPU" in said and "base_precision: same" in said
    monkeypatch.setattr("l2v.model.quantize.importlib.util.find_spec", lambda name: None)
    said = refusal(run_here(recipe(**{"base.base_precision": "nf4"}), "--stage", "mntp", expect=1))
    assert "nf4 needs the package bitsandbytes: pip install 'l2v[nf4]', or use base.base_precision: same" in said


def test_a_family_that_the_fused_layer_does_not_know():
    one = base(base_precision="fp8")
    one.config["model_type"] = "gemma"
    decoder = inner_model(load_model(one, head=False, dtype=torch.float32))
    with pytest.raises(RecipeError, match=r"fp8 needs fused layers, and its layers are GemmaDecoderLayer, .*: same"):
        check_fused(one, PackedDecoder(decoder))


def test_fp8_through_the_program(run_here, recipe, tmp_path, monkeypatch):
    """Two stages, the second on the merged first; the frozen bytes are those of the start."""
    monkeypatch.setenv("L2V_CHECK", "1")
    path = recipe(**{"base.base_precision": "fp8"})
    for stage in ("mntp", "simcse"):
        output = run_here(path, "--stage", stage)
        assert f"{stage}: *** L2V_FP8=emulate: FP8 is emulated in fp32, SLOWER" in output
        assert f"{stage}: done" in output
    lineage = json.loads((tmp_path / "run/simcse/adapter/lineage.json").read_text())
    assert lineage["base_precision"] == "fp8" and len(lineage["merged"]) == 1
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/mntp/metrics.jsonl").read_text().splitlines()]
    changed = run_here(path, "--stage", "mntp", "base.base_precision=same", expect=1)
    assert 'base.base_precision was "fp8" and is now "same"' in changed
    run_here(path, "--stage", "mntp", "base.base_precision=same", f"out={tmp_path / 'same'}")
    full = [json.loads(line)["loss"] for line in (tmp_path / "same/mntp/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == len(full) == 4
    assert all(0 < abs(a - b) < 0.02 * b for a, b in zip(losses, full, strict=True))


BLOCKS = {"hidden_size": 64, "intermediate_size": 128}  # rows of whole blocks of NF4


def nf4(family="llama", dtype=torch.float32, lora=LORA):
    """A decoder in 4 bits, and transformers' own with the very same numbers in full."""
    from bitsandbytes.functional import dequantize_4bit

    small, full = (build(family, "plain", dtype=dtype, shape=BLOCKS).decoder for _ in range(2))
    to_nf4(small, CPU, dtype)
    held = dict(small.named_modules())
    for name, linear in full.named_modules():
        if type(linear) is nn.Linear:
            weight = held[name].weight
            linear.weight.data = dequantize_4bit(weight.data, weight.quant_state).to(dtype)
    models = []
    for decoder in (small, full):
        decoder = add_lora(decoder, lora, base_name=family, seed=1)
        torch.manual_seed(5)
        for name, parameter in decoder.named_parameters():
            if "lora" in name:
                parameter.data = (0.1 * torch.randn(parameter.shape)).to(dtype)
        models.append(PackedDecoder(decoder))
    return models


@needs_bitsandbytes
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_nf4_is_the_plain_model_with_rounded_weights(family):
    small, full = nf4(family)
    assert (
        small.fused is None and "q_proj is a Linear4bit, and the fused layer supports nn.Linear" in small.unfused_reason
    )
    hidden, found = gradients(small)
    want_hidden, want = gradients(full)
    assert relative(hidden, want_hidden) <= 1e-5 and distance(found, want) <= 1e-5
    rounded, bare = (
        m.layers[0].mlp.up_proj for m in (full.decoder.get_base_model(), build(family, "plain", shape=BLOCKS).decoder)
    )
    assert 0.05 < relative(base_of(rounded).weight, bare.weight) < 0.12


@needs_bitsandbytes
def test_nf4_after_an_evaluation_has_gradients():
    """bitsandbytes repacks weights in an evaluation, on some CPUs, and has no gradient for what it repacked."""
    from bitsandbytes.nn import Linear4bit

    small, _ = nf4()
    for module in small.modules():
        assert not isinstance(module, Linear4bit) or not module.support_avx512bf16_for_cpu
    _, want = gradients(small)
    with torch.no_grad():
        small.eval()(batch(), "hidden")
    _, found = gradients(small)
    assert all(torch.equal(found[k], want[k]) and want[k].abs().max() > 0 for k in want)


@needs_bitsandbytes
def test_nf4_is_half_a_byte_a_weight_and_is_not_written(tmp_path):
    small, _ = nf4()
    linears = [
        base_of(m)
        for layer in small.decoder.get_base_model().layers
        for m in (layer.self_attn.q_proj, layer.mlp.up_proj)
    ]
    for linear in linears:
        assert linear.weight.numel() * linear.weight.element_size() == linear.in_features * linear.out_features // 2
        assert linear.weight.quant_state.nested and linear.weight.quant_state.quant_type == "nf4"
    small.decoder.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="a base in NF4 cannot be saved or merged"):
        small.decoder.get_base_model().save_pretrained(tmp_path / "base")


@needs_bitsandbytes
def test_nf4_through_the_program(run_here, recipe, tmp_path, monkeypatch):
    """The second stage merges the first into full weights and quantises what comes out."""
    monkeypatch.setenv("L2V_CHECK", "1")
    monkeypatch.delenv("L2V_FP8")
    path = recipe(**{"base.base_precision": "nf4"} | {f"base.config.{key}": width for key, width in BLOCKS.items()})
    for stage in ("mntp", "simcse"):
        output = run_here(path, "--stage", stage)
        assert f"{stage}: plain layers, slower than fused ones: q_proj is a Linear4bit" in output
        assert f"{stage}: *** an NF4 base on a CPU saves memory, and is SLOWER" in output and f"{stage}: done" in output
    weights = load_file(tmp_path / "run/simcse/adapter/adapter_model.safetensors")
    assert any(w.abs().max() > 0 for k, w in weights.items() if "lora_B" in k)


@needs_bitsandbytes
@pytest.mark.parametrize("shape", [{}, {"hidden_size": 64}], ids=["both", "one"])
def test_nf4_that_bitsandbytes_does_not_give_back_is_refused(shape):
    """On a CPU its 0.50.2 rounds rows of 48 or 80 weights by the largest of other blocks: errors of .2 to .4, not .09."""
    with pytest.raises(
        UserError, match=r"does not give the weights of .* back on cpu; it needs rows of a multiple of 64"
    ):
        to_nf4(build("llama", "plain", shape=shape).decoder, CPU, torch.float32)


@needs_bitsandbytes
def test_nf4_is_made_of_what_adapters_left(tmp_path):
    from bitsandbytes.functional import dequantize_4bit

    trained = build("llama", "plain", lora=LORA, shape=BLOCKS)
    save_adapter(trained.decoder, trainable(trained.decoder), tmp_path / "adapter", {})
    merged = merge_adapters(build("llama", "plain", shape=BLOCKS).decoder, [str(tmp_path / "adapter")])
    want = merged.layers[0].mlp.up_proj.weight.detach().clone()
    to_nf4(merged, CPU, torch.float32)
    weight = merged.layers[0].mlp.up_proj.weight
    bare = build("llama", "plain", shape=BLOCKS).decoder.layers[0].mlp.up_proj.weight
    found = dequantize_4bit(weight.data, weight.quant_state)
    assert relative(found, want) < 0.12 < relative(found, bare)


def test_what_a_user_is_told(monkeypatch):
    assert "SLOWER" in notice(base(base_precision="fp8")) and notice(base()) is None
    monkeypatch.delenv("L2V_FP8")
    assert notice(base(base_precision="fp8")) == "frozen linear layers run in FP8"
