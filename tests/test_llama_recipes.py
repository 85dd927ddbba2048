"""Each Llama-3 recipe, all stages, under the deepspeed launcher: the real tokenizer, a shrunken shape without weights."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.llama3 import save_tokenizer

from l2v.data.tokens import TextTokenizer, load_tokenizer
from l2v.recipe.load import load_recipe

# From Meta's own tiktoken encoding of header + "Find opskriften Rødgrød med fløde" + end of turn.
GOLDEN_IDS = [
    128000,
    128006,
    882,
    128007,
    271,
    10086,
    1200,
    4991,
    93366,
    2002,
    432,
    75820,
    911,
    75820,
    1812,
    1344,
    6282,
    451,
    128009,
]
RECIPES = ["llama3-8b-da", "ai-sweden-llama3-8b-da", "llama3-8b-en"]


@pytest.fixture(scope="session")
def llama_tokenizer(tmp_path_factory) -> str:
    """The 128,256 entries of Llama 3 from the package llama-models (the dev extra), with its BOS post-processor."""
    folder = tmp_path_factory.mktemp("llama3")
    if not save_tokenizer(folder):
        pytest.skip("llama-models is not installed (pip install 'l2v[dev]')")
    return str(folder)


def test_golden_ids_show_what_is_pooled(llama_tokenizer):
    recipe = load_recipe("llama3-8b-da")
    texts = TextTokenizer(load_tokenizer(llama_tokenizer), recipe.base.template, 64)
    ids, starts, cut = texts.embedded(["Rødgrød med fløde"], "Find opskriften")
    begin, header_start, header_end, end = 128000, 128006, 128007, 128009
    assert ids[0][:5] == [begin, header_start, 882, header_end, 271]
    assert ids[0][-1] == end and cut == 0
    decode = texts.tokenizer.decode
    assert decode(ids[0][5 : starts[0]]) == "Find opskriften"
    assert decode(ids[0][starts[0] :]) == " Rødgrød med fløde<|eot_id|>"
    assert ids[0] == GOLDEN_IDS
    plain, plain_starts, _ = texts.embedded(["Rødgrød med fløde"])
    assert decode(plain[0][plain_starts[0] :]) == "Rødgrød med fløde<|eot_id|>"
    assert texts.single("_") == 62
    assert texts.documents(["Hej"])[0][0] == begin


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_all_stages_run_under_the_launcher(name, llama_tokenizer, tmp_path, cli_environment, sentences, write_jsonl):
    documents = write_jsonl(
        tmp_path / "documents.jsonl", [{"text": " ".join(sentences[i : i + 8])} for i in range(0, 64, 8)]
    )
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in sentences[:16]])
    rows = [
        {"query": f"Hvem {s[4:]}", "positive": s, "negatives": [sentences[100 + i]], "instruction": "Find svaret"}
        for i, s in enumerate(sentences[:16])
    ]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", rows)
    grouped = load_recipe(name).stages["supervised"].group is not None
    shape = (
        "{hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2}"
    )
    overrides = [
        f"out={tmp_path / 'run'}",
        f"base.tokenizer={llama_tokenizer}",
        "base.init=random",
        f"base.overrides={shape}",
        "stages.mntp.eval_data=[]",
        f"stages.mntp.data={documents}",
        f"stages.simcse.data={texts}",
        f"stages.supervised.data.path={pairs}" if not grouped else f"stages.supervised.data={pairs}",
        *(f"stages.{stage}.{key}" for stage in ("mntp", "simcse", "supervised") for key in ("steps=3", "batch=4")),
        "stages.mntp.length=64",
        *(["stages.supervised.group=2"] if grouped else []),
    ]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "1"]
    port = ["--master_port", cli_environment["MASTER_PORT"]]
    program = str(Path(__file__).resolve().parents[1] / "launch" / "train.py")
    done = subprocess.run(
        [*launcher, *port, program, name, *overrides],
        env=cli_environment, cwd=tmp_path, text=True, timeout=600, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    for stage in ("mntp", "simcse", "supervised"):
        folder = tmp_path / "run" / stage
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert steps[-1]["step"] == 3 and math.isfinite(steps[-1]["loss"])
        assert os.path.getsize(folder / "adapter" / "adapter_model.safetensors") > 0
    lineage = json.loads((tmp_path / "run" / "supervised" / "adapter" / "lineage.json").read_text())
    assert [entry["stage"] for entry in lineage["merged"]] == ["mntp"]
    config = json.loads((tmp_path / "run" / "mntp" / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] is None and config["r"] == 16 and config["lora_alpha"] == 32
