"""Training on bases that are no Llama: encoders packed, hybrids and GPT-2 a row a text; what comes of it can be used."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModel

from l2v import Encoder
from l2v.model.export_proof import save_weights

SHAPE = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.2}
BERT = SHAPE | {
    "model_type": "bert", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
LFM2 = SHAPE | {
    "model_type": "lfm2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"], "max_position_embeddings": 512,
}  # fmt: skip


def recipe(tiny_recipe, folder, config, targets, **more):
    more = {"base.config": config, "base.model": config["model_type"], "lora.targets": targets} | more
    return tiny_recipe(folder, **more | {f"stages.{stage}.from": "base" for stage in ("simcse", "supervised")})


@pytest.mark.parametrize("stage", ["supervised", "simcse"])
def test_bert_with_cls_trains_contrastive_steps(stage, tiny_recipe, run_here, tmp_path, sentences):
    path = recipe(tiny_recipe, tmp_path, BERT, ["query", "value"], **{"base.pooling": "first"})
    said = run_here(path, "--stage", stage)
    assert "done, adapter in" in said and "a row of its own" not in said  # packed
    steps = [json.loads(line) for line in (tmp_path / "run" / stage / "metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if "loss" in step]
    assert len(losses) == 4 and all(np.isfinite(losses))
    encoder = Encoder.from_pretrained(tmp_path / "run" / stage)
    base = Encoder.from_pretrained(tmp_path / "run" / stage, base_only=True)
    vectors = encoder.encode(sentences[:4])
    assert np.abs(vectors - base.encode(sentences[:4])).max() > 1e-4
    save_weights(encoder.model.decoder, tmp_path / "out", {"is_causal": False})
    plain = AutoModel.from_pretrained(tmp_path / "out").eval()
    ids, starts, _ = encoder.tokenizer.embedded(sentences[:1], None)
    with torch.no_grad():
        first = plain(torch.tensor([list(ids[0])]))[0][0, int(starts[0])].numpy()
    np.testing.assert_allclose(first / np.linalg.norm(first), vectors[0], atol=1e-5)


def test_mntp_on_an_encoder_is_refused_in_a_sentence(tiny_recipe, run_here, tmp_path):
    path = recipe(tiny_recipe, tmp_path, BERT, ["query", "value"])
    said = run_here(path, "--stage", "mntp", expect=2)
    assert "'bert' (bert) is an encoder" in said and "Traceback" not in said


def test_a_hybrid_trains_a_row_a_text_whatever_the_micro_batches(tiny_recipe, run_here, tmp_path):
    """Its loss does not depend on which texts share a forward."""
    losses = []
    for tokens in (512, 96):
        folder = tmp_path / str(tokens)
        folder.mkdir()
        more = {"stages.supervised.micro_tokens": tokens}
        path = recipe(tiny_recipe, folder, LFM2, ["q_proj", "in_proj", "w1"], **more)
        said = run_here(path, "--stage", "supervised")
        assert "each text takes a row of its own, with l2v attention" in said and "Lfm2ShortConv" in said
        steps = [
            json.loads(line) for line in (folder / "run" / "supervised" / "metrics.jsonl").read_text().splitlines()
        ]
        losses.append([step["loss"] for step in steps if "loss" in step])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
