"""LoRA as a recipe asks for it: targets by family, variants, patterns, trained tokens; fused or plain, and merged again."""

from itertools import product

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict
from support import fused_cases
from transformers import AutoConfig, AutoModel

from l2v.batch import Segment, pack
from l2v.errors import RecipeError
from l2v.model.lora import add_lora, merge_adapters, save_adapter, trainable
from l2v.model.packed import PackedDecoder
from l2v.model.targets import family_linears, resolve_targets
from l2v.recipe import LLAMA_LINEARS, Lora

TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 64, "n_layer": 2, "n_embd": 32, "n_head": 4, "num_layers": 2, "num_heads": 4,
    "attention_types": [[["global"], 2]], "ffn_dim": 48, "word_embed_proj_dim": 32, "rotary_dim": 4, "n_inner": None,
    "expansion_ratio": 2, "d_model": 32, "n_heads": 4, "num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "num_experts_per_tok": 2,
}  # fmt: skip


def tiny(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family)
    for key, value in TINY.items():
        if hasattr(config, key):
            setattr(config, key, value)
    return AutoModel.from_config(config, dtype=torch.float32)


SEVEN = list(LLAMA_LINEARS)
FAMILIES = {
    "llama": SEVEN,
    "mistral": SEVEN,
    "qwen3": SEVEN,
    "gemma": SEVEN,
    "qwen2_moe": SEVEN,
    "phi3": ["o_proj", "qkv_proj", "gate_up_proj", "down_proj"],
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "starcoder2": ["q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gpt_neo": ["k_proj", "v_proj", "q_proj", "out_proj", "c_fc", "c_proj"],
    "gptj": ["k_proj", "v_proj", "q_proj", "out_proj", "fc_in", "fc_out"],
    "codegen": ["qkv_proj", "out_proj", "fc_in", "fc_out"],
    "bloom": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "opt": ["k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2"],
    "bert": ["query", "key", "value", "output.dense", "intermediate.dense"],
}


@pytest.mark.parametrize(("family", "names"), FAMILIES.items(), ids=FAMILIES)
def test_the_default_targets_are_the_linears_of_the_family(family, names):
    inner = tiny(family)
    found = resolve_targets(inner, Lora())
    assert sorted(found) == sorted(names)
    model = add_lora(inner, Lora(), base_name=family, seed=0)
    at = {name.split(".lora_A")[0].removeprefix("base_model.model.") for name in trainable(model) if ".lora_A" in name}
    layers = {name for name in at if any(part.isdigit() for part in name.split("."))}
    assert len(at) == len(layers) > 0
    assert {next(n for n in names if name.endswith(f".{n}")) for name in at} == set(names)


def test_llamas_seven_stay_as_they_are_written():
    assert resolve_targets(tiny("llama"), Lora()) == SEVEN


REFUSED = {
    "a typing error": (
        "llama",
        ["q_proj", "v_porj"],
        "v_porj match no linear layer of this base; it has q_proj, k_proj",
    ),
    "a family without a default": (
        "gpt_neox",
        SEVEN,
        "q_proj, .* match no linear layer .* it has query_key_value, dense",
    ),
    "names of another family": ("phi3", ["q_proj", "o_proj"], "q_proj match no linear layer .* qkv_proj, gate_up_proj"),
    "an embedding": ("llama", ["embed_tokens"], "embed_tokens match no linear layer"),
    "an expression for nothing": (
        "llama",
        [r"model\.layers\.\d+\.mlp.*"],
        "matches no layer of this base, whose names are like",
    ),
    "an expression for more than linears": (
        "llama",
        [r"layers\.0.*"],
        r"matches layers.0 \(LlamaDecoderLayer\), which is no",
    ),
    "no expression": ("llama", ["(q_proj"], r"'\(q_proj' is no regular expression"),
}


@pytest.mark.parametrize(("family", "targets", "match"), REFUSED.values(), ids=REFUSED)
def test_targets_that_match_nothing_are_named_with_those_that_exist(family, targets, match):
    with pytest.raises(RecipeError, match=match):
        add_lora(tiny(family), Lora(targets=targets), base_name=family, seed=0)


@pytest.mark.parametrize(
    ("family", "targets", "names"),
    [
        ("llama", ["all-linear"], set(SEVEN)),
        ("gpt_neox", ["all-linear"], {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
        ("llama", [r"layers\.1\..*(q|up)_proj"], {"q_proj", "up_proj"}),
        ("llama", ["self_attn.o_proj"], {"o_proj"}),
    ],
)
def test_all_linear_and_regular_expressions(family, targets, names):
    model = add_lora(tiny(family), Lora(targets=targets), base_name=family, seed=0)
    at = [name.split(".lora_A")[0] for name in trainable(model) if ".lora_A" in name]
    assert {name.rsplit(".", 1)[-1] for name in at} == names
    assert ("layers.1" not in targets[0].replace("\\", "")) or all("layers.1" in name for name in at)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_for_no_layer_is_refused(key):
    with pytest.raises(
        RecipeError, match=f"lora.{key}: 'up_porj' is for no layer that gets an adapter; those are q_proj"
    ):
        add_lora(tiny("llama"), Lora(targets=["q_proj"], **{key: {"up_porj": 4}}), base_name="x", seed=0)
    with pytest.raises(RecipeError, match=f"lora.{key}: '.q' is no regular expression"):
        add_lora(tiny("llama"), Lora(targets=["q_proj"], **{key: {"(q": 4}}), base_name="x", seed=0)


PATTERNS = {
    "rank_pattern": {"v_proj": 2, r"layers\.1\.mlp\.up_proj": 12},
    "alpha_pattern": {"o_proj": 5, "q_proj": 1.5},
}
VARIANTS = {
    "rslora": Lora(r=4, alpha=8, dropout=0.25, variant="rslora"),
    "patterns": Lora(r=4, alpha=8, dropout=0.25, **PATTERNS),
    "rslora with patterns": Lora(r=4, alpha=8, dropout=0.25, variant="rslora", **PATTERNS),
    "an expression": Lora(r=4, alpha=8, dropout=0.25, targets=[r"layers\.[02]\..*(q|k|gate|down)_proj"]),
    "gaussian": Lora(r=4, alpha=8, init="gaussian"),
    "orthogonal": Lora(r=4, alpha=8, init="orthogonal"),
    "dora": Lora(r=4, alpha=8, dropout=0.25, variant="dora"),
}


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "dora"])
def test_fused_layers_compute_every_variant_that_they_take(name):
    fused, plain = (fused_cases.build("qwen3", layers, lora=VARIANTS[name]) for layers in ("fused", "plain"))
    (ours, mine), (theirs, other) = fused_cases.gradients(fused), fused_cases.gradients(plain)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)  # states of up to 3
    assert fused_cases.distance(mine, other) < 1e-5


def test_fused_layers_leave_dora_to_plain_ones():
    assert "has a variant of LoRA" in fused_cases.build("llama", "auto", lora=VARIANTS["dora"]).unfused_reason


def batch():
    generator = np.random.default_rng(0)
    return pack(
        [Segment(np.append(generator.integers(3, 64, n), [7, 40]), 1, example=i) for i, n in enumerate((9, 4, 13))]
    )


@pytest.mark.parametrize(
    ("family", "name"), [("llama", name) for name in VARIANTS] + list(product(["phi3", "gpt2"], ["rslora", "dora"]))
)
def test_the_merged_adapter_of_a_stage_is_the_model_that_was_trained(tmp_path, family, name):
    _same_after_merging(tmp_path, family, VARIANTS[name])


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_trained_tokens_are_saved_and_merged(tmp_path, variant):
    _same_after_merging(tmp_path, "llama", Lora(r=4, variant=variant), token_ids=[40, 7])


def _same_after_merging(folder, family, lora, token_ids=()):
    """Vectors of the model in training (its dropout off), and of the base with the saved adapter merged."""
    decoder = add_lora(tiny(family), lora, base_name=family, seed=5, token_ids=token_ids)
    parameters = trainable(decoder)
    if lora.init == "default" and not token_ids:
        assert torch.equal(vectors(decoder), vectors(tiny(family)))  # a start that leaves the base alone
    for at, parameter in enumerate(parameters.values()):
        torch.manual_seed(at)
        parameter.data += 0.1 * torch.randn_like(parameter)
    names = get_peft_model_state_dict(decoder, save_embedding_layers=False)
    assert parameters.keys() == names.keys()
    save_adapter(decoder, parameters, folder, {"merged": []})
    merged = merge_adapters(tiny(family), [str(folder)])
    torch.testing.assert_close(vectors(merged), vectors(decoder), rtol=0, atol=1e-5)
    assert (vectors(merged) - vectors(tiny(family))).abs().max() > 1e-2


@torch.no_grad()
def vectors(decoder):
    return PackedDecoder(decoder, causal=True, backend="sdpa", layers="plain").eval()(batch())


def test_a_start_leaves_the_base_alone_where_it_says_so():
    for init in ("gaussian", "orthogonal"):
        before, after = tiny("llama"), add_lora(tiny("llama"), Lora(init=init), base_name="x", seed=0)
        for name, parameter in before.named_parameters():
            inner = after.get_base_model()
            owner, leaf = name.rsplit(".", 1)
            module = inner.get_submodule(owner)
            module = module.get_base_layer() if hasattr(module, "get_base_layer") else module
            assert torch.equal(getattr(module, leaf), parameter), name


def test_family_linears_skip_routers():
    assert not {"gate", "shared_expert_gate"} & set(family_linears(tiny("qwen2_moe")))
