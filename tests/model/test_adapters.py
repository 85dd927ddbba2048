"""Every kind of adapter that PEFT writes: PEFT's own hidden states after merging, or one sentence."""

import copy
import functools
import json
import warnings

import pytest
import torch
from peft import (
    AdaLoraConfig,
    FourierFTConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from l2v.errors import Notice, UserError
from l2v.model.merge import merge_adapters

IDS = torch.arange(3, 45)[None]
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
SHAPES = {
    "llama": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8},
    "qwen2": {"intermediate_size": 48, "num_key_value_heads": 2},
    "phi3": {"intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}


@functools.cache
def built(family, head, dtype, more):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SHAPE | SHAPES[family] | {"tie_word_embeddings": False} | dict(more))
    return (AutoModelForCausalLM if head else AutoModel).from_config(config, dtype=dtype).eval()


def fresh(family="llama", *, head=False, dtype=torch.float32, **more):
    """The same random model each time, as a copy of its own."""
    return copy.deepcopy(built(family, head, dtype, tuple(more.items())))


def states(model):
    """Hidden states after the last norm, without any head."""
    body = model.get_base_model() if isinstance(model, PeftModel) else model
    body = body.base_model if hasattr(body, "lm_head") else body
    with torch.no_grad():
        return body(input_ids=IDS)[0]


def written(folder, config, family="llama", *, head=False, seed=1, base=None, rows=64):
    """An adapter with every tensor moved away from its start, saved by PEFT -> PEFT's states when it loads it again."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base or fresh(family, head=head, vocab_size=rows), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(fresh(family, head=head, vocab_size=rows), folder).eval()
    return states(again)


def lora(**options):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"]} | options)


MERGED = {
    "plain": lora(),
    "all linears": lora(target_modules="all-linear"),
    "a regular expression": lora(target_modules=r".*layers\.1\.mlp\.(up|down)_proj"),
    "patterns of ranks and alphas": lora(
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7}, alpha_pattern={"v_proj": 3}
    ),
    "rslora": lora(use_rslora=True),
    "rslora with patterns": lora(use_rslora=True, rank_pattern={"q_proj": 9}, alpha_pattern={"q_proj": 5}),
    "dora": lora(use_dora=True),
    "dora, other ranks": lora(use_dora=True, use_rslora=True, rank_pattern={"v_proj": 3}),
    "embeddings": lora(target_modules=["embed_tokens", "q_proj"]),
    "embeddings alone": lora(target_modules=["embed_tokens"]),
    "dora on embeddings": lora(target_modules=["embed_tokens", "k_proj"], use_dora=True),
    "some layers": lora(layers_to_transform=[1], layers_pattern="layers"),
    "excluded modules": lora(exclude_modules=["layers.0.self_attn.v_proj"]),
    "modules_to_save": lora(modules_to_save=["embed_tokens"]),
    "a norm to save": lora(modules_to_save=["norm", "o_proj"]),
    "trainable tokens": lora(trainable_token_indices=[3, 9, 40]),
    "trainable tokens by name": lora(trainable_token_indices={"embed_tokens": [5]}),
    "pissa": lora(init_lora_weights="pissa"),
    "olora": lora(init_lora_weights="olora"),
    "gaussian": lora(init_lora_weights="gaussian"),
    "orthogonal": lora(init_lora_weights="orthogonal"),
    "an alpha of 0": lora(lora_alpha=0),
    "LoHa": LoHaConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "LoKr": LoKrConfig(r=4, target_modules=["q_proj", "down_proj"], decompose_both=True),
    "VeRA": VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "VeRA without its projections": VeraConfig(r=4, target_modules=["q_proj"], save_projection=False),
    "AdaLoRA": AdaLoraConfig(init_r=4, target_r=2, total_step=100, target_modules=["q_proj", "gate_proj"]),
    "OFT": OFTConfig(oft_block_size=8, target_modules=["q_proj", "v_proj"]),
    "tokens": TrainableTokensConfig(token_indices=[3, 4], target_modules=["embed_tokens"]),
}
QWEN2 = {
    "lora_bias": lora(lora_bias=True, target_modules=["q_proj", "k_proj"]),
    "bias: all": lora(bias="all"),
    "bias: lora_only": lora(bias="lora_only", target_modules=["q_proj", "v_proj"]),
}
GPT2 = {
    "Conv1D": lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    "Conv1D, fan_in_fan_out forgotten": lora(target_modules=["c_attn", "c_proj"]),
    "dora on Conv1D": lora(target_modules=["c_fc"], fan_in_fan_out=True, use_dora=True),
    "embeddings of GPT-2": lora(target_modules=["wte"]),
}
CASES = (
    [pytest.param("llama", config, id=name) for name, config in MERGED.items()]
    + [pytest.param("qwen2", config, id=name) for name, config in QWEN2.items()]
    + [pytest.param("gpt2", config, id=name) for name, config in GPT2.items()]
    + [
        pytest.param(
            "phi3", lora(target_modules=["qkv_proj", "gate_up_proj"], use_dora=True), id="Phi-3's fused linears"
        )
    ]
)


@pytest.mark.parametrize(("family", "config"), CASES)
@pytest.mark.parametrize("head", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["causal", "decoder"])
def test_a_merged_adapter_gives_the_hidden_states_of_peft(tmp_path, family, config, head):
    want = written(tmp_path, config, family, head=head)
    base = fresh(family)
    bare = states(base)
    got = states(merge_adapters(base, [str(tmp_path)]))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert (got - bare).abs().max() > 1e-3 or (config.peft_type == "LORA" and config.lora_alpha == 0)
    assert not any("lora" in name or "original" in name for name, _ in base.named_modules())


def adapter(folder, config):
    written(folder, config)
    return str(folder)


def test_adapters_are_merged_one_after_the_other(tmp_path):
    """As a chain of stages trains them: each adapter changes the weights that those before it left."""
    configs = [
        lora(), lora(use_dora=True, target_modules=["q_proj", "o_proj"]), lora(modules_to_save=["embed_tokens"], bias="none"),
        lora(init_lora_weights="pissa"), lora(use_dora=True), LoHaConfig(r=2, target_modules=["k_proj"]),
        lora(target_modules=["embed_tokens", "q_proj"]),
    ]  # fmt: skip
    model, folders = fresh(), []
    for at, config in enumerate(configs):
        folders.append(str(tmp_path / str(at)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            written(folders[-1], config, seed=at, base=model)
            state = merge_adapters(fresh(), folders[:-1]).state_dict()  # `written` has wrapped the model
            model = fresh()
            model.load_state_dict(state)
            model = PeftModel.from_pretrained(model, folders[-1]).merge_and_unload()
    torch.testing.assert_close(states(merge_adapters(fresh(), folders)), states(model), rtol=0, atol=1e-5)
    swapped = [folders[1], folders[0], *folders[2:]]
    assert (states(merge_adapters(fresh(), swapped)) - states(model)).abs().max() > 1e-3  # DoRA's place matters


@pytest.mark.parametrize("second", [lora(use_dora=True), lora(init_lora_weights="olora")], ids=["dora", "olora"])
def test_weights_are_rounded_once(tmp_path, second):
    """bf16: the nearest values to the float32 result, also where the second adapter is merged by itself."""
    folders = [adapter(tmp_path / "a", lora()), adapter(tmp_path / "b", second)]
    exact = fresh(dtype=torch.bfloat16).float()
    exact = merge_adapters(exact, folders).layers[1].mlp.up_proj.weight
    base = merge_adapters(fresh(dtype=torch.bfloat16), folders)
    assert {p.dtype for p in base.parameters()} == {torch.bfloat16}
    assert torch.equal(base.layers[1].mlp.up_proj.weight, exact.bfloat16())


def test_what_an_adapter_holds_for_the_head_is_skipped_aloud(tmp_path):
    want = written(tmp_path, lora(target_modules=["q_proj", "lm_head"], modules_to_save=None), head=True)
    with pytest.warns(Notice, match=r"3 tensors for the head \(base_model.model.lm_head"):
        got = states(merge_adapters(fresh(), [str(tmp_path)]))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    whole = fresh(head=True)
    with pytest.raises(UserError, match="MNTP predicts with the base's own head"):
        merge_adapters(whole.base_model, [str(tmp_path)], whole=whole)


def test_a_head_that_was_saved_as_a_whole_is_skipped(tmp_path):
    want = written(tmp_path, lora(modules_to_save=["lm_head", "embed_tokens"]), head=True)
    with pytest.warns(Notice, match="1 tensors for the head"):
        got = states(merge_adapters(fresh(), [str(tmp_path)]))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_an_embedding_that_the_head_shares_is_untied(tmp_path):
    """PEFT's own forward changes the embedding and not the head."""
    written(tmp_path, lora(target_modules=["embed_tokens", "q_proj"]))
    whole = fresh(head=True, tie_word_embeddings=True)
    before = whole.lm_head.weight.detach().clone()
    merge_adapters(whole.base_model, [str(tmp_path)], whole=whole)
    assert torch.equal(whole.lm_head.weight, before)
    assert not torch.equal(whole.base_model.embed_tokens.weight, before)


def test_tokens_beyond_the_embedding_get_rows_of_their_own(tmp_path):
    written(tmp_path, lora(trainable_token_indices=[7, 64, 65, 66]), rows=67)
    trained = load_file(tmp_path / "adapter_model.safetensors")
    rows = next(tensor for name, tensor in trained.items() if "trainable_tokens" in name)
    base = merge_adapters(fresh(), [str(tmp_path)])
    assert base.config.vocab_size == 67 == base.embed_tokens.weight.shape[0]
    assert torch.equal(base.embed_tokens.weight[[7, 64, 65, 66]], rows)
    change(tmp_path, trainable_token_indices=[7, 66, 68])
    with pytest.raises(UserError, match="has none for token 64; use the base that it was trained on"):
        merge_adapters(fresh(), [str(tmp_path)])


def change(folder, **keys):
    """Change keys of an adapter's configuration."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


WEIGHTS = "adapter_model.safetensors"


def renamed(tensors, was, now):
    return {name.replace(was, now): tensor.clone() for name, tensor in tensors.items()}


BROKEN = {
    "no tensors": (lambda t: {}, "holds no tensors"),
    "empty tensors": (lambda t: {k: torch.zeros(0) for k in t}, "12 of its 12 tensors are empty .size 0., as ZeRO-3"),
    "one empty tensor": (lambda t: t | {max(t): torch.zeros(0, 4)}, "1 of its 12 tensors are empty"),
    "the first layer alone": (lambda t: {k: v for k, v in t.items() if "layers.0" in k}, "lacks 6 of the 12 tensors"),
    "A without B": (lambda t: {k: v for k, v in t.items() if "lora_A" in k}, "lacks 6 of the 12 .*lora_B.weight"),
    "surplus": (
        lambda t: t | {k.replace("q_proj", "k_proj"): v.clone() for k, v in t.items()},
        "4 of its 16 tensors are none that",
    ),
    "another layer": (
        lambda t: t | {k.replace("layers.1", "layers.9"): v.clone() for k, v in t.items()},
        "6 of its 18 tensors are none",
    ),
    "another base": (
        lambda t: {k.replace("layers", "blocks"): v for k, v in t.items()},
        "belong to no module of this base",
    ),
    "another rank": (
        lambda t: {k: v[:2] if "lora_A" in k else v for k, v in t.items()},
        r"shape \(2, 32\), and the base",
    ),
    "another width": (
        lambda t: {k: v[:, :8].clone() if "lora_A" in k else v for k, v in t.items()},
        r"ask for \(4, 32\)",
    ),
    "NaN": (lambda t: t | {min(t): t[min(t)] * float("nan")}, "1 of its 12 tensors hold NaN or Inf"),
    "Inf": (lambda t: {k: v / 0 for k, v in t.items()}, "12 of its 12 tensors hold NaN or Inf"),
    "whole numbers": (lambda t: {k: v.to(torch.int8) for k, v in t.items()}, "are not floating point"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    written(folder, lora())
    return folder


@pytest.fixture
def damaged(whole, tmp_path):
    """A copy of a whole adapter that a test may damage."""
    for file in whole.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize(("damage", "match"), BROKEN.values(), ids=BROKEN)
def test_a_damaged_adapter_is_refused(damaged, damage, match):
    save_file(damage(load_file(damaged / WEIGHTS)), damaged / WEIGHTS)
    base = fresh()
    with pytest.raises(UserError, match=match):
        merge_adapters(base, [str(damaged)])


REFUSED = {
    "alora": ({"alora_invocation_tokens": [1, 2]}, "is an activated LoRA"),
    "kasa": ({"kasa_config": {"beta": 1e-4}}, "is a KaSA adapter"),
    "qalora": ({"use_qalora": True}, "is a QALoRA adapter"),
    "arrow": ({"arrow_config": {"top_k": 2}}, "is an Arrow router"),
    "repeated layers": ({"layer_replication": [[0, 2], [1, 2]]}, "repeats layers"),
    "corda": ({"init_lora_weights": "corda"}, "init_lora_weights 'corda'"),
    "loftq": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "init_lora_weights 'loftq'"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "init_lora_weights 'lora_ga'"),
    "a random decomposition": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
    "a key of the future": ({"use_tomorrow": True}, "sets use_tomorrow, which PEFT .* does not know"),
    "a method of the future": ({"peft_type": "TOMORROW"}, "is of the kind 'TOMORROW'"),
    "no method": ({"peft_type": None}, "names no peft_type"),
    "a rank of 0": ({"r": 0}, "a rank that is no whole number from 1"),
    "a rank beyond memory": ({"r": 10**12}, "asks for a rank of 1000000000000, and no tensor"),
    "a pattern beyond memory": ({"rank_pattern": {"q_proj": 10**12}}, "asks for a rank of 1000000000000"),
    "a rank in words": ({"r": "four"}, "a rank that is no whole number from 1"),
    "alpha in words": ({"lora_alpha": "eight"}, "a lora_alpha that is no number"),
    "targets that are nowhere": ({"target_modules": ["query"]}, "does not fit this base"),
    "a broken regular expression": ({"target_modules": "*q_proj"}, "does not fit this base"),
    "targets of a wrong kind": ({"target_modules": 5}, "adapter_config.json is not readable|does not fit this base"),
    "a bias of no kind": ({"bias": "half"}, "the bias in its .* is not none, all or lora_only"),
    "a pattern that is a list": ({"rank_pattern": ["q_proj"]}, "the rank_pattern in its .* is not a mapping"),
    "tokens in words": ({"trainable_token_indices": ["a"]}, "is not a list of token ids"),
    "dora without magnitudes": ({"use_dora": True}, "lacks 6 of the 18 tensors .*lora_magnitude_vector"),
    "a module to save that is missing": ({"modules_to_save": ["o_proj"]}, "lacks 2 of the 14 tensors"),
}


@pytest.mark.parametrize(("keys", "match"), REFUSED.values(), ids=REFUSED)
def test_a_configuration_that_is_not_merged_is_refused_by_name(damaged, keys, match):
    change(damaged, **keys)
    with pytest.raises(UserError, match=match):
        merge_adapters(fresh(), [str(damaged)])


OTHER = {
    "PREFIX_TUNING": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "IA3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "FOURIERFT": FourierFTConfig(target_modules=["q_proj"], n_frequency=10, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize(("kind", "config"), OTHER.items(), ids=OTHER)
def test_other_kinds_are_refused_by_name(tmp_path, kind, config):
    get_peft_model(fresh(head=True), config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"is of the kind '{kind}' \(peft_type\), and l2v merges LORA, ADALORA"):
        merge_adapters(fresh(), [str(tmp_path)])


def test_lora_bias_needs_a_base_with_biases(tmp_path):
    written(tmp_path, lora(lora_bias=True, target_modules=["up_proj"]))
    with pytest.raises(UserError, match="lora_bias=True` because the base layer has no bias"):
        merge_adapters(fresh(), [str(tmp_path)])


@pytest.mark.parametrize("text", ["", "[]", "{", "3", '{"peft_type": ["LORA"]}', "\x00", "[" * 100_000])
def test_a_damaged_configuration_is_one_sentence(damaged, text):
    (damaged / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        merge_adapters(fresh(), [str(damaged)])
