"""A sentence-transformers model as a base: its own vectors, or one sentence."""

import json

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Dense, Normalize, Pooling, Transformer

from l2v import Encoder
from l2v.errors import UserError
from l2v.recipe import Base
from l2v.runs.published import _direction
from l2v.training.stage import _unlike_published

NESTED = {"all": "Find ", "query": "Find svaret: ", "document": "Find et svar: "}
PROMPTS = {"query": "Find svaret: ", "passage": "Et svar: "}


def publish(base, folder, pooling, *more, prompts=None, default=None, include=True, length=None):
    """The base as a sentence-transformers model, saved by sentence-transformers."""
    body = Transformer(str(base), max_seq_length=length)
    modules = [body, Pooling(32, pooling_mode=pooling, include_prompt=include), *more]
    SentenceTransformer(modules=modules, prompts=prompts, default_prompt_name=default, device="cpu").save(str(folder))
    return folder


CASES = {
    "mean": {"pooling": "mean"},
    "mean, normalised": {"pooling": "mean", "normalize": True},
    "last token": {"pooling": "lasttoken", "normalize": True},
    "first token": {"pooling": "cls"},
    "weighted": {"pooling": "weightedmean"},
    "prompts in the pooling": {"pooling": "mean", "prompts": PROMPTS},
    "prompts outside": {"pooling": "mean", "prompts": PROMPTS, "include": False},
    "weighted with prompts": {"pooling": "weightedmean", "prompts": PROMPTS},
    "a default prompt": {"pooling": "lasttoken", "prompts": NESTED, "default": "all"},
    "a default prompt outside": {"pooling": "mean", "prompts": NESTED, "default": "all", "include": False},
    "short": {"pooling": "mean", "length": 7},
}


@pytest.mark.filterwarnings("ignore:.*were cut")
@pytest.mark.parametrize(
    "bidirectional", [pytest.param(False, marks=pytest.mark.slow), True], ids=["causal", "bidirectional"]
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_its_vectors_are_those_of_sentence_transformers(base, sentences, tmp_path, case, bidirectional):
    case = dict(case)
    more = [Normalize()] if case.pop("normalize", False) else []
    folder = publish(base, tmp_path / "published", case.pop("pooling"), *more, **case)
    if bidirectional:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"is_causal": False}))
    theirs = SentenceTransformer(str(folder), device="cpu")
    ours = Encoder.from_pretrained(folder, precision="fp32")
    texts = [*sentences[:5], "gennem byens gader"]  # its first token has the space of a prompt in it
    calls = ["encode", "encode_query", "encode_document"] if "prompts" in case else ["encode"]
    for call in calls:
        want = getattr(theirs, call)(texts, show_progress_bar=False)
        np.testing.assert_allclose(getattr(ours, call)(texts), want, rtol=0, atol=1e-5, err_msg=call)
    assert ours.model.causal is not bidirectional
    if not bidirectional:
        return
    ours.save(tmp_path / "export")
    again, st = (
        Encoder.from_pretrained(tmp_path / "export"),
        SentenceTransformer(str(tmp_path / "export"), device="cpu"),
    )
    for call in calls:
        want = getattr(theirs, call)(texts, show_progress_bar=False)
        np.testing.assert_allclose(getattr(again, call)(texts), want, rtol=0, atol=1e-5, err_msg=call)
        np.testing.assert_allclose(
            getattr(st, call)(texts, show_progress_bar=False), want, rtol=0, atol=1e-5, err_msg=call
        )


def rewrite(folder, file, **keys):
    path = folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | keys))


@pytest.mark.parametrize(
    ("keys", "way"),
    [
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "bidirectional"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": False}, "causal"),
        ({"model_type": "gemma3_text", "is_causal": False}, "bidirectional"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "causal"),
    ],
)
def test_a_direction_by_a_flag_of_the_architecture(keys, way):
    """transformers makes the masks of Gemma 3 by it; Gemma 2 has the key and builds causal masks all the same."""
    assert _direction("x", keys) == way


REFUSED = {
    "max pooling": ({"pooling": "max"}, {}, "its pooling is max, and l2v has mean"),
    "two poolings": ({"pooling": ("mean", "cls")}, {}, "its pooling is mean and cls"),
    "lower case": ({"pooling": "mean"}, {"sentence_bert_config.json": {"do_lower_case": True}}, "lowers the case"),
    "code of its own": ({"pooling": "mean"}, {"config.json": {"auto_map": {"AutoModel": "x.Y"}}}, "code of its own"),
    "prompts that do not nest": (
        {"pooling": "mean", "prompts": {"all": "x", "query": "y"}, "default": "all"}, {}, "does not begin with its default",
    ),
    "an unpooled prompt, weighted": (
        {"pooling": "weightedmean", "prompts": PROMPTS, "include": False}, {}, "behind a prompt that is not pooled",
    ),
    "damaged prompts": ({"pooling": "mean"}, {"config_sentence_transformers.json": {"prompts": 3}}, "files are damaged"),
}  # fmt: skip


@pytest.mark.parametrize(("how", "files", "match"), REFUSED.values(), ids=REFUSED)
def test_what_l2v_does_not_compute_is_refused(base, tmp_path, how, files, match):
    how = dict(how)
    publish(base, tmp_path / "published", how.pop("pooling"), **how)
    for file, keys in files.items():
        rewrite(tmp_path / "published", file, **keys)
    with pytest.raises(UserError, match=match):
        Encoder.from_pretrained(tmp_path / "published")


def test_other_modules_are_refused(base, tmp_path):
    dense = Dense(32, 8, activation_function=torch.nn.Identity())
    with pytest.raises(
        UserError, match="of the modules Transformer, Pooling, Dense, and l2v has Transformer, Pooling and"
    ):
        Encoder.from_pretrained(publish(base, tmp_path / "published", "mean", dense))


@pytest.mark.parametrize("text", ["", "{", "[]", "[3]", '[{"type": 3}]'])
def test_a_damaged_list_of_modules_is_one_sentence(base, tmp_path, text):
    (publish(base, tmp_path / "published", "mean") / "modules.json").write_text(text)
    with pytest.raises(UserError):
        Encoder.from_pretrained(tmp_path / "published")


def test_an_adapter_saved_by_sentence_transformers_is_refused_as_a_base(base, tmp_path):
    folder = publish(base, tmp_path / "published", "cls")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    with pytest.raises(
        UserError, match="whose weights are an adapter; load it with sentence-transformers, or give its base"
    ):
        Encoder.from_pretrained(folder)


def test_training_says_where_a_recipe_differs_from_a_published_base(base, tmp_path):
    folder = str(publish(base, tmp_path / "published", "cls"))
    (said,) = _unlike_published(Base(model=folder))
    assert "with pooling first and causal attention; this recipe trains it with pooling mean and bidirectional" in said
    assert _unlike_published(Base(model=folder, pooling="first", attention="causal")) == []
    assert _unlike_published(Base(model=str(base))) == []
    rewrite(tmp_path / "published", "sentence_bert_config.json", do_lower_case=True)
    assert "only its transformer is trained" in _unlike_published(Base(model=folder))[0]
