import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers.utils.import_utils import is_kernels_available

from l2v_kernels import AttentionPlan
from l2v_kernels.integrations.transformers import PackedAttention, packed_attention_forward, register

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": 6},
    "Qwen2": {},
    "Qwen3": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "Gemma": {},
    "Gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    "Gemma3Text": {"sliding_window": 6, "query_pre_attn_scalar": 8},
}
LENGTHS = [5, 1, 20, 5, 0, 13]


def build(family, implementation, causal):
    config = getattr(transformers, f"{family}Config")(**COMMON, **FAMILIES[family], is_causal=causal)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}Model")._from_config(config, attn_implementation=implementation)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.2)
        else:
            # Larger than the default, so that attention is far from uniform and a wrong mask shows.
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    return model.eval()


def packed_inputs(lengths, **settings):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = PackedAttention(cu_seqlens, plan=AttentionPlan.from_lengths(lengths), **settings)
    return {"position_ids": positions, "packed": packed, "use_cache": False}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_plain_transformers_one_by_one(family, causal):
    register()
    register()
    ids = torch.randint(1, 97, (sum(LENGTHS),))
    plain = ["eager"] if family == "Gemma2" else ["eager", "sdpa"]
    with torch.no_grad():
        got = build(family, "l2v", causal)(ids[None], **packed_inputs(LENGTHS, causal=causal)).last_hidden_state[0]
        for implementation in plain:
            model = build(family, implementation, causal)
            for part, ours in zip(ids.split(LENGTHS), got.split(LENGTHS), strict=True):
                if len(part):
                    want = model(part[None], use_cache=False).last_hidden_state[0]
                    assert (ours - want).abs().max() <= 1e-5 * want.abs().max().clamp(min=1.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_token_reaches_the_first_only_without_causality(family):
    register()
    ids = torch.randint(1, 97, (6,))
    changed = ids.clone()
    changed[-1] = (ids[-1] + 1) % 97
    for causal in (False, True):
        model, inputs = build(family, "l2v", causal), packed_inputs([6], causal=causal)
        with torch.no_grad():
            first, second = (model(x[None], **inputs).last_hidden_state[0, 0] for x in (ids, changed))
        assert torch.equal(first, second) == causal


# Gemma 2 has no sdpa in transformers: it lacks softcap.
PLAIN = [(family, how) for family in FAMILIES for how in ("eager", "sdpa") if (family, how) != ("Gemma2", "sdpa")]


@pytest.mark.parametrize(("family", "implementation"), PLAIN)
def test_the_config_alone_makes_plain_transformers_bidirectional(family, implementation, tmp_path):
    """What a merged export relies on: `is_causal: false` in the config, also after saving and loading."""
    ids = torch.randint(1, 97, (5,))
    changed = ids.clone()
    changed[-1] = (ids[-1] + 1) % 97

    def reaches_the_first(model):
        with torch.no_grad():
            first, second = (model(x[None], use_cache=False).last_hidden_state[0, 0] for x in (ids, changed))
        return not torch.equal(first, second)

    assert not reaches_the_first(build(family, implementation, causal=True))
    model = build(family, implementation, causal=False)
    # The modules keep saying True: transformers passes the config's value on in their place.
    assert all(layer.self_attn.is_causal for layer in model.layers)
    assert reaches_the_first(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation=implementation)
    assert reaches_the_first(loaded.eval())


def test_dropout_only_in_training_and_by_its_key():
    register()
    model = build("Llama", "l2v", causal=False)
    ids, seeds = torch.randint(1, 97, (9,)), torch.tensor([11, 12])
    inputs = packed_inputs([4, 5], seeds_S=seeds, dropout_p=0.3)
    swapped = packed_inputs([5, 4], seeds_S=seeds.flip(0), dropout_p=0.3)
    plain = model(ids[None], **inputs).last_hidden_state
    model.train()
    noisy = model(ids[None], **inputs).last_hidden_state
    assert not torch.allclose(plain, noisy)
    assert torch.equal(noisy, model(ids[None], **inputs).last_hidden_state)
    repacked = model(torch.cat([ids[4:], ids[:4]])[None], **swapped).last_hidden_state
    torch.testing.assert_close(torch.cat([repacked[:, 5:], repacked[:, :5]], 1), noisy)


def test_every_layer_has_its_own_masks():
    query, value = torch.zeros(1, 1, 16, 16), torch.eye(16)[None, None]
    packed = PackedAttention(torch.tensor([0, 16]), torch.tensor([7]), dropout_p=0.3)
    layers = [SimpleNamespace(training=True, layer_idx=i) for i in (0, 1, 1)]
    a, b, c = (packed_attention_forward(layer, query, query, value, None, packed=packed)[0] for layer in layers)
    assert a.shape == (1, 16, 1, 16)
    assert torch.equal(b, c) and not torch.equal(a, b)


def test_gradient_checkpointing_keeps_the_masks():
    register()
    ids = torch.randint(1, 97, (9,))
    inputs = packed_inputs([4, 5], seeds_S=torch.tensor([1, 2]), dropout_p=0.3)
    gradients = []
    for checkpointing in (False, True):
        model = build("Llama", "l2v", causal=False).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids[None], **inputs).last_hidden_state.square().sum().backward()
        gradients.append(model.embed_tokens.weight.grad)
    assert torch.equal(*gradients)


def test_errors_say_what_to_do():
    register()
    model, ids = build("Llama", "l2v", causal=False), torch.randint(1, 97, (1, 4))
    inputs = packed_inputs([4])
    with pytest.raises(ValueError, match="packed=PackedAttention"):
        model(ids)
    with pytest.raises(ValueError, match="one sequence"):
        model(ids.expand(2, 4), **inputs)
    with pytest.raises(ValueError, match="takes no mask"):
        model(ids, attention_mask=torch.zeros(1, 1, 4, 4), **inputs)


def test_transformers_does_not_take_the_folder_for_the_hub_library(monkeypatch):
    """transformers asks whether a package `kernels` exists; the folder kernels/ must not answer."""
    root = Path(__file__).resolve().parents[2]
    assert not (root / "kernels" / "__init__.py").exists()
    monkeypatch.syspath_prepend(root)
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    is_kernels_available.cache_clear()
    installed = any(d.metadata["Name"] == "kernels" for d in importlib.metadata.distributions())
    assert is_kernels_available() <= installed
    # What asks while it loads, loaded once more under another name.
    for name in ("transformers.integrations.hub_kernels", "transformers.models.llama.modeling_llama"):
        spec = importlib.util.spec_from_file_location(f"{name}_again", importlib.util.find_spec(name).origin)
        monkeypatch.setitem(sys.modules, spec.name, importlib.util.module_from_spec(spec))
        spec.loader.exec_module(sys.modules[spec.name])
