"""What an encoder takes: containers of texts, tokenizers of every habit, and the way to another process."""

import multiprocessing
import pickle
import re
import shutil

import numpy as np
import pandas
import pytest
import torch
from tokenizers import processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from l2v import Encoder
from l2v.errors import UserError


@pytest.fixture(scope="module")
def encoder(base):
    return Encoder.from_pretrained(base, precision="fp32")


@pytest.mark.parametrize(
    "container",
    [
        tuple,
        iter,
        np.array,
        lambda texts: np.array(texts, dtype=object),
        lambda texts: pandas.Series(texts, index=[9, 7, 5]),
        lambda texts: (text for text in texts),
        lambda texts: dict(enumerate(texts)).values(),
        lambda texts: pandas.DataFrame({"text": texts})["text"],
    ],
)
def test_texts_come_in_any_container_with_an_order(encoder, sentences, container):
    assert np.array_equal(encoder.encode(container(sentences[:3])), encoder.encode(sentences[:3]))


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (None, "encode takes a text or several texts; found NoneType"),
        (3.5, "encode takes a text or several texts; found float"),
        (np.array("alone"), "encode takes a text or several texts; found ndarray"),
        (b"bytes", "found bytes: decode it first"),
        ({"a", "b"}, "encode takes texts in an order, which a set has not; give a list"),
        ({"a": "b"}, "found dict: give one of its columns or its values"),
        (pandas.DataFrame({"text": ["a"]}), "found DataFrame: give one of its columns"),
        ([["find", "a text"]], "text 0 is no text; found list"),
        (np.array([["a", "b"]]), "text 0 is no text; found ndarray"),
        (["a", 1], "text 1 is no text; found int"),
        (["a", b"b"], "text 1 is no text; found bytes"),
        (pandas.Series(["a", None]), "text 1 is"),
        (torch.arange(3), "text 0 is no text; found Tensor"),
    ],
)
def test_what_holds_no_texts_is_named(encoder, texts, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        encoder.encode(texts)


def random_base(folder, tokenizer, family, **shape):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4} | shape
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=300, num_key_value_heads=2, pad_token_id=2, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "shape"),
    [("llama", {"tie_word_embeddings": True}), ("qwen3", {"head_dim": 8}), ("phi3", {}), ("gemma", {"head_dim": 8})],
)
def test_an_encoder_is_pickled_with_its_weights(tmp_path, bos_tokenizer_folder, sentences, family, shape):
    encoder = Encoder.from_pretrained(random_base(tmp_path, bos_tokenizer_folder, family, **shape), precision="fp32")
    encoder.max_length = 7
    with pytest.warns(UserWarning, match="were cut"):
        vectors = encoder.encode(sentences[:4])
    again = pickle.loads(pickle.dumps(encoder))
    with pytest.warns(UserWarning, match="were cut"):
        assert np.array_equal(again.encode(sentences[:4]), vectors)
    assert (again.model.fused is None) == (encoder.model.fused is None)
    assert again.lineage == encoder.lineage and again.max_length == 7
    with pytest.warns(UserWarning, match="were cut"):
        assert np.array_equal(encoder.encode(sentences[:4]), vectors)  # the one that was pickled still works


@pytest.mark.slow
def test_an_encoder_works_in_the_processes_of_a_pool(encoder, sentences):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        parts = pool.map(encoder.encode, [sentences[:3], sentences[3:7]])
    np.testing.assert_allclose(np.concatenate(parts), encoder.encode(sentences[:7]), rtol=0, atol=1e-6)


def changed(base, folder, **settings):
    """The base with another tokenizer."""
    shutil.copytree(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    change = settings.pop("change", None)
    for key, value in settings.items():
        setattr(tokenizer, key, value)
    if change:
        change(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def with_eos(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )


@pytest.mark.parametrize(
    "settings",
    [{"padding_side": "left"}, {"truncation_side": "left"}, {"pad_token": None}],
    ids=["left", "cut-left", "no-pad"],
)
def test_sides_and_padding_of_a_tokenizer_do_not_matter(base, encoder, sentences, tmp_path, settings):
    other = Encoder.from_pretrained(changed(base, tmp_path / "base", **settings), precision="fp32")
    assert np.array_equal(other.encode(sentences[:5]), encoder.encode(sentences[:5]))
    other.max_length = encoder.max_length = 6
    try:
        with pytest.warns(UserWarning, match="were cut"):
            assert np.array_equal(other.encode(sentences[:5]), encoder.encode(sentences[:5]))
    finally:
        encoder.max_length = 512


def test_bos_and_eos_of_a_tokenizer_stay_when_a_text_is_cut(base, sentences, tmp_path):
    other = Encoder.from_pretrained(changed(base, tmp_path / "base", change=with_eos), precision="fp32", length=8)
    ids, starts, cut = other.tokenizer.embedded(sentences[:2])
    assert cut == 2 and all(len(each) == 8 and each[0] == 0 and each[-1] == 1 for each in ids) and starts == [1, 1]


def test_more_tokens_than_the_embedding_has_rows_are_refused(base, tmp_path):
    folder = changed(base, tmp_path / "base", change=lambda tokenizer: tokenizer.add_tokens(["ny", "nyere"]))
    with pytest.raises(UserError, match=r"has 2 tokens \(such as 'nyere', id 301\) .*lora.trainable_tokens"):
        Encoder.from_pretrained(folder)
