"""`l2v plan`: what it tells, and what it refuses, with nothing downloaded."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from support.processes import training_environment

from l2v.commands import plan
from l2v.machine import Calibration, calibration_file, device_name
from l2v.model.memory import LayerShape
from l2v.plan import counts, estimate, gpus, measured, roofline, shapes
from l2v.plan.memory import Model
from l2v.recipe import LLAMA_LINEARS, Base, Mntp

H200 = gpus.named("h200")
BF16 = torch.bfloat16
SHAPE = LayerShape(4096, 14336, 32, 8, 128, 32, targets=LLAMA_LINEARS)
MODEL = Model(SHAPE, 128256, False, True, None, "same")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("L2V_CACHE", str(tmp_path / "cache"))


def planned(capsys, *arguments, expect=0):
    assert plan.main([*map(str, arguments), "--json"]) == expect
    return json.loads(capsys.readouterr().out)


def said(capsys, *arguments, expect=1) -> str:
    """The one sentence of a refusal."""
    assert plan.main([*map(str, arguments)]) == expect
    text = capsys.readouterr().err
    assert text.startswith("l2v: ") and len(text.strip().splitlines()) == 1, text
    return text


def test_the_shipped_recipe_on_eight_gpus(capsys):
    found = planned(capsys, "llama3-8b-da", "--gpu", "h200", "--gpus", "8")
    assert found["gpus"] == 8 and found["shape_from"] == "base.config"
    assert set(found["stages"]) == {"mntp", "simcse", "supervised"}
    stage = found["stages"]["mntp"]
    assert stage["speed"]["step_tokens"] == 32 * 512 and stage["memory"]["micro_batch_tokens"] == 4 * 512
    parts = [*stage["memory"]["standing"].values(), *stage["memory"]["moving"].values()]
    assert stage["memory"]["total"] == sum(parts) and stage["memory"]["fits"]
    assert found["hours"] == pytest.approx(sum(s["speed"]["hours"] for s in found["stages"].values()))
    assert plan.main(["llama3-8b-da", "--gpu", "h200", "--gpus", "8"]) == 0
    text = capsys.readouterr().out
    assert "not calibrated by a run on this GPU" in text and "memory of a GPU, GiB" in text
    # 4 groups of 128 keep all 8 GPUs busy; 1,024 tokens a GPU take less time than the host needs to start them.
    speeds = {name: stage["speed"] for name, stage in found["stages"].items()}
    assert all(speed["balance"] >= 0.95 and not speed["ranks_without_work"] for speed in speeds.values())
    assert speeds["supervised"]["device_share"] == 1 and speeds["supervised"]["as_fast"] is None
    on_16 = ("llama3-8b-da", "--gpu", "h200", "--gpus", "16", "--stage", "mntp")
    few = planned(capsys, *on_16)["stages"]["mntp"]["speed"]
    assert plan.main([*on_16]) == 0
    text = capsys.readouterr().out
    assert 0.3 < few["device_share"] < 0.9 and "mntp: the host is the limit, with " in text
    fewer = few["as_fast"]["gpus"]
    assert 1 < fewer < 16 and f"; {fewer} GPUs instead of 16 would be as fast, and batch=" in text
    again = planned(capsys, *on_16[:3], "--gpus", fewer, "--stage", "mntp")["stages"]["mntp"]["speed"]
    assert again["step_seconds"] <= 1.02 * few["step_seconds"]


def test_a_plan_without_lora(capsys):
    """Every weight is counted once, among what is trained, and each of them costs a third matmul."""
    arguments = ["llama3-8b-da", "--gpu", "h200", "--gpus", "8", "zero.stage=3"]
    frozen, found = (planned(capsys, *arguments, *more)["stages"] for more in ([], ["lora=null"]))
    linears = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    share = -(-(linears + 32 * 2 * 4096 + 128256 * 4096 + 4096) // 8)
    for name, stage in found.items():
        standing = stage["memory"]["standing"]
        wide = {
            "trained weights": 2 * share,
            "fp32 weights": 4 * share,
            "Adam's moments": 8 * share,
            "gradients": 2 * share,
        }
        assert {key: standing[key] for key in wide} == wide
        assert standing["gradient bucket"] == 4 * 500_000_000 and not {"frozen layers", "embeddings"} & set(standing)
        assert ("head" in standing) == (name == "mntp")
        before, now = (kind["speed"]["seconds_by_kind"] for kind in (frozen[name], stage))
        backward = 2 * linears * stage["speed"]["step_tokens"] / 8 / H200.flops[BF16]
        # The last layer of MNTP computes a fifth of the tokens after its attention.
        assert 0.97 * backward <= now["gradients of weights"] < 1.6 * backward and "gradients of weights" not in before
        speed = stage["speed"]
        assert speed["mfu"] == pytest.approx(6 * linears * speed["tokens_per_second"] / 8 / H200.flops[BF16])
    assert plan.main([*arguments, "lora=null"]) == 0
    assert "MFU (6N a token)" in capsys.readouterr().out
    text = said(capsys, "llama3-8b-da", "--gpu", "h200", "lora=null", "--stage", "mntp", expect=1)
    assert "lora instead of lora: null" in text and "nf4" not in text


def test_ranks_that_a_batch_cannot_fill_are_named(capsys):
    arguments = ("llama3-8b-da", "--gpu", "h200", "--gpus", "8", "--stage", "mntp", "batch=6")
    assert planned(capsys, *arguments)["stages"]["mntp"]["speed"]["ranks_without_work"] == 2
    assert plan.main([*arguments]) == 0
    assert "mntp: a batch of 6 is too small for 8 GPUs; 2 are idle" in capsys.readouterr().out


def test_auto_chooses_recompute_and_micro_tokens_together(capsys):
    """On 80 GB a micro-batch of 32,768 tokens fits only with whole layers recomputed; smaller ones without are faster."""
    arguments = ("llama3-8b-da", "--gpu", "h100", "--stage", "supervised")
    auto, layer = (planned(capsys, *arguments, *more)["stages"]["supervised"] for more in ((), ("recompute=layer",)))
    assert (auto["memory"]["recompute"], layer["memory"]["recompute"]) == ("none", "layer")
    assert auto["memory"]["micro_tokens"] < 16384 < layer["memory"]["micro_tokens"] == 32768
    assert auto["memory"]["fits"] and auto["memory"]["micro_batch_tokens"] <= auto["memory"]["micro_tokens"]
    assert auto["speed"]["tokens_per_second"] > 1.1 * layer["speed"]["tokens_per_second"]
    plan.main([*arguments])
    text = capsys.readouterr().out
    chosen = auto["memory"]["micro_tokens"]
    assert (
        f"supervised: recompute: auto takes micro_tokens {chosen:,} with recompute none, the fastest of at most 32,768"
        in text
    )
    # With enough memory the recipe's own value stays.
    assert planned(capsys, *arguments[:2], "h200", *arguments[3:])["stages"]["supervised"]["memory"]["fits"]


def test_a_step_costs_what_its_parts_cost():
    """16,384 tokens in segments of 512: the parts that docs/where-the-time-goes.md names, by hand."""
    clock, tokens = roofline.Clock(H200, BF16), 16384
    roofline.forward(clock, MODEL, tokens, 512, dropped=True)
    roofline.backward(clock, MODEL, tokens, 512, "none", dropped=True)
    assert clock.seconds["products with weights"] == pytest.approx(
        4 * MODEL.linear_parameters * tokens / 788e12, rel=1e-6
    )
    work = 32 * tokens * 512 * 4096 * (4 / 0.45 + 14 / 0.4)
    assert clock.seconds["attention"] == pytest.approx(work / 788e12, rel=1e-6)
    roofline.ends(clock, MODEL, Mntp(data=[], batch=1, steps=1, lr=1.0), tokens)
    head = 4 * 0.2 * tokens * 128256 * 4096 / 788e12 + 0.2 * tokens * 128256 * 16 / 4.3e12
    assert clock.seconds["head and loss"] == pytest.approx(head, rel=1e-6)
    assert 0.9 < clock.total() / 0.75 < 1.1  # seconds of the step
    again = roofline.Clock(H200, BF16)
    roofline.backward(again, MODEL, tokens, 512, "layer", dropped=True)
    forward = roofline.Clock(H200, BF16)
    roofline.forward(forward, MODEL, tokens, 512, dropped=True)
    backward = roofline.Clock(H200, BF16)
    roofline.backward(backward, MODEL, tokens, 512, "cheap", dropped=True)
    assert again.total() == pytest.approx(forward.total() + backward.total(), rel=1e-6)


def test_the_last_layer_computes_only_what_is_read():
    """A fifth of the tokens: four fifths of the last layer's matmuls after attention are saved, forward and backward."""
    seconds = []
    for read in (1.0, 0.2):
        clock = roofline.Clock(H200, BF16)
        roofline.forward(clock, MODEL, 16384, 512, dropped=True, read=read)
        roofline.backward(clock, MODEL, 16384, 512, "none", dropped=True, read=read)
        seconds.append(clock.seconds["products with weights"])
    after_attention = 4096 * 4096 + 3 * 4096 * 14336
    saved = 0.8 * 4 * after_attention * 16384 / 788e12
    # A little less, because fewer tokens fill the waves of a matmul worse.
    assert 0.9 * saved < seconds[0] - seconds[1] <= 1.001 * saved
    plain = dataclasses.replace(MODEL, fused=False)
    clocks = [roofline.Clock(H200, BF16) for _ in range(2)]
    for clock, read in zip(clocks, (1.0, 0.2), strict=True):
        roofline.forward(clock, plain, 16384, 512, dropped=True, read=read)
    assert clocks[0].total() == clocks[1].total(), "plain layers compute all"
    assert roofline.read_share(Mntp(data=[], batch=1, steps=1, lr=1.0)) == 0.2


def test_few_tokens_are_bound_by_weights_and_launches():
    clock = roofline.Clock(H200, BF16)
    roofline.forward(clock, MODEL, 8, 8, dropped=True)
    assert clock.seconds["products with weights"] == pytest.approx(2 * MODEL.linear_parameters / 4.3e12, rel=0.01)
    small = Model(LayerShape(64, 128, 4, 2, 16, 32, targets=LLAMA_LINEARS), 300, True, True, None, "same")
    clock = roofline.Clock(H200, BF16)
    roofline.forward(clock, small, 8, 8, dropped=True)
    launches, host = counts.load().micro_batch(32, True, "none")[0]
    assert clock.launches == launches and clock.total() == host > 10 * clock.device


def test_a_gpu_half_filled_by_the_last_wave_takes_longer(capsys):
    """2,048 tokens fill 97% of two waves of 132 tiles of 128 x 256, 2,200 tokens 73% of three."""
    took = []
    for tokens in (2048, 2200):
        clock = roofline.Clock(H200, BF16)
        clock.matmul(tokens, 4096, 4096)
        took.append(clock.device / (2 * tokens * 4096**2 / 788e12))
    assert took[0] == pytest.approx(1.0) and 1.2 < took[1] < 1.34


def test_host_times_are_those_of_the_counted_model():
    """A step of Llama-3-8B with one micro-batch; the update does not grow with the layers but under ZeRO 3."""
    table = counts.load()
    forward, backward = table.micro_batch(32, True, "none")
    update, half, of_zero3, half_of_zero3 = (table.update(zero, n) for zero, n in ((1, 32), (1, 16), (3, 32), (3, 16)))
    assert forward[0] + backward[0] + update[0] <= 2000, "what a step may launch"
    assert half == update and half_of_zero3[0] == pytest.approx(of_zero3[0] / 2, abs=1)
    assert 0.01 < forward[1] + backward[1] + update[1] < 0.2
    assert table.micro_batch(32, False, "layer")[1][1] > table.micro_batch(32, True, "layer")[1][1] > backward[1]


def test_a_gradient_cache_encodes_all_but_its_last_micro_batch_twice(capsys):
    arguments = ("llama3-8b-da", "--gpu", "h200", "--stage", "simcse", "recompute=cheap", "batch=512")
    one = planned(capsys, *arguments, "micro_tokens=131072", expect=1)["stages"]["simcse"]["speed"]
    four = planned(capsys, *arguments, "micro_tokens=32768")["stages"]["simcse"]["speed"]
    assert (one["micro_batches"], four["micro_batches"]) == (1, 4)
    products = [x["seconds_by_kind"]["products with weights"] for x in (one, four)]
    assert products[1] / products[0] == pytest.approx(1 + 0.75 / 2, rel=1e-3)


def test_twice_the_steps_take_twice_the_time(capsys):
    once, twice = (
        planned(capsys, "llama3-8b-da", "--gpu", "h200", "--stage", "mntp", f"steps={n}")["stages"]["mntp"]["speed"]
        for n in (100, 200)
    )
    assert twice["hours"] == pytest.approx(2 * once["hours"])
    assert twice["tokens_per_second"] == pytest.approx(once["tokens_per_second"])


def test_what_cannot_fit_says_what_would(capsys):
    more = ("llama3-8b-da", "--gpu", "rtx4090", "--stage", "mntp", "batch=128", "recompute=layer")
    text = said(capsys, *more, "micro_tokens=65536")
    assert "stage 'mntp': a micro-batch of 65,536 tokens with recompute layer needs" in text
    assert (
        "with recompute=layer, the largest that fits" in text and "with recompute=none, the fastest that fits" in text
    )
    assert "base.base_precision=nf4" in text
    found = planned(capsys, *more, "micro_tokens=65536", expect=1)
    most = found["stages"]["mntp"]["memory"]["largest_micro_tokens"]
    assert planned(capsys, *more, f"micro_tokens={most['layer']}")["stages"]["mntp"]["memory"]["fits"]


@pytest.mark.parametrize("gpu", gpus.SHEETS)
def test_every_gpu_of_the_table_can_be_planned_for(gpu, capsys):
    """A small base, so that it fits every one."""
    model = ("base.model=meta-llama/Llama-3.2-1B", "base.config=null", "base.init=pretrained")
    found = planned(capsys, "llama3-8b-da", "--gpu", gpu.upper(), "--gpus", "8", "--stage", "simcse", *model)
    assert found["gpu"] == gpu and ("not measured" in found["rates"]) == (gpu not in ("h200", "mi300x"))
    assert (found["hours"] is None) == (gpu == "mi300x")


def test_published_figures_are_ordered_as_the_boards_are():
    """Twice the FP8 rate of the dense bf16 rate wherever there is FP8, and less usable memory than printed."""
    printed = {
        "h200": 141 * 2**30, "h100": 80 * 2**30, "h20": 96 * 2**30, "a100": 80 * 2**30, "a100-40gb": 40 * 2**30,
        "b200": 192 * 2**30, "gb200": 192 * 2**30, "l40s": 48 * 2**30, "l4": 24 * 2**30, "a10": 24 * 2**30, "rtx3090": 24 * 2**30,
        "rtx4090": 24 * 2**30, "rtx5090": 32 * 2**30, "mi300x": 192 * 2**30,
    }  # fmt: skip
    assert printed.keys() == gpus.SHEETS.keys()
    for key, sheet in gpus.SHEETS.items():
        gpu, peak = gpus.named(key), gpus.peak_flops(sheet.name, BF16)
        assert 0.9 * printed[key] < gpu.memory < printed[key], key
        if sheet.fp8:
            assert sheet.fp8 == pytest.approx(2 * peak, rel=0.02), key
        assert 30 < peak / sheet.copy < 1000  # FLOPs a byte
    assert gpus.named("A100-80GB") == gpus.named("a100") and gpus.named("NVIDIA GeForce RTX 5090").key == "rtx5090"


def test_memory_is_planned_without_knowing_the_gpu(capsys):
    arguments = ("llama3-8b-da", "--stage", "mntp")
    found = planned(capsys, *arguments, "--gpu-memory", "48")
    stage = found["stages"]["mntp"]
    assert (found["gpu"], found["hours"], stage["speed"], stage["scaling"]) == ("gpu", None, None, [])
    assert stage["memory"]["capacity"] == 48 * 2**30 and "tokens_per_second" not in str(stage["other_ways"])
    assert plan.main([*arguments, "--gpu-memory", "48"]) == 0
    text = capsys.readouterr().out
    assert "memory only" in text and "tokens/s" not in text and "time" not in text.replace("times", "")
    # Of a known GPU, the memory of another variant; its speed stays.
    more = planned(capsys, *arguments, "--gpu", "h100", "--gpu-memory", "94")
    assert more["stages"]["mntp"]["memory"]["capacity"] == 94 * 2**30 and more["hours"] > 0
    said(capsys, *arguments, "--gpu-memory", "12")  # weights alone have 15 GiB


def test_a_stage_fits_only_with_the_margin(capsys):
    """The margin is 3% of the memory, at least 1 GiB; `largest` leaves it too, and the refusal names it."""
    arguments = ("llama3-8b-da", "--stage", "mntp", "recompute=layer")
    needed = planned(capsys, *arguments, "--gpu-memory", "80")["stages"]["mntp"]["memory"]["total"] / 2**30
    assert needed < 33  # so that 1 GiB is more than 3%
    for extra, code in ((1.01, 0), (0.99, 1), (0.1, 1)):
        found = planned(capsys, *arguments, "--gpu-memory", f"{needed + extra:.4f}", expect=code)
        assert found["stages"]["mntp"]["memory"]["margin"] == 2**30
    text = said(capsys, *arguments, "--gpu-memory", f"{needed + 0.5:.4f}")
    assert "GiB and a margin of 1.0 GiB, of the" in text
    large = planned(capsys, *arguments, "--gpu", "h200")["stages"]["mntp"]["memory"]
    assert large["margin"] == int(0.03 * large["capacity"]) and large["fits"]


def test_a_mixture_is_planned_as_it_is_trained(capsys, tiny_recipe, tmp_path, write_jsonl, sentences):
    """Weights, a glob, a limit: rows, epochs and tokens of a step are those that training has."""
    from l2v.data.open import open_examples
    from l2v.data.sampler import Sampler
    from l2v.data.tokens import TextTokenizer, load_tokenizer
    from l2v.recipe.load import load_recipe

    write_jsonl(tmp_path / "kort-1.jsonl", [{"text": "Hej med dig."}] * 30)
    write_jsonl(tmp_path / "kort-2.jsonl", [{"text": "Farvel."}] * 10)
    write_jsonl(tmp_path / "lang.jsonl", [{"text": " ".join(sentences[:6])}] * 50)
    data = [
        {"path": str(tmp_path / "kort-*.jsonl"), "weight": 0.5}, {"path": str(tmp_path / "lang.jsonl"), "limit": 20, "weight": 3}
    ]  # fmt: skip
    path = str(tiny_recipe(tmp_path, **{"stages.simcse.data": data, "stages.simcse.steps": 40}))
    found = planned(capsys, path, "--gpu", "h200", "--stage", "simcse")["stages"]["simcse"]
    assert (found["data"]["examples"], found["data"]["examples_an_epoch"]) == (60, 80)
    assert found["data"]["epochs"] == pytest.approx(40 / 20)
    recipe = load_recipe(path)
    stage = recipe.stages["simcse"]
    texts = TextTokenizer(load_tokenizer(recipe.base.tokenizer), recipe.base.template, stage.length)
    examples = open_examples(stage.data, stage, texts)
    sampler = Sampler(examples, batch=4, micro_tokens=512, seed=recipe.stage_seed("simcse"))
    steps = [examples.lengths[sampler.plan(step).examples].sum() for step in range(8)]
    assert found["speed"]["step_tokens"] == pytest.approx(sum(steps) / 8)
    assert plan.main([path, "--gpu", "h200", "--stage", "simcse"]) == 0
    text = capsys.readouterr().out
    assert "simcse: 60 examples, 80 in an epoch; 40 steps are 2 epochs" in text
    assert "20 examples, weight 3: 60 of 80 in an epoch (75.0%)" in text
    assert text.rstrip().splitlines()[-1] == f"Next: l2v train {path} --stage simcse"


def test_a_missing_file_is_refused(capsys, tiny_recipe, tmp_path):
    path = tiny_recipe(tmp_path, **{"stages.supervised.data": str(tmp_path / "væk.csv")})
    assert f"{tmp_path / 'væk.csv'}: file not found" in said(capsys, path, "--gpu", "h200")
    path = tiny_recipe(tmp_path, **{"stages.supervised.data": str(tmp_path / "væk-*.csv")})
    assert "væk-*.csv: no readable file matches" in said(capsys, path, "--gpu", "h200")


def test_the_machine_at_hand_is_planned_by_its_calibration(capsys, tiny_recipe, tmp_path):
    recipe = tiny_recipe(tmp_path)
    assert "run l2v doctor once" in said(capsys, recipe)
    cpu = torch.device("cpu")
    file = calibration_file(cpu, torch.float32)
    file.parent.mkdir(parents=True)
    found = Calibration(device_name(cpu), torch.__version__, "float32", 5e9, 1e9, "2025-01-01T00:00:00+00:00")
    file.write_text(json.dumps(dataclasses.asdict(found)))
    tree = planned(capsys, recipe)
    assert tree["gpu"] == "cpu" and tree["rates"] == "calibrated 2025-01-01"
    # The data is here and its tokenizer too, so lengths are real: 240 sentences cannot all have 48 tokens.
    simcse = tree["stages"]["simcse"]
    assert simcse["lengths"] == "of the data" and simcse["speed"]["step_tokens"] < 4 * 2 * 48
    assert simcse["memory"]["standing"]["CUDA and NCCL"] == 0
    assert simcse["speed"]["calibration"] == "roofline, by the rates that l2v doctor measured on this CPU"
    assert plan.main([str(recipe), "--gpus", "2"]) == 0
    text = capsys.readouterr().out
    assert "on this CPU, 2 processes" in text and "memory of a process, GiB" in text and "tokens/s and process" in text
    assert "GPU" not in text.replace("--gpus", "")


def test_shapes_come_from_a_folder_or_are_known_by_name(config_folder):
    config, source = shapes.shape_of(Base(config_folder))
    assert source == config_folder and config.hidden_size == 32
    config, source = shapes.shape_of(Base("AI-Sweden-Models/Llama-3-8B-instruct"))
    assert (config.hidden_size, config.num_key_value_heads) == (4096, 8) and "table of shapes" in source
    weights = {
        "Qwen/Qwen3-0.6B": 596_049_920, "Qwen/Qwen2-7B": 7_615_616_512, "mistralai/Mistral-7B-v0.1": 7_241_732_096,
        "meta-llama/Llama-3.2-1B": 1_235_814_400, "smollm2-135m-instruct": 134_515_008,
        "gemma-3-270m": 268_098_176,
    }  # fmt: skip
    for name, count in weights.items():  # as their makers count them
        config, _ = shapes.shape_of(Base(name))
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert sum(p.numel() for p in model.parameters()) == count, name


def test_a_layer_that_cannot_be_fused_is_said(capsys):
    assert plan.main(["llama3-8b-da", "--gpu", "h200", "--stage", "mntp", "base.layers=plain"]) == 0
    assert "plain layers, slower than fused ones: base.layers: plain" in capsys.readouterr().out


def test_measurements_of_the_training_step_correct_the_roofline(tmp_path):
    """Incomplete rows are skipped, and so are other models than Llama-3-8B."""
    row = {"workload": "mntp", "provider": "l2v", "facts": {"tokens_per_second": 15000.0, "tokens": 16384}}
    rows = [row, {"workload": "simcse", "provider": "l2v"}, {"provider": "liger"}, "?", row | {"provider": "llm2vec"}]
    file = tmp_path / "h200" / "train_step.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"facts": {"model": "8b"}, "results": rows}))
    assert measured.factors("h200", lambda row: 20000.0, tmp_path) == {"mntp": 0.75}
    file.write_text(json.dumps({"facts": {"model": "mini"}, "results": rows}))
    assert measured.factors("h200", lambda row: 20000.0, tmp_path) == {}
    assert measured.factors("h100", lambda row: 20000.0, tmp_path) == {}
    file.write_text("[]")
    assert measured.factors("h200", lambda row: 20000.0, tmp_path) == {}


def test_a_measured_gpu_is_planned_by_what_it_reached(capsys, monkeypatch):
    arguments = ("llama3-8b-da", "--gpu", "h200", "--stage", "mntp")
    plain = planned(capsys, *arguments)["stages"]["mntp"]["speed"]
    asked = []
    row = {"objective": "mntp", "tokens": 16384, "recompute": "none"}
    monkeypatch.setattr(estimate, "factors", lambda key, predict: asked.append((key, predict(row))) or {"mntp": 0.8})
    speed = planned(capsys, *arguments)["stages"]["mntp"]["speed"]
    assert speed["tokens_per_second"] == pytest.approx(0.8 * plain["tokens_per_second"])
    assert speed["calibration"] == "roofline times 0.80, as measured on this GPU"
    # What the benchmark ran is what the recipe is, but for the deviation of drawn labels.
    assert asked[0][0] == "h200" and asked[0][1] == pytest.approx(plain["tokens_per_second"], rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["llama3-8b-da", "--gpu", "h9000"],
            "choose one of h200, h100, h20, a100, a100-40gb, b200, gb200, l40s, l4, a10, rtx3090",
        ),
        (["llama3-8b-da", "--gpu", "h200", "--gpus", "0"], "--gpus and --per-node must be at least 1"),
        (
            ["llama3-8b-da", "--gpu", "h200", "base.config=null", "base.model=nobody/nothing"],
            "the shape of 'nobody/nothing' is not known: it is not a folder with a config.json",
        ),
    ],
)
def test_bad_input_is_one_sentence(arguments, says, capsys):
    assert says in said(capsys, *arguments)


def test_a_mistake_in_a_recipe_is_exit_code_2(capsys):
    assert "no recipe 'no-such-recipe'" in said(capsys, "no-such-recipe", "--gpu", "h200", expect=2)
    gpt = "base.config={model_type: gpt2, vocab_size: 100}"
    text = said(capsys, "llama3-8b-da", "--gpu", "h200", gpt, "base.init=random", expect=2)
    assert "l2v plan supports layers with the sizes of a Llama layer" in text


def test_what_comes_from_the_hub_is_named(capsys, tiny_recipe, tmp_path):
    base = ("base.model=meta-llama/Meta-Llama-3-8B", "base.config=null")
    found = planned(capsys, "llama3-8b-en", "--gpu", "h200", "--stage", "mntp", *base)["hub"]
    assert found == {"models": ["meta-llama/Meta-Llama-3-8B"], "datasets": ["Salesforce/wikitext"]}
    path = tiny_recipe(tmp_path, **{"stages.mntp.data": "hub:nogen/dansk"})
    assert plan.main([str(path), "--gpu", "h200"]) == 0
    assert "from the Hub: data set nogen/dansk (docs/deployment.md" in capsys.readouterr().out
    assert planned(capsys, path, "--gpu", "h200", "--stage", "simcse")["hub"] == {"models": [], "datasets": []}


def test_nothing_but_the_plan_is_on_the_screen(tiny_recipe, tmp_path):
    """No bar of `datasets`, no warning of a library: the data is read, in a process as a user starts it."""
    environment = training_environment() | {
        "L2V_CACHE": str(tmp_path / "cache"),
        "HF_DATASETS_CACHE": str(tmp_path / "data"),
    }
    environment.pop("HF_DATASETS_DISABLE_PROGRESS_BARS", None)
    command = [sys.executable, "-m", "l2v.commands.main", "plan", str(tiny_recipe(tmp_path)), "--gpu", "h200"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "") and "examples;" in done.stdout
