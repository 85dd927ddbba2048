"""Host memory of a rank while a base is loaded: the weights stay in the file, mapped, and shared by the ranks of a node."""

import json

import torch
from support.forked import output_of
from support.processes import training_environment

LOAD = """
import json, re, sys, torch
from pathlib import Path
from l2v.model.load import load_model
from l2v.recipe import Base
def told(kind):
    return int(re.search(kind + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
from transformers import AutoModelForCausalLM, LlamaConfig
before = told("VmHWM"), told("RssAnon")
model = load_model(Base(model=sys.argv[1]), head=True, dtype=torch.bfloat16)
size = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({"weights": size, "peak": told("VmHWM") - before[0], "private": told("RssAnon") - before[1]}))
"""


def test_loading_takes_a_fraction_of_the_weights(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=8000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=16, num_attention_heads=8,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shape.to_empty(device="cpu").save_pretrained(tmp_path / "base", max_shard_size="100MB")
    script = tmp_path / "load.py"
    script.write_text(LOAD)
    told = json.loads(output_of([str(script), str(tmp_path / "base")], training_environment()).splitlines()[-1])
    assert told["weights"] > 400 * 2**20
    assert told["private"] < 0.25 * told["weights"] and told["peak"] < 0.35 * told["weights"], told
