"""The memory that `l2v plan` names, against what the code itself saves and holds: on fake tensors of real sizes, and in
Triton's interpreter.

The path of a GPU is traced unless a test says otherwise: the launching code of every kernel runs, its kernels do not.
"""

import functools
import importlib
import os
import sys

import pytest
import torch
from support.forked import KERNELS, output_of
from support.memory_trace import FakeStep, fake_ranks
from support.processes import ROOT
from support.versions import need_interpreter

from l2v.model.memory import ExecutionMode, LayerShape, activation_bytes, kept_for_backward
from l2v.objectives.contrastive import Groups
from l2v.objectives.mntp import mntp_loss_of_hidden
from l2v.plan.gpus import named
from l2v.plan.memory import Model, memory_of, weights
from l2v.recipe import LLAMA_LINEARS, Base, Lora, Mntp, Recipe, Simcse, Source, Supervised, Zero
from l2v.training.memory import engine_bytes, execution_mode, tail_memory
from l2v.training.steps import StepCounts, contrastive_step, mntp_step

LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False, "max_position_embeddings": 8192,
}  # fmt: skip
QWEN3_8B = LLAMA_8B | {
    "model_type": "qwen3", "vocab_size": 151936, "intermediate_size": 12288, "head_dim": 128,
}  # fmt: skip
GEMMA3_4B = {
    "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 1024,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
SMALL = LLAMA_8B | {
    "vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8, "num_key_value_heads": 2,
}  # fmt: skip
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def groups():
    """DeepSpeed keeps the groups of a process group that is gone."""
    yield
    if module := sys.modules.get("deepspeed.utils.groups"):
        importlib.reload(module)


def table(step: FakeStep, recompute: str, mode: ExecutionMode) -> int:
    return sum(kept_for_backward(step.shape(), recompute, mode).values())


@pytest.mark.parametrize("recompute", ["none", "cheap", "layer"])
@pytest.mark.parametrize(
    ("config", "dtype", "lora", "dropped"),
    [
        (LLAMA_8B, BF16, Lora(), 0.0),
        (LLAMA_8B, BF16, Lora(), 0.3),
        (LLAMA_8B, FP32, Lora(r=5), 0.0),
        (QWEN3_8B, BF16, Lora(r=64, targets=["q_proj", "v_proj", "down_proj"]), 0.0),
        (LLAMA_8B | {"model_type": "qwen2"}, BF16, Lora(dropout=0.0), 0.0),
        (GEMMA3_4B, BF16, Lora(), 0.3),
    ],
)
def test_a_layer_keeps_what_the_table_says(config, dtype, lora, dropped, recompute):
    """Exactly, byte for byte, at the sizes of Llama-3-8B."""
    step = FakeStep(config, dtype, head=False, lora=lora, attention_dropout=dropped)
    batch = step.batch([512, 30, 1, 200])
    assert step.kept_by_layer(batch, recompute) == [batch.tokens * table(step, recompute, ExecutionMode())] * 2


@pytest.mark.parametrize(
    ("dtype", "layers", "dropped"),
    [(BF16, "fused", 0.3), (FP32, "fused", 0.0), (BF16, "fused", 0.0), (BF16, "plain", 0.3), (BF16, "plain", 0.0)],
)
def test_without_kernels_masks_and_attention_are_kept(dtype, layers, dropped):
    """The references of a CPU, on segments of one length."""
    step = FakeStep(SMALL, dtype, kernels=False, head=False, layers=layers, attention_dropout=dropped)
    batch = step.batch([24, 24])
    mode = ExecutionMode(fused=layers == "fused", kernels=False, attention_dropout=dropped > 0, length=24)
    assert step.kept_by_layer(batch, "none")[1:] == [batch.tokens * table(step, "none", mode)]
    if layers == "fused":
        assert step.kept_by_layer(batch, "cheap")[1:] == [batch.tokens * table(step, "cheap", mode)]


def test_plain_layers_on_kernels():
    step = FakeStep(LLAMA_8B, BF16, head=False, layers="plain")
    batch = step.batch([100, 28])
    # The first layer keeps no gradient's way to its input, which is frozen: one norm and its dropout less.
    assert step.kept_by_layer(batch, "none")[1:] == [batch.tokens * table(step, "none", ExecutionMode(fused=False))]
    step = FakeStep(QWEN3_8B, BF16, head=False, layers="plain")
    assert step.kept_by_layer(step.batch([64]), "none")[1:] == [64 * table(step, "none", ExecutionMode(fused=False))]


@pytest.mark.parametrize("layers", ["fused", "plain"])
@pytest.mark.parametrize("config", [LLAMA_8B, QWEN3_8B], ids=["llama", "qwen3"])
def test_a_layer_whose_weights_are_trained(config, layers):
    step = FakeStep(config, BF16, head=False, layers=layers, trained=True)
    batch = step.batch([100, 28])
    mode = ExecutionMode(fused=layers == "fused", dropout=False)
    for recompute in ("none", "cheap") if layers == "fused" else ("none",):
        assert step.kept_by_layer(batch, recompute) == [batch.tokens * table(step, recompute, mode)] * 2


def test_the_interpreted_kernels_save_the_same():
    """A layer with the heads of Llama-3-8B, a fourth as wide, with real weights and real kernels, dropout on."""
    need_interpreter()
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests")))
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    script = ROOT / "tests" / "support" / "plan_kept_interpreted.py"
    assert output_of([str(script)], environment, KERNELS).split() == ["none", "cheap", "layer"]


def mntp(**changes) -> Mntp:
    return Mntp(**{"data": [Source("x")], "batch": 64, "steps": 10, "lr": 1e-4} | changes)


def recipe_of(stage, zero: int) -> Recipe:
    return Recipe("traced", Base("fake"), {"it": stage}, zero=Zero(stage=zero))


def model_of(step: FakeStep, fused: bool = True) -> Model:
    return Model(step.shape(), step.config.vocab_size, step.config.tie_word_embeddings, fused, None, "same")


def planned(step: FakeStep, stage, zero: int, world: int, tokens: int, length: int):
    """Everything that tensors hold at the peak, by the plan."""
    return memory_of(
        recipe_of(stage, zero), stage, model_of(step), named("h200"), itemsize=step.dtype.itemsize, dtype=step.dtype,
        world=world, tokens=tokens, length=length,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("zero", "recompute", "layers"),
    [
        (1, "cheap", 4),
        pytest.param(1, "none", 4, marks=pytest.mark.slow),
        pytest.param(1, "layer", 4, marks=pytest.mark.slow),
        (3, "cheap", 8),  # what ZeRO 3 gathers at once is a part of this size
        pytest.param(1, "cheap", 32, marks=pytest.mark.slow),
        pytest.param(0, "cheap", 8, marks=pytest.mark.slow),
        pytest.param(2, "cheap", 8, marks=pytest.mark.slow),
    ],
)
def test_peak_of_a_step_of_mntp(zero, recompute, layers):
    """Forward, backward and the optimizer, through DeepSpeed's own engine on the first of 8 ranks."""
    step = FakeStep(LLAMA_8B | {"num_hidden_layers": layers}, BF16)
    stage = mntp(recompute=recompute, micro_tokens=4096)
    batch = step.batch([512] * 8, labels=round(0.2 * 4096))
    step.model.set_recompute(recompute)
    live = step.live()
    with fake_ranks(8), step.running(), live:
        engine = step.engine(stage, zero)
        engine.train()
        for _ in range(2):  # Adam's moments come with the first
            live.peak = live.now
            mntp_step(engine, [[batch]], torch.device("cpu"))
            engine.step()
    found = planned(step, stage, zero, 8, 4096, 512)
    assert found.recompute == recompute
    assert abs(found.tensors / live.peak - 1) < 0.1, (found, live.peak)


@pytest.mark.parametrize(
    ("zero", "tied"),
    [
        (1, True),
        pytest.param(3, False, marks=pytest.mark.slow),
        pytest.param(2, False, marks=pytest.mark.slow),
        pytest.param(0, True, marks=pytest.mark.slow),
    ],
)
def test_peak_of_a_step_that_trains_all_weights(zero, tied):
    """As above; the head is trained where it is tied to the embedding."""
    step = FakeStep(LLAMA_8B | {"num_hidden_layers": 8, "tie_word_embeddings": tied}, BF16, trained=True)
    stage = mntp(recompute="cheap", micro_tokens=4096, lora=None)
    batch = step.batch([512] * 8, labels=round(0.2 * 4096))
    step.model.set_recompute("cheap")
    model = model_of(step)
    assert model.trainable == sum(p.numel() for p in step.model.parameters() if p.requires_grad)
    live = step.live()
    with fake_ranks(8), step.running(), live:
        engine = step.engine(stage, zero)
        engine.train()
        for _ in range(2):
            live.peak = live.now
            mntp_step(engine, [[batch, batch]], torch.device("cpu"))  # the second finds the gradients of the first
            engine.step()
    found = planned(step, stage, zero, 8, 4096, 512)
    assert abs(found.tensors / live.peak - 1) < 0.1, (found, live.peak)


@pytest.mark.parametrize(("stage", "recompute"), [("simcse", "none"), ("supervised", "layer")])
def test_peak_of_a_contrastive_step(monkeypatch, stage, recompute):
    """Four micro-batches of a gradient cache, on the one rank that there is."""
    common = {"data": [Source("x")], "batch": 128, "steps": 10, "lr": 1e-4, "recompute": recompute, "length": 128}
    if stage == "simcse":
        stage, dropped, columns = Simcse(**common, micro_tokens=8192), 0.3, 2
    else:
        stage, dropped, columns = Supervised(**common, micro_tokens=12288), 0.0, 3
    step = FakeStep(LLAMA_8B | {"num_hidden_layers": 2}, BF16, head=False, attention_dropout=dropped)
    step.model.set_recompute(recompute)
    micros = [step.batch([128] * 32 * columns) for _ in range(4)]
    columns_S = torch.arange(columns).repeat(128)
    groups = step.fake(Groups.from_columns(columns_S, torch.arange(len(columns_S))))  # made on the host, by values
    monkeypatch.setattr(Groups, "from_columns", lambda *_, **__: groups)
    live = step.live()
    with fake_ranks(1), step.running(), live:
        engine = step.engine(stage, 1)
        engine.train()
        for _ in range(2):
            live.peak = live.now
            contrastive_step(engine, [micros], stage, StepCounts([128 * (columns - 1)], [128]))
            engine.step()
    found = planned(step, stage, 1, 1, micros[0].tokens, 128)
    assert abs(found.tensors / live.peak - 1) < 0.1, (found, live.peak)


@pytest.mark.parametrize(("dtype", "recompute"), [(FP32, "none"), (BF16, "cheap"), (BF16, "layer")])
def test_peak_of_forward_and_backward_on_a_cpu(dtype, recompute):
    """The path without kernels, which keeps masks. With recompute: none the peak is at the end of the forward, and the plan
    counts 3.9 MB of 18.6 more than the trace: its work of the head is an upper bound."""
    step = FakeStep(SMALL, dtype, kernels=False)
    step.model.set_recompute(recompute)
    stage, batch = mntp(recompute=recompute, length=64), step.batch([64] * 4, labels=51)
    live = step.live()
    with fake_ranks(1), step.running(), live:
        before = live.now
        loss, _ = step.model(batch, "loss", functools.partial(mntp_loss_of_hidden, count=1.0))
        loss.backward()
    mode = execution_mode(stage, fused=True, kernels=False)
    end = tail_memory(stage, step.shape(), SMALL["vocab_size"], 256, 1, kernels=False)
    ratio = activation_bytes(step.shape(), recompute, 256, mode, end) / (live.peak - before)
    assert 0.95 < ratio < (1.25 if recompute == "none" else 1.15), ratio


def test_engine_bytes_by_hand():
    """1,000 adapter weights on 4 ranks: what is sharded, and in which precision."""
    bucket = {"reduce_bucket_size": 10}
    assert engine_bytes(1000, {"zero_optimization": {"stage": 0}}, 2, 4) == {
        "trained weights": 2000, "fp32 weights": 4000, "Adam's moments": 8000, "gradients": 2000,
    }  # fmt: skip
    assert engine_bytes(1000, {"zero_optimization": {"stage": 1} | bucket}, 2, 4) == {
        "trained weights": 2000, "fp32 weights": 1000, "Adam's moments": 2000, "gradients": 2000, "gradient bucket": 20,
    }  # fmt: skip
    assert engine_bytes(1000, {"zero_optimization": {"stage": 3} | bucket}, 2, 4) == {
        "trained weights": 500, "fp32 weights": 1000, "Adam's moments": 2000, "gradients": 500, "gradient bucket": 40,
    }  # fmt: skip
    offloaded = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
    found = engine_bytes(1000, offloaded, 2, 4, largest=100)
    assert found["fp32 weights"] == found["Adam's moments"] == 0 and found["one gradient on its way"] == 200
    assert found["gradient bucket"] == 2000
    larger = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 10**8}}
    assert engine_bytes(1000, larger, 2, 4)["gradient bucket"] == 2 * 10**8
    assert engine_bytes(1000, larger, 2, 4, gpu=False)["gradient bucket"] == 2000


def test_weights_by_precision_and_shards():
    shape = LayerShape(4096, 14336, 32, 8, 128, 32, targets=LLAMA_LINEARS)
    model = Model(shape, 128256, False, True, None, "same")
    assert model.linear_parameters == 6_979_321_856 and model.trainable == 41_943_040
    whole = weights(model, mntp(), 2, 1, False)
    assert sum(whole.values()) == 2 * 8_030_261_248  # Llama-3-8B has 8,030,261,248 weights
    tied = weights(Model(shape, 128256, True, True, None, "same"), mntp(), 2, 1, False)
    assert "head" not in tied and "head" not in weights(model, Simcse(data=[], batch=2, steps=1, lr=1.0), 2, 1, False)
    eighth = weights(model, mntp(), 2, 8, True)
    assert eighth["frozen layers"] == whole["frozen layers"] // 8 and eighth["gathered weights"] > 2e9
    nf4 = weights(Model(shape, 128256, False, False, "nf4", "nf4"), mntp(), 2, 1, False)
    assert 3.5e9 < nf4["frozen layers"] < 3.7e9


def test_groups_on_several_ranks_hold_the_rows_of_all():
    """On one rank a group at a time; on several a share of the batch, and the gathered rows with their gradient."""
    shape = LayerShape(4096, 14336, 32, 8, 128, 32, targets=LLAMA_LINEARS)
    grouped = Supervised(data=[], batch=512, steps=1, lr=1.0, group=128, negatives="micro", max_negatives=0)
    one, two = (tail_memory(grouped, shape, 1000, 8192, world).work for world in (1, 2))
    row = 4096 * 4
    assert two - one == 2 * row * (512 - 256) + 2 * 512 * 2 * row


def test_the_largest_that_fits_does_and_the_next_does_not():
    step = FakeStep(LLAMA_8B | {"num_hidden_layers": 32}, BF16)
    stage = mntp()
    found = planned(step, stage, 1, 1, 512, 512)
    for how, most in found.largest.items():
        stage.recompute = how
        assert most > 5000
        assert planned(step, stage, 1, 1, most, 512).fits
        assert not planned(step, stage, 1, 1, most + 256, 512).fits
