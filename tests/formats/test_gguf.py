"""GGUF files of small exports: the vectors of the Encoder in llama.cpp, both directions, windows; and what is refused."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Regex, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from l2v import Encoder
from l2v.errors import UserError
from l2v.formats import gguf_engine, gguf_export
from l2v.formats.facts import Export
from l2v.formats.gguf_export import write_gguf
from l2v.formats.gguf_vocab import choose_rule

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "initializer_range": 0.1, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1, "num_hidden_layers": 2,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama_cpp():
    return pytest.importorskip("llama_cpp")


@pytest.fixture(scope="module")
def export(tmp_path_factory, bos_tokenizer_folder, tokenizer_folder):
    """export(config, bos=..., **options) -> (Encoder, folder): a random base of that configuration, exported."""

    def make(config, bos=False, length=64, **options):
        base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("export") / "encoder"
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).save_pretrained(base)
        AutoTokenizer.from_pretrained(bos_tokenizer_folder if bos else tokenizer_folder).save_pretrained(base)
        encoder = Encoder.from_pretrained(base, precision="fp32", length=length, **options)
        encoder.save(folder)
        return encoder, folder

    return make


CASES = {
    "llama": (LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE), {}),
    "causal": (LlamaConfig(**SIZES), {"attention": "causal", "pooling": "last", "bos": True}),
    "qwen2": (
        Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"} | {"vocab_size": 304}),
        {"pooling": "first"},
    ),
    "qwen3": (Qwen3Config(**SIZES), {"pooling": "last", "bos": True}),
    "gemma": (
        Gemma3TextConfig(
            **SIZES, sliding_window=8, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=16
        ),
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_gives_the_vectors_of_the_encoder(export, llama_cpp, sentences, case):
    """Also of texts beyond the window, and cut ones; the last token reaches the first state unless it was trained causal."""
    config, options = CASES[case]
    encoder, folder = export(config, **options)
    written = {each.precision: each for each in write_gguf(folder, ["f16", "q8_0"])}
    assert ("NFC" in written["f16"].note) == (case == "qwen2")  # whose tokenizer composes letters
    assert written["f16"].cosine <= 1e-3 and written["q8_0"].cosine <= 1e-2
    texts = [*sentences[20:26], "æøå 🙂", sentences[3] * 3, sentences[9] * 30]
    want = encoder.encode(texts)
    for precision, bar in (("f16", 1e-4), ("q8_0", 1e-2)):
        found = gguf_engine.encode(folder, texts, precision=precision)
        assert found.dtype == np.float32 and (1 - (found * want).sum(1)).max() < bar
    ids = list(range(20, 32))
    with gguf_engine.open_model(folder, pooling_type=llama_cpp.LLAMA_POOLING_TYPE_NONE) as model:
        first = [gguf_engine.vector(model, each)[0] for each in (ids, [*ids[:-1], 99])]
    moved = np.abs(first[0] - first[1]).max()
    assert moved == 0 if case == "causal" else moved > 1e-3


def test_the_file_states_direction_pooling_and_tokens(export, llama_cpp, sentences):
    encoder, folder = export(LlamaConfig(**SIZES), pooling="last", bos=True)
    write_gguf(folder)
    with gguf_engine.open_model(folder) as model:
        assert model.metadata["llama.attention.causal"] == "false" and model.metadata["llama.pooling_type"] == "3"
        assert model.metadata["tokenizer.ggml.add_bos_token"] == "true"
        for text in ("Blåbær og 12345 æbler!", sentences[2]):
            ids = model.tokenize(text.encode(), add_bos=True, special=True)
            assert ids == Export.read(folder).tokenizer.embedded([text])[0][0] and ids[0] == 0
            found = np.array(model.embed(text, normalize=True))  # as a user calls it: nothing else is given
            assert 1 - found @ encoder.encode(text) < 1e-4


@pytest.mark.parametrize(
    ("config", "options", "part"),
    [
        (LlamaConfig(**SIZES), {"bos": True}, "llama.cpp pools every token, and here 1 before each text are not pooled"),
        (LlamaConfig(**SIZES), {"pooling": "weighted_mean"}, "llama.cpp has no pooling 'weighted_mean'"),
        (MistralConfig(**SIZES, sliding_window=8), {}, "its window is shorter than its texts of 64 tokens"),
        (
            Qwen3Config(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}), {},
            "rotary embedding is scaled",
        ),
        (
            Gemma3TextConfig(**SIZES, sliding_window=8), {"attention": "causal"},
            "gemma-embedding has attention in both directions",
        ),
    ],
    ids=["unpooled", "pooling", "window", "rotary", "causal gemma"],
)  # fmt: skip
def test_what_llama_cpp_cannot_represent_is_named(export, llama_cpp, config, options, part):
    _, folder = export(config, **options)
    with pytest.raises(UserError) as caught:
        write_gguf(folder)
    assert str(caught.value).startswith(f"{folder}: cannot be written as GGUF: ") and part in str(caught.value)
    assert not (folder / "gguf").exists() and not [p for p in folder.parent.iterdir() if p != folder]


def test_a_tokenizer_that_llama_cpp_splits_otherwise_is_named(export, llama_cpp, tmp_path):
    _, folder = export(LlamaConfig(**SIZES))
    read = Export.read(folder)
    source = gguf_export._Source(read, AutoModel.from_pretrained(folder))
    assert choose_rule(read, source.write_vocabulary, tmp_path) == "gpt-2"
    backend = read.tokenizer.tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("."), "isolated"), backend.pre_tokenizer]
    )
    with pytest.raises(UserError, match=r"llama\.cpp would split texts into other tokens, such as '"):
        choose_rule(read, source.write_vocabulary, tmp_path)


def test_wrong_vectors_are_not_kept(export, llama_cpp, monkeypatch):
    _, folder = export(LlamaConfig(**SIZES))
    monkeypatch.setattr(
        gguf_export._Source, "_laid_out", lambda self, name, weight: weight
    )  # rotary pairs as transformers has them
    with pytest.raises(UserError, match=r"cannot be written as GGUF in f16: 1 - cosine would be 0\.\d+, above 0\.001"):
        write_gguf(folder)
    assert not (folder / "gguf").exists()


def test_other_mistakes_are_one_sentence(export, tmp_path):
    with pytest.raises(UserError, match="no GGUF precision 'q4_k'; choose from f16, q8_0"):
        write_gguf(tmp_path, ["q4_k"])
    _, folder = export(LlamaConfig(**SIZES))
    facts = json.loads((folder / "tokenizer.json").read_text())
    facts["model"] = {"type": "WordLevel", "vocab": facts["model"]["vocab"], "unk_token": "<s>"}
    (folder / "tokenizer.json").write_text(json.dumps(facts))
    from l2v.formats.gguf_vocab import rules

    with pytest.raises(UserError, match="a tokenizer of kind WordLevel; byte-pair encodings can"):
        rules(Export.read(folder))
