import json
import os
import sys
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from benchmarks.harness import Unavailable
from benchmarks.train_step import bench as benchmark
from benchmarks.train_step import peer_nemo, report
from benchmarks.train_step import runs as runs_module
from benchmarks.train_step import work as work_module
from benchmarks.train_step.peers import PROVIDERS
from benchmarks.train_step.record import Recorder, Setting, Spec
from benchmarks.train_step.record import run as run_peer
from benchmarks.train_step.report import Run
from benchmarks.train_step.runs import Runner
from benchmarks.train_step.work import MODELS, Lengths, Words, Work, Workload, texts, write_base

CPU = torch.device("cpu")
SHAPE = MODELS["mini"].shape | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TINY = replace(
    MODELS["mini"],
    shape=SHAPE,
    steps=1,
    workloads={
        "mntp": Workload("mntp", 4, 32, 256, (Lengths("document", 48, 96),)),
        "simcse": Workload("simcse", 4, 32, 256, (Lengths("sentence", 12, 24),)),
        "supervised": Workload(
            "supervised", 4, 32, 256, (Lengths("query", 8, 16), Lengths("passage", 20, 30), Lengths("passage", 20, 30))
        ),
    },
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train-step")
    write_base(TINY, folder / "base", CPU, torch.float32)
    return folder


@pytest.fixture
def runner(base, run_here, monkeypatch):
    """A Runner whose training program runs inside this process, in float32 as the peers do."""

    def finish(command, *_):
        return run_here(command[3], "base.precision=fp32", *command[4:]), ""

    monkeypatch.setattr(runs_module, "_finish", finish)
    return Runner(Work(TINY, base), CPU, benchmark.rungs(TINY), {})


def peer(runner, workload, provider, folder, batches=None):
    """The runs of a peer, in this process; on other batches than ours if they are given."""
    spec = runner._spec(Run(workload, provider, 0), folder / f"{workload}-{provider}.jsonl")
    spec.batches = batches or spec.batches
    recorder = Recorder(spec)
    PROVIDERS[provider](spec, recorder)
    found = {}
    for row in map(json.loads, recorder.file.read_text().splitlines()):
        found.setdefault(row["setting"], []).append(row)
    return found


@pytest.mark.parametrize(
    "workload", ["mntp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("simcse", "supervised"))]
)
def test_all_do_the_same_work(runner, workload, tmp_path):
    """The training program and its peers: the same tokens in the same steps, and the same first loss."""
    (ours,) = runner.run(workload, "l2v", 0, None)
    (packed,) = runner.run(workload, "packed", 0, None)
    assert ours.setting == "fused layers, recompute none" and packed.setting == "plain layers, recompute layer"
    for a, b in zip(ours.rows, packed.rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert [row["warmup"] for row in ours.rows] == [True, False] and len(ours.timed) == 1
    assert all(row["seconds"] > 0 and row["peak"] > 1 << 20 and row["places"] == row["tokens"] for row in ours.rows)

    same, batches = ours, None
    if workload == "mntp":
        # A padded peer reads across the documents of a block; so does this run.
        across = ["stages.STAGE.document_mask=false"]
        runner.rungs["across"] = across
        (same,) = runner.run(workload, "across", 0, None)
        recipe = runner.work.recipe(workload, runner.steps, [across[0].replace("STAGE", "mntp")])
        batches = tmp_path / "across.json"
        batches.write_text(json.dumps(work_module.batches(recipe, "mntp", runner.steps)))
    plain = peer(runner, workload, "transformers_peft", tmp_path, batches)
    blocks = ["no checkpointing, 2 rows at a time"] if workload == "mntp" else []
    assert list(plain) == ["no checkpointing", *blocks, "checkpointing"]
    for rows in plain.values():
        assert [row["tokens"] for row in rows] == [row["tokens"] for row in ours.rows]
        assert rows[0]["loss"] == pytest.approx(same.rows[0]["loss"], rel=1e-5, abs=1e-3)
        assert rows[0]["loss"] == pytest.approx(plain["no checkpointing"][0]["loss"], rel=1e-5, abs=1e-4)
    pads = [row["places"] - row["tokens"] for row in plain["checkpointing"]]
    assert max(pads) == 0 if workload == "mntp" else min(pads) > 0

    if workload == "mntp":
        with pytest.raises(Unavailable, match="no masked next-token prediction"):
            peer(runner, workload, "sentence_transformers", tmp_path)
        return
    rows = peer(runner, workload, "sentence_transformers", tmp_path)["no checkpointing"]
    assert [row["tokens"] for row in rows] == [row["tokens"] for row in ours.rows]
    assert not report.other_work(Run(workload, "sentence_transformers", 0, rows=rows), ours, workload)


def test_llm2vec_and_liger_say_why_not(runner, tmp_path, monkeypatch):
    (run,) = runner.run("mntp", "llm2vec", 0, None)
    assert run.skipped == "no environment with llm2vec was named (--llm2vec)"
    (run,) = runner.run("supervised", "nemo", 0, None)
    assert run.skipped == "no environment with nemo_automodel was named (--nemo)"
    with pytest.raises(Unavailable, match="nemo-automodel is not installed"):
        peer_nemo.nemo(None, None)
    with pytest.raises(Unavailable, match=r"not installed|need a GPU"):
        peer(runner, "mntp", "liger", tmp_path)
    # What the training program refuses is a reason too.
    monkeypatch.setattr(runs_module, "_finish", lambda *_: ("l2v: fp8 needs a GPU", "fp8 needs a GPU"))
    (run,) = runner.run("mntp", "fp8", 0, None)
    assert run.skipped == "fp8 needs a GPU" and not run.timed and not run.lasting


def test_llm2vec_has_its_own_environment(base, monkeypatch, tmp_path):
    seen = {}

    def finish(command, environment, limit, watch=None):
        seen["python"], seen["path"] = command[0], environment["PYTHONPATH"].split(os.pathsep)
        return "", "ModuleNotFoundError: No module named 'llm2vec'"

    monkeypatch.setattr(runs_module, "_finish", finish)
    monkeypatch.setenv("PYTHONPATH", "/other/transformers")
    packages = tmp_path / "packages"
    packages.mkdir()
    root = str(runs_module.ROOT)
    for given, python, first in (
        (str(packages), sys.executable, str(packages)),
        ("/env/bin/python", "/env/bin/python", root),
    ):
        (run,) = Runner(Work(TINY, base), CPU, {}, {"llm2vec": given}).run("mntp", "llm2vec", 0, None)
        assert (seen["python"], seen["path"][0]) == (python, first) and "/other/transformers" not in seen["path"]
        assert "No module named 'llm2vec'" in run.skipped


def test_nemo_gets_passages_in_its_recipes_order():
    queries, passages = peer_nemo.inputs([[[1], [2, 3], [4]], [[5, 6], [7], [8, 9]]])
    assert queries["input_ids"].tolist() == [[1, 0], [5, 6]] and queries["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert passages["input_ids"].tolist() == [[2, 3], [4, 0], [7, 0], [8, 9]]


def test_texts_have_the_lengths_and_the_blocks_that_were_asked_for():
    words = Words([f"w{i}" for i in range(50)], [1] * 50, added=1)
    large = MODELS["8b"].workloads
    documents = texts(large["mntp"], 2, words)
    assert sum(len(row["text"].split()) + 1 for row in documents) == 2 * 32 * 512
    sentences = [len(row["text"].split()) + 1 for row in texts(large["simcse"], 8, words)]
    assert len(sentences) == 8 * 128 and 28 < sum(sentences) / len(sentences) < 32 and max(sentences) <= 128
    pairs = texts(large["supervised"], 8, words)
    means = [sum(len(text.split()) + 1 for text in column) / len(pairs) for column in zip(
        *((row["query"], row["positive"], row["negatives"][0]) for row in pairs), strict=True
    )]  # fmt: skip
    assert means[0] == pytest.approx(20, rel=0.1) and means[1:] == pytest.approx([200, 200], rel=0.1)
    assert texts(large["supervised"], 8, words) == pairs
    assert {len(row["negatives"]) for row in pairs} == {1}


def test_the_order_answers_the_first_question_first():
    big = benchmark.cells(MODELS["8b"], ["mntp", "simcse"], ["l2v", *benchmark.PEERS], ["mntp"])
    mntp = [x.provider for x in big if x.workload == "mntp"]
    assert mntp[:3] == ["packed", "l2v", "llm2vec"] and mntp[3:6] == ["fused", "cheap", "none"]
    assert big[-1] == benchmark.Cell("mntp", "fp8") and next(x.provider for x in big if x.workload == "simcse") == "l2v"
    small = benchmark.cells(MODELS["smollm2"], ["mntp"], ["l2v", "transformers_peft"], ["mntp"])
    assert [x.provider for x in small] == ["packed", "l2v", "fused", "transformers_peft"]
    keys = benchmark.rungs(MODELS["smollm2"])["packed"]
    assert keys == ["base.layers=plain", "stages.STAGE.recompute=none"]


def row(seconds, loss=2.0, tokens=100, places=150, warmup=False):
    return {"seconds": seconds, "tokens": tokens, "places": places, "loss": loss, "peak": 2 << 30, "warmup": warmup}


def run(workload, provider, seconds, number=0, setting="s", **kwargs):
    return Run(workload, provider, number, setting, [row(9.0, warmup=True, **kwargs), row(seconds, **kwargs)], load=1.0)


FACTS = {
    "model": "8b", "device": "a GPU", "processor": "a CPU", "cuda": "13", "smoke": False, "dtype": "bfloat16", "rounds": 1,
    "cores": 2,
    "threads": 1, "clock": "processor", "torch": "2", "triton": "3", "linear_parameters": 1000,
    "rates": {"gemm_flops": 1e6}, "quickstart_steps": None,
}  # fmt: skip


def test_medians_ratios_and_targets():
    runs = [
        run("mntp", "l2v", 0.001, setting="fused layers, recompute cheap"),
        run("mntp", "llm2vec", 0.005),
        run("mntp", "transformers_peft", 0.003, setting="no checkpointing"),
        run("mntp", "transformers_peft", 0.004, setting="checkpointing"),
        run("mntp", "packed", 0.002, setting="plain layers, recompute layer"),
        run("mntp", "liger", 0.001, tokens=99),
        run("mntp", "sentence_transformers", 0.001, loss=3.0),
    ]
    found = {x.provider: x for x in report.comparison(runs, MODELS["8b"], FACTS)}
    assert found["l2v"].median == 0.001 and found["l2v"].facts["tokens_per_second"] == pytest.approx(1e5)
    # 4 x 1000 x 1e5 over 1e6: a share of the rate, whatever its size.
    assert found["l2v"].facts["mfu"] == pytest.approx(400) and found["l2v"].facts["padded"] == pytest.approx(1 / 3)
    assert found["llm2vec"].facts["faster"] == pytest.approx(5)
    assert found["transformers_peft"].facts["setting"] == "no checkpointing"
    assert found["liger"].skipped == "not the same work: step 1 has 99 tokens, ours 100"
    assert found["sentence_transformers"].skipped == "not the same work: its first loss is 3.0000, ours 2.0000"
    by_name = {x.name: x for x in report.targets(runs, list(found.values()), FACTS)}
    assert by_name["mntp against llm2vec"].verdict == "met"
    assert by_name["MNTP, 16k tokens a step, bf16"].value == pytest.approx(100)
    assert by_name["MNTP, 16k tokens a step: peak memory"].verdict == "met"
    assert by_name["simcse against llm2vec"].verdict == "not measured"
    text = report.page(runs, list(found.values()), FACTS)
    # The ladder starts where layers are computed twice, as its next step does.
    assert (
        "| mntp | padded, plain layers, all logits | 25,000 |  | 1.00x |" in text
        and "| 50,000 | 2.00x | 2.00x |" in text
    )
    assert "SMOKE" not in text and "say nothing" not in text
    for smoke in (FACTS | {"model": "mini"}, FACTS | {"cuda": None}):
        assert {x.verdict for x in report.targets(runs, list(found.values()), smoke)} == {"not measured"}


def test_the_quickstart_weighs_its_stages_by_their_steps():
    facts = FACTS | {"model": "smollm2", "cuda": None, "quickstart_steps": {"mntp": 1, "simcse": 3}, "rates": None}
    runs = []
    # The second round ran on a machine half as fast: its ratio is the same.
    for number, slow in ((0, 1), (1, 2)):
        for stage, times in (("mntp", (1.0, 1.5)), ("simcse", (2.0, 6.0))):
            for provider, took in zip(("l2v", "transformers_peft"), times, strict=True):
                runs.append(run(stage, provider, slow * took, number))
    (target,) = report.targets(runs, report.comparison(runs, MODELS["smollm2"], facts), facts)
    assert target.value == pytest.approx((1.5 + 18) / (1 + 6)) and target.verdict == "met"
    text = report.page(runs, report.comparison(runs, MODELS["smollm2"], facts), facts)
    assert "say nothing about a GPU" in text and "Load of the machine" in text
    assert report.quickstart(runs[:3], facts) is None


def test_fused_layers_that_differ_are_found():
    plain = run("mntp", "packed", 1.0, setting="plain layers, recompute layer", loss=2.0)
    near = run("mntp", "l2v", 1.0, setting="fused layers, recompute none", loss=2.001)
    assert report.disagreement([plain, near], FACTS) == ""
    said = report.disagreement([plain, near], FACTS | {"dtype": "float32"})
    assert said.startswith("mntp, step 1: the loss is 2.00000 with plain layers and 2.00100 with fused layers")


class FakeRunner:
    """Stands for the processes: what was asked of it, and runs of one second a step."""

    asked: ClassVar[list] = []
    loss: ClassVar[dict] = {}

    def __init__(self, work, device, rungs, environments):
        pass

    def prepare(self):
        return {
            "dtype": "float32",
            "rates": None,
            "linear_parameters": 10,
            "quickstart_steps": None,
            "work": "abc",
            "threads": 1,
            "clock": "wall",
        }

    def run(self, workload, provider, number, left):
        self.asked.append((workload, provider, number))
        if provider == "liger":
            return [Run(workload, provider, number, "whole", skipped="out of memory")]
        if provider == "llm2vec":
            return [Run(workload, provider, number, skipped="not there")]
        setting = "plain layers, recompute layer" if provider == "packed" else "fused layers, recompute none"
        return [run(workload, provider, 1.0, number, setting, loss=self.loss.get(provider, 2.0))]


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(benchmark, "Runner", FakeRunner)
    monkeypatch.setattr(FakeRunner, "asked", [])
    monkeypatch.setattr(FakeRunner, "loss", {})
    return FakeRunner


def test_results_are_kept_and_a_second_call_resumes(fake, tmp_path, capsys):
    command = ["--quick", "--device", "cpu", "--workloads", "mntp", "--rounds", "2", "--out", str(tmp_path)]
    assert benchmark.main([*command, "--providers", "l2v,liger,llm2vec"]) == 0
    first = list(fake.asked)
    assert first[0] == ("mntp", "packed", 0) and len(first) == len(set(first)) == 2 * 8
    data = json.loads((tmp_path / "train_step_mini.json").read_text())
    page = (tmp_path / "train_step_mini.md").read_text()
    assert data["facts"]["smoke"] and page.startswith("SMOKE TEST on a CPU") and "SMOKE TEST" in capsys.readouterr().out
    assert {x["provider"]: x["skipped"] for x in data["results"]}["llm2vec"] == "not there"
    assert (tmp_path / "train_step_mini.png").stat().st_size > 1000
    fake.asked.clear()
    assert benchmark.main([*command, "--providers", "l2v,liger,llm2vec"]) == 0
    # What ran is not run again, nor what had no room; what was missing may be installed by now.
    assert fake.asked == [("mntp", "llm2vec", 0), ("mntp", "llm2vec", 1)]
    fake.asked.clear()
    assert benchmark.main([*command, "--providers", "l2v", "--busy", "1"]) == 0
    assert ("mntp", "l2v", 0) in fake.asked, "beside a busy core it is another measurement"
    fake.asked.clear()
    assert benchmark.main([*command, "--providers", "l2v", "--fresh"]) == 0
    assert ("mntp", "l2v", 0) in fake.asked


def test_no_time_is_a_result(fake, tmp_path):
    command = ["--quick", "--device", "cpu", "--minutes", "0.1", "--out", str(tmp_path)]
    assert benchmark.main(command) == 1
    assert fake.asked == []
    data = json.loads((tmp_path / "train_step_mini.json").read_text())
    assert {x["skipped"] for x in data["results"]} == {"no time was left"}


def test_a_wrong_step_is_not_timed_further(fake, tmp_path, capsys):
    fake.loss["l2v"] = 2.1
    assert benchmark.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert fake.asked == [("mntp", "packed", 0), ("mntp", "l2v", 0)]
    assert "nothing else is timed" in capsys.readouterr().err


def spec(tmp_path, **changes):
    values = {
        "provider": "x", "stage": "mntp", "base": "", "dtype": "float32", "device": "cpu", "batches": "", "batch": 1,
        "length": 8, "lora": {}, "lr": 1.0, "betas": [0.9, 0.99], "weight_decay": 0.0, "clip": 1.0, "warmup": 1, "steps": 4,
        "seconds": 1e9, "out": str(tmp_path / "rows.jsonl"), "settings": [{}, {"checkpointing": True}],
    }  # fmt: skip
    return Spec(**values | changes)


def test_the_recorder_stops_at_its_limits_and_keeps_what_it_has(tmp_path):
    recorder = Recorder(spec(tmp_path))
    recorder.start()
    assert [recorder.step(1, 1, 0.0) for _ in range(5)] == [True] * 4 + [False]
    recorder.start()
    recorder.spec.seconds = 0
    # Two timed steps at the least.
    assert [recorder.step(1, 1, 0.0) for _ in range(3)] == [True, True, False]
    for setting in recorder.settings():
        with recorder.attempt():
            if not setting.checkpointing:
                raise RuntimeError("CUDA out of memory. Tried to allocate")
            recorder.start()
            recorder.step(5, 6, 1.5)
    rows = [json.loads(line) for line in recorder.file.read_text().splitlines()]
    assert rows[-2] == {"setting": str(Setting()), "skipped": "out of memory"}
    assert rows[-1]["setting"] == "checkpointing" and (rows[-1]["tokens"], rows[-1]["places"]) == (5, 6)
    with pytest.raises(RuntimeError, match="another"), recorder.attempt():
        raise RuntimeError("another")


def test_how_a_process_ended():
    python = [sys.executable, "-c"]
    finish = runs_module._finish
    assert finish([*python, "print('done')"], dict(os.environ), 60) == ("done\n", "")
    said = "import sys; print('l2v: give a GPU', file=sys.stderr); print('more'); sys.exit(2)"
    assert finish([*python, said], dict(os.environ), 60)[1] == "give a GPU"
    assert finish([*python, "raise ValueError('why')"], dict(os.environ), 60)[1] == "ValueError: why"
    full = "raise RuntimeError('CUDA out of memory. Tried')"
    assert finish([*python, full], dict(os.environ), 60)[1] == "out of memory"
    assert finish([*python, "import time; time.sleep(60)"], dict(os.environ), 0.5)[1].startswith("stopped after")


def test_processor_time_is_read_line_by_line(tmp_path):
    file = tmp_path / "rows"
    said = f"""
import time
for at in range(3):
    end = time.process_time() + (0.3, 0.3, 0.6)[at]
    while time.process_time() < end:
        pass
    time.sleep(0.3)
    print(at, file=open({str(file)!r}, "a"), flush=True)
time.sleep(0.5)
"""
    watch = runs_module.ProcessorTime(file)
    assert runs_module._finish([sys.executable, "-c", said], dict(os.environ), 60, watch)[1] == ""
    first, second, third = watch.differences()
    assert first is None and second == pytest.approx(0.3, abs=0.1) and third == pytest.approx(0.6, abs=0.1)


def test_a_peer_records_why_it_cannot_run(tmp_path):
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(spec(tmp_path, provider="sentence_transformers").__dict__))
    run_peer([str(file)], PROVIDERS)
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert row["skipped"] == "sentence-transformers has no masked next-token prediction"


def test_the_models_are_what_they_are_called():
    big = MODELS["8b"]
    assert (big.shape["hidden_size"], big.shape["num_hidden_layers"], big.shape["vocab_size"]) == (4096, 32, 128256)
    assert big.workloads["mntp"].batch * big.workloads["mntp"].length == 16384
    assert MODELS["smollm2"].shape is None and not MODELS["smollm2"].checkpointing
