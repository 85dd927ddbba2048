"""All stages as one unmerged adapter: exact in plain PEFT, refused where it would not be."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from support.made_run import make_run
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from l2v import Encoder
from l2v.commands import main as cli
from l2v.errors import UserError
from l2v.model.load import inner_model, load_model
from l2v.model.summed_adapter import RANKS, sum_adapters
from l2v.recipe import Base
from l2v.serving.adapter import export_adapter

TEXTS = ["Hunden løber gennem skoven.", "3 æbler på Ærø", "Katten drømmer om en stille å."]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_recipe, base):
    """Three stages of different rank, scaling and targets, each from the one before."""
    given = {"base.model": str(base), "base.init": "pretrained", "base.config": None, "base.tokenizer": None}
    given |= {"base.template": {"suffix": "</s>"}, "base.pool_prompt": True, "stages.supervised.from": "simcse"}
    given["stages.mntp.lora"] = {"r": 3, "alpha": 7, "variant": "rslora"}
    given["stages.simcse.lora"] = {"r": 4, "alpha": 8, "targets": ["q_proj", "down_proj"]}
    given["stages.supervised.lora"] = {
        "r": 4,
        "alpha": 4,
        "rank_pattern": {"up_proj": 2},
        "alpha_pattern": {"v_proj": 16},
    }
    return make_run(tiny_recipe(tmp_path_factory.mktemp("stages"), **given), ("mntp", "simcse", "supervised"))


@pytest.fixture(scope="module")
def unmerged(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unmerged") / "adapter"
    return export_adapter(str(run), folder), folder


def states(model, texts: list[str], tokenizer) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(**tokenizer(text, return_tensors="pt"))[0][0] for text in texts]


def test_plain_peft_gives_the_states_of_the_merged_model_for_three_stages(run, unmerged, base, tmp_path):
    written, folder = unmerged
    assert (written.stages, written.rank, written.precision) == (3, 16, "float32") and written.entry < 1e-5
    Encoder.from_pretrained(run, precision="fp32").save(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    expected = states(AutoModel.from_pretrained(tmp_path / "merged").eval(), TEXTS, tokenizer)
    causal = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    causal.config.is_causal = False
    model = PeftModel.from_pretrained(causal, folder).eval()
    for one, other in zip(states(model.get_base_model().model, TEXTS, tokenizer), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    with model.disable_adapter():
        plain = states(model.get_base_model().model, TEXTS, tokenizer)
    assert (plain[0] - expected[0]).abs().max() > 1e-2  # the adapter does something


def test_the_file_is_one_that_vllm_takes(unmerged):
    """One rank for all modules, scaled by 1, no patterns, and the names of a language model."""
    from safetensors.torch import load_file

    written, folder = unmerged
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == written.rank and written.rank in RANKS
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]
    assert config["bias"] == "none" and not config["use_dora"] and not config["modules_to_save"]
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(
        re.fullmatch(r"base_model\.model\.model\.layers\.\d\.\w+\.\w+\.lora_[AB]\.weight", key) for key in tensors
    )
    ranks = {tensor.shape[0 if ".lora_A." in key else 1] for key, tensor in tensors.items()}
    assert ranks == {written.rank} and len(tensors) == 2 * 2 * 7


def test_l2v_loads_it_with_its_template_and_pooling(run, unmerged):
    encoder, again = (
        Encoder.from_pretrained(run, precision="fp32"),
        Encoder.from_pretrained(unmerged[1], precision="fp32"),
    )
    np.testing.assert_allclose(again.encode(TEXTS), encoder.encode(TEXTS), atol=1e-5)
    assert again.tokenizer.template == encoder.tokenizer.template and again.tokenizer.pooled == "all"


def test_one_process_serves_chat_and_vectors(run, unmerged, base, monkeypatch):
    """The code of docs/serving.md: the direction and the adapter belong to the request."""
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    space: dict = {"BASE": str(base)}
    exec(code.replace('"faq-adapter"', repr(str(unmerged[1]))), space)
    ids = torch.tensor([[0, 60, 61, 62, 63, 1]])
    alone = AutoModelForCausalLM.from_pretrained(base).eval()
    encoder = Encoder.from_pretrained(run, precision="fp32")
    with torch.no_grad():
        for _ in range(2):  # one after the other, and again
            torch.testing.assert_close(space["chat"](input_ids=ids), alone(input_ids=ids).logits, atol=1e-5, rtol=0)
            mask = torch.ones_like(ids)
            found = space["states"](input_ids=ids, attention_mask=mask)[0].mean(0)
            text = encoder.tokenizer.tokenizer.decode(ids[0, 1:-1])
            assert encoder.tokenizer.embedded([text])[0][0] == ids[0].tolist()
            expected = torch.from_numpy(encoder.encode(text))
            torch.testing.assert_close(torch.nn.functional.normalize(found, dim=0), expected, atol=1e-5, rtol=0)


def test_in_bf16_the_distance_is_printed(run, tmp_path, capsys):
    assert cli.main(["export", str(run), str(tmp_path / "out"), "--precision", "bf16", "--adapter"]) == 0
    out = capsys.readouterr().out
    found = re.search(
        r"3 adapters as one of rank 16; in bfloat16, its vectors are at most (\S+) in an entry and (\S+) in 1", out
    )
    assert found and 1e-5 < float(found[1]) < 0.1 and float(found[2]) < 0.01


def lora(**options):
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False} | options)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (lora(use_dora=True), "is DoRA"),
        (lora(init_lora_weights="pissa"), "starts from pissa"),
        (lora(init_lora_weights="olora"), "starts from olora"),
        (lora(trainable_token_indices={"embed_tokens": [5]}), "has trained tokens"),
        (lora(modules_to_save=["norm"]), "has trained modules as a whole"),
        (lora(bias="lora_only"), "has trained biases"),
        (lora(target_modules=["q_proj", "embed_tokens"]), "holds more than LoRA's matrices of linear layers"),
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "'IA3'"),
    ],
    ids=["dora", "pissa", "olora", "tokens", "modules", "bias", "embedding", "ia3"],
)
def test_what_is_no_sum_of_products_is_refused_by_name(base, tmp_path, config, why):
    inner = inner_model(load_model(Base(model=str(base)), head=False, dtype=torch.float32))
    get_peft_model(inner, config).save_pretrained(tmp_path / "one")
    fresh = inner_model(load_model(Base(model=str(base)), head=False, dtype=torch.float32))
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "one")) + f".*{why}"):
        sum_adapters([str(tmp_path / "one")], fresh)


def test_mistakes_get_a_sentence(base, run, unmerged, tmp_path, capsys):
    with pytest.raises(UserError, match="it has no adapter to export"):
        export_adapter(str(base), tmp_path / "out")
    with pytest.raises(UserError, match="it is an export already"):
        export_adapter(str(unmerged[1]), tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not empty and not an export"):
        export_adapter(str(run), tmp_path / "mine")
    for command in (["verify", str(unmerged[1])], ["push", str(unmerged[1]), "me/x"]):
        assert cli.main(command) == 1
        assert "unmerged adapter" in capsys.readouterr().err
    assert cli.main(["export", str(run), str(tmp_path / "out"), "--adapter-only", "--for", "vllm"]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]
