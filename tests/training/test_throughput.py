"""Tokens a second, MFU and peak memory, against numbers worked out by hand."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from support.processes import finish, start_ranks
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from l2v.machine import Calibration, calibration_file, device_name
from l2v.model.lora import add_lora
from l2v.recipe import Lora
from l2v.training import throughput
from l2v.training.throughput import Throughput, linear_parameters, peak_memory, summary

CPU = torch.device("cpu")
ALONE = {"stages.simcse.from": "base", "stages.supervised.from": "base"}
# Two layers, hidden 32, 4 heads and 2 kv-heads of 8, feed-forward 64: q, k, v, o, then gate, up, down.
TINY = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64)
GEMM = 5e9


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("L2V_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def calibrated():
    """This CPU, as if `l2v doctor` had found 5 GFLOP/s in fp32."""
    file = calibration_file(CPU, torch.float32)
    file.parent.mkdir(parents=True)
    found = Calibration(device_name(CPU), torch.__version__, "float32", GEMM, 1e9, "2025-01-01T00:00:00+00:00")
    file.write_text(json.dumps(dataclasses.asdict(found)))


def tiny(config: dict, **changes) -> nn.Module:
    return AutoModel.from_config(AutoConfig.for_model(**config | changes))


def test_n_is_the_linear_layers_without_embeddings_and_adapters(tiny_config):
    model = tiny(tiny_config)
    assert linear_parameters(model) == TINY
    assert linear_parameters(tiny(tiny_config, vocab_size=9000)) == TINY
    adapted = add_lora(model, Lora(r=4), base_name="tiny", seed=0)
    assert linear_parameters(adapted) == TINY


def test_n_of_convolutions_that_are_linear_layers():
    """GPT-2 writes its linear layers as Conv1D: 4 E x E of attention and 8 E x E of the feed-forward, a layer."""
    model = tiny({"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 50, "n_positions": 16})
    assert linear_parameters(model) == 3 * 12 * 32 * 32


def test_n_is_that_of_the_layer_however_its_weight_is_stored(tiny_config):
    """In 4 bits a weight has half as many bytes as the layer has weights; under ZeRO-3 a rank holds nothing of it."""
    model = tiny(tiny_config)
    for layer in model.layers:
        layer.mlp.up_proj.weight = nn.Parameter(torch.zeros(32 * 64 // 2, 1, dtype=torch.uint8), requires_grad=False)
        layer.mlp.down_proj.weight = nn.Parameter(torch.empty(0))
    assert linear_parameters(model) == TINY


def test_no_n_where_tokens_go_through_some_of_the_weights(tiny_config):
    experts = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    assert linear_parameters(tiny(tiny_config | experts)) is None
    model = tiny(tiny_config)
    model.layers[0].mlp.unknown = nn.ParameterList([nn.Parameter(torch.zeros(32, 64))])
    assert linear_parameters(model) is None


@pytest.fixture
def clock(monkeypatch):
    """clock.now is the time."""

    class Clock:
        now = 100.0

        def __call__(self):
            return self.now

    found = Clock()
    monkeypatch.setattr(throughput.time, "perf_counter", found)
    return found


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("flops", [4, 6], ids=["LoRA", "all weights"])
def test_rows_by_hand(tiny_config, calibrated, clock, world, flops):
    model = tiny(tiny_config)
    decoder = add_lora(model, Lora(), base_name="x", seed=0) if flops == 4 else model
    speed = Throughput(decoder, CPU, torch.float32, world=world, tokens=50)
    clock.now += 2
    assert speed.row(2050) == {"tokens_per_second": 1000.0, "mfu": round(1000 * flops * TINY / (world * GEMM), 4)}
    with speed.paused():
        clock.now += 60
    clock.now += 0.5
    assert speed.row(2550)["tokens_per_second"] == 1000.0, "what is paused takes no time"


def test_against_the_makers_peak(tiny_config, clock, monkeypatch):
    monkeypatch.setattr(throughput, "device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    speed = Throughput(tiny(tiny_config), CPU, torch.bfloat16, world=2)
    clock.now += 1
    assert speed.row(10**9) == {"tokens_per_second": 1e9, "mfu_peak": round(1e9 * 6 * TINY / (2 * 312e12), 4)}


def test_what_is_not_known_is_left_out(tiny_config, calibrated, clock):
    clock.now += 1
    other_dtype = Throughput(tiny(tiny_config), CPU, torch.bfloat16, world=1)
    experts = tiny(tiny_config | {"model_type": "mixtral", "num_local_experts": 4})
    for speed in (other_dtype, Throughput(experts, CPU, torch.float32, world=1)):
        assert set(speed.row(10)) == {"tokens_per_second"}


def test_peak_memory_of_a_process_is_the_systems():
    status = Path("/proc/self/status").read_text()
    resident = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    assert peak_memory(CPU) == pytest.approx(resident, rel=0.02)


def test_the_bar_tells_it():
    row = {"loss": 2.10341, "tokens_per_second": 21034.4}
    assert summary(row) == "loss 2.1034, 21,034 tokens/s"
    assert summary(row | {"mfu": 0.754, "mfu_peak": 0.6}) == "loss 2.1034, 21,034 tokens/s, MFU 75%"
    assert summary(row | {"mfu_peak": 0.6}) == "loss 2.1034, 21,034 tokens/s, MFU 60% of the peak"


def expected(stage: str, folder: Path, tokenizer: str, limit: int | None = None) -> int:
    """Tokens of all examples of a stage (or of the first `limit`), from the texts themselves."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    name = {"mntp": "documents", "simcse": "sentences", "supervised": "pairs"}[stage]
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()[:limit]]
    if stage == "supervised":
        texts = [text for row in rows for text in (row["query"], row["positive"], *row["negatives"])]
    else:
        texts = [row["text"] for row in rows] * (2 if stage == "simcse" else 1)
    return sum(len(ids) for ids in tokenizer(texts)["input_ids"])


@pytest.mark.parametrize(("stage", "batch"), [("mntp", 64), ("simcse", 40), ("supervised", 24)])
def test_a_step_over_everything_counts_every_token_once(
    run_here, tiny_recipe, tmp_path, bos_tokenizer_folder, calibrated, stage, batch
):
    """Both views of SimCSE; query, positive and negatives; the tokens of many micro-batches."""
    recipe = tiny_recipe(tmp_path, **ALONE, **{f"stages.{stage}.micro_tokens": 256})
    run_here(recipe, "--stage", stage, f"batch={batch}", "steps=2")
    rows = [json.loads(line) for line in (tmp_path / "run" / stage / "metrics.jsonl").read_text().splitlines()]
    tokens = expected(stage, tmp_path, bos_tokenizer_folder)
    assert [row["tokens"] for row in rows] == [tokens, 2 * tokens]
    for row in rows:
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * 4 * TINY / GEMM, abs=6e-5) and row["mfu"] > 0
        assert "mfu_peak" not in row and 0.1 < row["peak_memory_gib"] < 64


def test_two_ranks_count_together(tiny_recipe, tmp_path, bos_tokenizer_folder):
    """Three examples, one a micro-batch: the second micro-batch of one rank is empty, and what fills it does not count."""
    data = {"path": str(tmp_path / "pairs.jsonl"), "limit": 3}
    recipe = tiny_recipe(tmp_path, **ALONE, **{"stages.supervised.data": data, "stages.supervised.micro_tokens": 96})
    finish(start_ranks([[recipe, "--stage", "supervised", "batch=3", "steps=1"]] * 2))
    row = json.loads((tmp_path / "run" / "supervised" / "metrics.jsonl").read_text())
    assert row["tokens"] == expected("supervised", tmp_path, bos_tokenizer_folder, limit=3) and "mfu" not in row
