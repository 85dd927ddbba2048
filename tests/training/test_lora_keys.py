"""Stages trained with the keys of lora: resumed to the same bits, saved as PEFT reads it, evaluated and exported as trained."""

import json
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from l2v import Encoder

NEW = ["<svar>", "Ærøskøbing"]
PATTERNS = {"lora.rank_pattern": {"v_proj": 2, "up_proj": 6}, "lora.alpha_pattern": {"o_proj": 3}}
CASES = {
    "rslora with patterns": {"lora.variant": "rslora", **PATTERNS},
    "tokens": {"lora.trainable_tokens": NEW, "lora.init": "orthogonal"},
    "dora": {"lora.variant": "dora"},
    "dora with tokens, zero 2": {"lora.variant": "dora", "lora.trainable_tokens": NEW, "zero.stage": 2},
    "a regular expression": {"lora.targets": r"layers\.1\..*(q|down)_proj"},
    "all linears": {"lora.targets": "all-linear", "lora.init": "gaussian"},
}


@pytest.fixture(scope="module")
def grown_tokenizer(tmp_path_factory, bos_tokenizer_folder):
    """Two tokens more than the base has rows."""
    folder = tmp_path_factory.mktemp("grown")
    tokenizer = AutoTokenizer.from_pretrained(bos_tokenizer_folder)
    assert tokenizer.add_tokens(NEW) == 2
    tokenizer.save_pretrained(folder)
    return str(folder)


def case(name):
    """The fast suite trains one case, and a stage of it; the slow one all of them, and a stage that starts from the first."""
    fast = pytest.param(CASES[name], ["mntp"], id=f"{name}, one stage")
    slow = pytest.param(CASES[name], ["mntp", "supervised"], id=name, marks=pytest.mark.slow)
    return [fast, slow] if name == "tokens" else [slow]


@pytest.mark.parametrize(("keys", "stages"), [each for name in CASES for each in case(name)])
def test_a_stage_with_these_keys(tmp_path, tiny_recipe, run_here, grown_tokenizer, sentences, keys, stages):
    keys = keys | ({"base.tokenizer": grown_tokenizer} if "lora.trainable_tokens" in keys else {})
    every = {f"stages.{s}.{k}": v for s in stages for k, v in {"save_every": 2, "keep": 9}.items()}
    recipe = tiny_recipe(tmp_path, **every, **keys)
    whole, broken, last = tmp_path / "run", tmp_path / "broken", stages[-1]
    for stage in stages:
        run_here(recipe, "--stage", stage)

    shutil.copytree(whole, broken)  # as a run that was killed behind step 2
    shutil.rmtree(broken / last / "adapter")
    shutil.rmtree(broken / last / "checkpoints" / "step-000004")
    assert "continues after step 2" in run_here(recipe, "--stage", last, f"out={broken}")
    file = f"{last}/adapter/adapter_model.safetensors"
    assert (broken / file).read_bytes() == (whole / file).read_bytes()

    tensors = load_file(whole / file)
    trained = [name for name in tensors if "trainable_tokens_delta" in name]
    assert bool(trained) == ("lora.trainable_tokens" in keys)
    config = json.loads((whole / last / "adapter" / "adapter_config.json").read_text())
    assert config["use_dora"] == (keys.get("lora.variant") == "dora")
    if trained:
        assert tensors[trained[0]].shape == (2, 32) and config["trainable_token_indices"] == {
            "embed_tokens": [300, 301]
        }
        assert (tensors[trained[0]][0] != tensors[trained[0]][1]).any()  # both began as the mean of all rows

    encoder = Encoder.from_pretrained(whole / last)
    texts = [*sentences[:3], "Bo i Ærøskøbing <svar>"]
    vectors = encoder.encode(texts)
    encoder.save(tmp_path / "export")
    np.testing.assert_allclose(Encoder.from_pretrained(tmp_path / "export").encode(texts), vectors, rtol=0, atol=1e-6)
    assert np.abs(vectors - Encoder.from_pretrained(whole / last, base_only=True).encode(texts)).max() > 1e-4


@pytest.mark.slow
def test_two_ranks_train_the_same_as_one(tmp_path, tiny_recipe, grown_tokenizer):
    from support.processes import finish, start_ranks

    found = []
    for ranks in (1, 2):
        keys = {
            "base.tokenizer": grown_tokenizer,
            "lora.trainable_tokens": NEW,
            "lora.variant": "dora",
            "zero.stage": ranks,
        }
        folder = tmp_path / str(ranks)
        folder.mkdir()
        finish(start_ranks([[tiny_recipe(folder, **keys), "--stage", "mntp"]] * ranks))
        found.append(load_file(folder / "run/mntp/adapter/adapter_model.safetensors"))
    assert found[0].keys() == found[1].keys()
    assert max((found[0][name] - found[1][name]).abs().max() for name in found[0]) < 1e-5


REFUSED = {
    "zero 3 and dora": (
        {"lora.variant": "dora", "zero.stage": 3},
        "lora.variant: dora and lora.trainable_tokens read weights",
    ),
    "nf4 and dora": ({"lora.variant": "dora", "base.base_precision": "nf4"}, "dora reads the base's full weights"),
    "fused and dora": ({"lora.variant": "dora", "base.layers": "fused"}, "dora runs on plain layers"),
    "an odd rank": (
        {"lora.init": "orthogonal", "lora.r": 3},
        "orthogonal halves the rank and needs even ones; lora has 3",
    ),
    "a rank in words": (
        {"lora.rank_pattern": {"q_proj": "two"}},
        "lora.rank_pattern.q_proj is 'two'; give a whole number",
    ),
    "a rank of nothing": (
        {"lora.rank_pattern": {"q_proj": 0}},
        "lora.rank_pattern.q_proj is 0; give a whole number from 1",
    ),
    "an alpha in words": ({"lora.alpha_pattern": {"q_proj": "x"}}, "lora.alpha_pattern.q_proj is 'x'; give a number"),
    "an unknown variant": ({"lora.variant": "dorra"}, "choose one of lora, rslora, dora"),
    "an unknown start": ({"lora.init": "pissa"}, "choose one of default, gaussian, orthogonal"),
    "a token twice": ({"lora.trainable_tokens": ["<s>", "<s>"]}, "names a token twice"),
    "no targets": ({"lora.targets": []}, "lora.targets is empty"),
    "an unknown token": ({"lora.trainable_tokens": ["<ukendt>"]}, "'<ukendt>' is no token of the tokenizer; add it"),
}


@pytest.mark.parametrize(("keys", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_combined_is_one_sentence(tmp_path, tiny_recipe, run_here, keys, sentence):
    said = run_here(tiny_recipe(tmp_path, **keys), "--stage", "mntp", expect=2)
    assert sentence in said and "Traceback" not in said
