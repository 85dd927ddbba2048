"""The proof of a base: what it passes, what it sends to a slower path, and the breaches it catches."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from l2v import Encoder
from l2v.batch import Segment, pack
from l2v.errors import Notice, RecipeError, UserError
from l2v.model import export_proof
from l2v.model import proof as proofs
from l2v.model.export_proof import keys_to_state, save_weights
from l2v.model.load import inner_model, load_model, proof_of
from l2v.model.packed import PackedDecoder
from l2v.model.path import ForwardPath, set_path
from l2v.model.proof import PATHS, check_model, measure, prove, prove_model
from l2v.model.settings import drop_nothing, set_attention
from l2v.model.small import small_model
from l2v.recipe import Base

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA = AutoConfig.for_model("llama", **SHAPE)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("L2V_CACHE", str(tmp_path / "cache"))


def small(config, *, causal: bool = False):
    model = small_model(config)
    set_attention(model, causal=causal)
    drop_nothing(model)
    return model


def paths(backend: str = "l2v") -> list[ForwardPath]:
    return [ForwardPath(*each) for each in PATHS[backend]]


class Leaks(nn.Module):
    """A convolution over the sequence beside a layer's MLP, as hybrid bases have: it knows no borders."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp(x) + 0.1 * nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


def test_a_leaking_layer_is_caught_and_a_row_a_text_passes():
    model = small(AutoConfig.for_model("qwen2", **SHAPE))
    model.layers[1].mlp = Leaks(model.layers[1].mlp)
    proof = prove_model(model, paths(), causal=False, layers="plain")
    assert proof.path == ForwardPath("padded", "l2v") and not proof.refused
    assert "change by" in proof.slower and "with the texts beside it" in proof.slower
    assert "a row of its own" in proof.note()
    refused = prove_model(model, paths()[:1], causal=False, layers="plain")
    assert "with the texts beside it" in refused.refused


class LooksAhead(Leaks):
    """A layer that sees what comes behind a text, and so also the padding."""

    def forward(self, x):
        return self.mlp(x) + 0.1 * nn.functional.pad(x, (0, 0, 0, 1))[:, 1:]


def test_where_padding_leaks_only_texts_of_one_length_run_together():
    model = small(LLAMA)
    model.layers[0].mlp = LooksAhead(model.layers[0].mlp)
    proof = prove_model(model, paths(), causal=False, layers="plain")
    assert proof.path == ForwardPath("rows", "eager") and not proof.refused and proof.apart <= 1e-5


@pytest.mark.parametrize("backend", ["l2v", "sdpa"])
def test_a_dropped_sink_is_caught(backend, monkeypatch):
    """gpt-oss: sinks in the softmax. An attention that ignores them is not the base's."""
    config = AutoConfig.for_model("gpt_oss", **SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=64)
    proof = measure(config, backend=backend, causal=False)
    assert proof.path == ForwardPath("padded", "eager") and proof.eager <= 1e-5
    from l2v_kernels.integrations import transformers as integration

    if backend == "l2v":
        assert "attention sinks" in proof.slower
        monkeypatch.setattr(integration, "CHANGES_SCORES", {})  # an attention that drops what it does not know
        dropped = prove_model(small(config), paths()[:1], causal=False)
        assert "off transformers' own eager attention" in dropped.refused


def test_a_dropped_softcap_and_a_dropped_window_are_caught(monkeypatch):
    from l2v.model.fused import stack
    from l2v_kernels.integrations import transformers as integration

    config = AutoConfig.for_model("gemma2", **SHAPE, head_dim=8)
    proof = measure(config, backend="l2v", causal=False)
    assert proof.path.layout == "packed" and proof.fused
    for where, layers in ((integration, "plain"), (stack, "fused")):
        real = where.attention
        for name in ("softcap", "window"):
            without = lambda *a, name=name, real=real, **k: real(*a, **k | {name: None})  # noqa: E731
            monkeypatch.setattr(where, "attention", without)
            refused = prove_model(small(config), paths()[:1], causal=False, layers=layers).refused
            assert refused and "off transformers' own eager attention" in refused, (layers, name)
        monkeypatch.setattr(where, "attention", real)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_causal_layer_is_caught(family):
    """One layer that lets no state see what comes behind, among others that do."""
    model = small(AutoConfig.for_model(family, **SHAPE))
    attention = model.layers[1].self_attn
    real = attention.forward

    def causal(hidden_states, *args, attention_mask=None, **kwargs):
        t = hidden_states.shape[1]
        mask = torch.full((t, t), float("-inf")).triu(1)[None, None]
        return real(hidden_states, *args, attention_mask=mask, **kwargs)

    attention.forward = causal
    proof = prove_model(model, paths(), causal=False, layers="plain")
    assert "layer 1 " in proof.refused and "sees" not in proof.refused and "lets no state see" in proof.refused
    assert "attention: causal" in proof.refused


def test_a_causal_fused_layer_is_caught(monkeypatch):
    """The path itself looks the wrong way: transformers does not, so they differ."""
    real = PackedDecoder.__init__
    monkeypatch.setattr(PackedDecoder, "__init__", lambda self, *a, **k: real(self, *a, **k | {"causal": True}))
    proof = prove_model(small(LLAMA), paths()[:1], causal=False)
    assert "off transformers' own eager attention" in proof.refused


def test_dropout_of_the_architecture_is_off_and_another_random_layer_seen(monkeypatch):
    """GPT-2 brings dropout of 0.1; two forwards of a step (gradient cache) would differ."""
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=4, vocab_size=96)
    assert config.resid_pdrop > 0 and measure(config, backend="l2v", causal=False).random is None
    monkeypatch.setattr(proofs, "drop_nothing", lambda model: None)
    proof = measure(config, backend="l2v", causal=False)
    assert proof.random > 1e-3 and not proof.refused


def test_a_setting_that_is_no_dropout_stays():
    """Phi's mixture of experts reads its jitter in evaluation too."""
    model = small_model(AutoConfig.for_model("phimoe", **SHAPE, num_local_experts=4))
    before = model.layers[0].mlp.router_jitter_noise if hasattr(model.layers[0].mlp, "router_jitter_noise") else 0.01
    drop_nothing(model)
    after = [v for m in model.modules() for k, v in vars(m).items() if k == "router_jitter_noise"]
    assert after and all(v == before for v in after)


@pytest.mark.parametrize(("family", "states"), [("stablelm", "eager"), ("llama", None), ("gpt2", None)])
def test_an_export_that_transformers_would_read_causally_states_its_attention(family, states, tmp_path):
    """StableLM under SDPA looks at its module's flag, not at the configuration."""
    base = Base(model="x", init="random", config=SHAPE | {"model_type": family, "initializer_range": 0.3})
    packed = PackedDecoder(inner_model(load_model(base, head=False, dtype=torch.float32))).eval()
    keys = keys_to_state(packed)
    assert keys == {"is_causal": False, "use_bidirectional_attention": True} | (
        {"_attn_implementation": states} if states else {}
    )
    save_weights(packed.decoder, tmp_path, keys)
    plain = AutoModel.from_pretrained(tmp_path).eval()
    ids = np.arange(5, 21)
    with torch.no_grad():
        expected = packed(pack([Segment(ids)]), "hidden")
        torch.testing.assert_close(plain(torch.from_numpy(ids)[None])[0][0], expected, atol=1e-5, rtol=1e-5)


def test_an_export_that_would_compute_something_else_is_refused(monkeypatch):
    base = Base(model="x", init="random", config=SHAPE | {"model_type": "llama"})
    packed = PackedDecoder(inner_model(load_model(base, head=False, dtype=torch.float32))).eval()
    monkeypatch.setattr(
        export_proof,
        "save_weights",
        lambda model, folder, keys: save_weights(model, folder, {"is_causal": True}),
    )
    with pytest.raises(UserError, match="cannot be exported: plain transformers would compute something else"):
        keys_to_state(packed)


def test_the_first_use_is_measured_and_the_next_read(monkeypatch, tmp_path):
    first = prove(LLAMA, backend="l2v", causal=False)
    assert first.fused and first.path == ForwardPath("packed", "l2v")
    measured = []
    monkeypatch.setattr(proofs, "measure", lambda *a, **k: measured.append(k) or first)
    assert prove(LLAMA, backend="l2v", causal=False) == first and not measured
    for change in ({"backend": "sdpa"}, {"causal": True}, {"layers": "plain"}):
        prove(LLAMA, **{"backend": "l2v", "causal": False} | change)
    other = AutoConfig.for_model("llama", **SHAPE | {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}})
    prove(other, backend="l2v", causal=False)
    assert len(measured) == 4
    monkeypatch.setattr(proofs.transformers, "__version__", "0.0")
    prove(LLAMA, backend="l2v", causal=False)
    assert len(measured) == 5
    for file in (tmp_path / "cache" / "proofs").glob("*.json"):
        file.write_text("{")
    prove(LLAMA, backend="l2v", causal=False)
    assert len(measured) == 6, "a damaged file is measured again"


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (MemoryError("room"), False),
        (OSError("disk"), False),
        (ImportError("half"), False),
        (ValueError("shape"), True),
    ],
)
def test_what_may_be_gone_at_the_next_use_is_not_kept(monkeypatch, tmp_path, error, kept):
    """The packed path fails with an error and a row a text passes: slower, and only kept where the error will stay."""
    attempt = proofs._try

    def fails_packed(model, path, *args, **kwargs):
        if path.layout == "packed":
            raise error
        return attempt(model, path, *args, **kwargs)

    monkeypatch.setattr(proofs, "_try", fails_packed)
    found = prove(LLAMA, backend="l2v", causal=False)
    assert found.path.layout == "padded" and str(error) in found.slower and found.lasting == kept
    monkeypatch.setattr(proofs, "_try", attempt)
    assert prove(LLAMA, backend="l2v", causal=False).path.layout == ("padded" if kept else "packed")


def test_a_refusal_by_an_error_is_not_kept_and_one_by_values_is(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(proofs, "_reference", lambda *_: [][0])
        assert "transformers itself" in prove(LLAMA, backend="l2v", causal=False).refused
    assert prove(LLAMA, backend="l2v", causal=False).refused is None
    with monkeypatch.context() as patched:
        patched.setattr(proofs, "_try", lambda *_, **__: "a text's states change by 1 with the texts beside it")
        assert prove(LLAMA, backend="sdpa", causal=False).refused
    assert prove(LLAMA, backend="sdpa", causal=False).refused, "measured: kept"


HYBRIDS = {
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"], "num_experts": 4, "num_experts_per_tok": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2}
    | {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "mamba_n_groups": 1},
}


@pytest.mark.parametrize("family", HYBRIDS)
def test_training_of_a_hybrid_depends_on_no_neighbour(family):
    """Gradients and dropout too: a batch's are the sum of those of its texts alone, also where layers are recomputed."""
    from l2v.model.lora import add_lora
    from l2v.recipe import Lora

    base = Base(model=family, init="random", config=SHAPE | {"model_type": family} | HYBRIDS[family])
    model = load_model(base, head=False, dtype=torch.float32, seed=1)
    names = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers." in n}
    targets = sorted(names & {"q_proj", "k_proj", "in_proj", "out_proj", "o_proj", "w1", "in_proj_qkvz"})
    decoder = add_lora(inner_model(model), Lora(r=4, alpha=8, dropout=0.2, targets=targets), base_name=family, seed=1)
    packed = PackedDecoder(decoder, attention_dropout=0.2).train()
    assert packed.path.layout == "padded" and packed.path.attention == "l2v"
    generator = np.random.default_rng(0)
    texts = [Segment(generator.integers(3, 96, n), example=i) for i, n in enumerate((9, 4, 13, 9, 2, 5))]

    def gradients(batches):
        packed.zero_grad()
        for batch in batches:
            packed(pack(batch, seed=3), "vectors").square().sum().backward()
        return [p.grad.clone() for p in packed.parameters() if p.grad is not None]

    apart = gradients([[text] for text in texts])
    for how in ("none", "layer"):
        packed.set_recompute(how)
        for a, b in zip(gradients([texts]), apart, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5 * max(1.0, float(b.abs().max())), rtol=1e-4)
    packed.as_units()  # as ZeRO 3 has it: one forward a batch
    for a, b in zip(gradients([texts]), apart, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * max(1.0, float(b.abs().max())), rtol=1e-4)


ENCODERS = {
    "bert": {},
    "roberta": {"pad_token_id": 1, "bos_token_id": 0, "max_position_embeddings": 64},
    "xlm-roberta": {"pad_token_id": 1, "bos_token_id": 0, "max_position_embeddings": 64},
    "modernbert": {
        "local_attention": 8,
        "global_attn_every_n_layers": 2,
        "layer_types": None,
        "cls_token_id": 1,
        "sep_token_id": 2,
    },
    "eurobert": {},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
}


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_packed_equals_transformers(family):
    config = SHAPE | ENCODERS[family] | {"model_type": family}
    model = inner_model(load_model(Base(model=family, init="random", config=config), head=False, dtype=torch.float32))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    packed = PackedDecoder(model).eval()
    assert packed.path == ForwardPath("packed", "l2v")
    generator = np.random.default_rng(0)
    texts = [generator.integers(3, 96, n) for n in (7, 1, 33, 12)]
    with torch.no_grad():
        states = packed(pack([Segment(ids) for ids in texts]), "hidden").split([len(ids) for ids in texts])
        model.set_attn_implementation("eager")
        for ids, got in zip(texts, states, strict=True):
            ids = torch.from_numpy(ids)[None]
            expected = model(input_ids=ids, attention_mask=torch.ones_like(ids))[0][0]
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_text_beyond_the_learned_positions_is_a_sentence():
    config = SHAPE | ENCODERS["xlm-roberta"] | {"model_type": "xlm-roberta"}
    base = Base(model="x", init="random", config=config)
    packed = PackedDecoder(inner_model(load_model(base, head=False, dtype=torch.float32))).eval()
    packed(pack([Segment(np.full(62, 5))]), "hidden")
    with pytest.raises(UserError, match="63 tokens, and the base has 62 learned positions"):
        packed(pack([Segment(np.full(63, 5))]), "hidden")


def test_rotary_positions_that_depend_on_the_longest_text_have_a_limit():
    """Phi-3's longrope takes other factors for a whole batch once one text is long, so its neighbours would change."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = SHAPE | {"model_type": "phi3", "original_max_position_embeddings": 32, "rope_parameters": rope}
    packed = PackedDecoder(
        inner_model(load_model(Base(model="x", init="random", config=config), head=False, dtype=torch.float32))
    )
    packed(pack([Segment(np.full(32, 5)), Segment(np.full(7, 5))]), "hidden")
    with pytest.raises(
        UserError, match="33 tokens, and beyond 32 the rotary positions of this base depend on the longest text"
    ):
        packed(pack([Segment(np.full(33, 5)), Segment(np.full(7, 5))]), "hidden")


@pytest.mark.parametrize(
    ("family", "change", "head", "error", "says"),
    [
        ("bert", {}, True, RecipeError, "is an encoder.* MNTP"),
        ("t5", {"d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 2}, False, UserError, "an encoder and a decoder"),
        ("mamba", {"state_size": 8}, False, UserError, "the last token|its last token never moves the first state: Mamba"),
        ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4}, False, UserError,
         "layer 0 .GPTNeoBlock. lets no state see the tokens behind it"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_a_sentence(family, change, head, error, says):
    base = Base(model="it", init="random", config=SHAPE | change | {"model_type": family})
    with pytest.raises(error, match=says) as found:
        load_model(base, head=head, dtype=torch.float32)
    assert "\n" not in str(found.value)


def test_causal_is_refused_where_attention_sees_both_ways_and_served_where_it_cannot():
    with pytest.raises(UserError, match="sees both ways"):
        base = Base(model="bert", init="random", config=SHAPE | {"model_type": "bert"}, attention="causal")
        load_model(base, head=False, dtype=torch.float32)
    base = Base(model="m", init="random", config=SHAPE | {"model_type": "mamba", "state_size": 8}, attention="causal")
    model = load_model(base, head=False, dtype=torch.float32)
    assert proof_of(inner_model(model)).path.layout == "padded"


def test_llama_4_sees_beyond_its_chunks_and_its_export_too(tmp_path):
    config = SHAPE | {"model_type": "llama4_text", "num_local_experts": 2, "intermediate_size_mlp": 48, "head_dim": 8}
    config |= {"attention_chunk_size": 4, "num_hidden_layers": 4, "attn_temperature_tuning": False}
    model = inner_model(load_model(Base(model="x", init="random", config=config), head=False, dtype=torch.float32))
    packed = PackedDecoder(model).eval()
    ids = np.arange(5, 21)
    states = packed(pack([Segment(np.arange(30, 40)), Segment(ids)]), "hidden")[10:]
    moved = packed(pack([Segment(np.arange(30, 40)), Segment(np.r_[ids[:-1], 50])]), "hidden")[10:]
    assert (moved[0] - states[0]).abs().max() > 1e-6
    model.config._attn_implementation = "sdpa"
    model.save_pretrained(tmp_path)
    plain = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(torch.from_numpy(ids)[None])[0][0], states, atol=1e-5, rtol=0)


def test_the_real_model_is_looked_at_in_its_own_precision():
    base = Base(model="x", init="random", config=SHAPE | {"model_type": "llama", "initializer_range": 0.2})
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2.0**-6)):
        model = PackedDecoder(inner_model(load_model(base, head=False, dtype=dtype)), layers="plain")
        assert check_model(model, model, name="x") == tolerance
        mlp = model.decoder.layers[1].mlp
        model.decoder.layers[1].mlp = Leaks(mlp)
        with pytest.raises(UserError, match="with the texts beside it"):
            check_model(model, model, name="x")
        model.decoder.layers[1].mlp = mlp
        model.causal = True  # the attention is causal now, and causal was asked for
        check_model(model, model, name="x")
        real, asked = model._attention, model
        model._attention = lambda batch, real=real, asked=asked: (
            real(batch) | {"packed": dataclasses.replace(real(batch)["packed"], causal=not asked.causal)}
        )
        for causal, says in ((True, "moves the first state, and causal"), (False, "never moves the first state")):
            model.causal = causal
            with pytest.raises(UserError, match=says):
                check_model(model, model, name="x")


def test_an_encoder_says_that_it_is_slower(tmp_path, bos_tokenizer_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.for_model("bloom", vocab_size=300, hidden_size=32, n_layer=2, n_head=4, pad_token_id=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "b")
    AutoTokenizer.from_pretrained(bos_tokenizer_folder).save_pretrained(tmp_path / "b")
    with pytest.warns(Notice, match="each text takes a row of its own, with eager attention, slower than packed"):
        encoder = Encoder.from_pretrained(tmp_path / "b", precision="fp32")
    texts = ["Hunden løber.", "Katten sover i den lange, varme nat.", "Nej."]
    together = encoder.encode(texts)
    for text, vector in zip(texts, together, strict=True):
        assert abs(encoder.encode(text) - vector).max() < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        encoder.save(tmp_path / "out")
        assert abs(Encoder.from_pretrained(tmp_path / "out").encode(texts) - together).max() < 1e-6


def test_attention_dropout_where_transformers_computes_attention_is_refused():
    model = small(LLAMA)
    set_path(model, ForwardPath("padded", "eager"))
    with pytest.raises(RecipeError, match="set attention_dropout: 0"):
        PackedDecoder(model, attention_dropout=0.3)
    set_path(model, ForwardPath("rows", "eager"))
    with pytest.raises(RecipeError, match=r"use zero\.stage: 2"):
        PackedDecoder(model).as_units()
