import importlib.util
import json

import pytest
import torch

from benchmarks.gradient_cache import bench as benchmark
from benchmarks.gradient_cache import step as gradient_cache_step
from benchmarks.gradient_cache.step import NEEDED, SHAPES, Setting, memory_on_cpu
from benchmarks.harness import Result, Unavailable

installed = all(importlib.util.find_spec(name) for name in NEEDED)


@pytest.mark.slow
@pytest.mark.skipif(not installed, reason="needs deepspeed and peft")
def test_peak_memory_of_sixteen_micro_batches_is_that_of_one(monkeypatch):
    """Measured on the training path, on a CPU: resident memory of a process a setting."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    b = SHAPES["tiny"].examples
    one, sixteen = (Setting("tiny", micros, b) for micros in (1, 16))
    try:
        base, cached = memory_on_cpu(one), memory_on_cpu(sixteen)
    except Unavailable as error:
        pytest.skip(str(error))
    # A micro-batch's activations are most of it, or the comparison would be one of constants.
    assert base > 32 << 20
    assert cached <= 1.1 * base + sixteen.embeddings, f"{base / 2**20:.1f} and {cached / 2**20:.1f} MiB"


def fake(monkeypatch, memory):
    monkeypatch.setattr(benchmark, "check_installed", lambda: None)
    monkeypatch.setattr(benchmark, "memory_on_cpu", memory)
    monkeypatch.setattr(benchmark, "times_on_cpu", lambda x, rounds: [x.tokens / 1e4] * rounds)


def test_what_is_written(tmp_path, monkeypatch, capsys):
    fake(monkeypatch, lambda x: x.examples << 20)
    assert benchmark.main(["--device", "cpu", "--model", "tiny", "--out", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "gradient_cache.json").read_text())
    page = (tmp_path / "gradient_cache.md").read_text()
    assert len(data["results"]) == 2 * (4 + 5) and all(x["median"] and x["memory"] for x in data["results"])
    assert "say nothing about a GPU" in page and "say nothing about a GPU" in capsys.readouterr().out
    assert all(x["name"].startswith("CPU") for x in data["targets"])
    assert (tmp_path / "gradient_cache.png").stat().st_size > 1000


def test_memory_alone(tmp_path, monkeypatch):
    fake(monkeypatch, lambda x: x.examples << 20)
    arguments = ["--device", "cpu", "--quick", "--recompute", "off", "--rounds", "0", "--out", str(tmp_path)]
    assert benchmark.main(arguments) == 0
    data = json.loads((tmp_path / "gradient_cache.json").read_text())
    assert [x["median"] for x in data["results"]] == [None] * 5
    assert [x["verdict"] for x in data["targets"]] == ["not measured", "met", "not measured", "not measured"]


def results(memory_of_cached, slower):
    b, out = SHAPES["tiny"].examples, []
    for x in benchmark.settings("tiny", quick=True, recompute=[False, True]):
        result = benchmark.blank(x)
        factor = slower * (1.5 - 0.5 / x.micros) if x.micros > 1 else 1.0
        result.median = x.tokens * factor
        result.memory = memory_of_cached if x.micros > 1 else (x.examples // b) * 1000_000
        out.append(result)
    return out


def test_targets():
    good, bad = (benchmark.targets(results(*x), "GPU") for x in ((1_050_000, 1.04), (1_300_000, 1.2)))
    assert [x.verdict for x in good] == ["met", "met", "not met", "met"]
    assert good[0].value == pytest.approx(1.04) and good[2].value == pytest.approx(1.04 * (1.5 - 0.5 / 16))
    assert [x.verdict for x in bad] == ["not met"] * 4
    assert {x.verdict for x in benchmark.targets([], "GPU")} == {"not measured"}
    out_of_memory = [Result("", "", "", skipped="out of memory", facts=x.facts) for x in results(1, 1.0)]
    assert {x.verdict for x in benchmark.targets(out_of_memory, "GPU")} == {"not measured"}


class FakeStep:
    """The engine's stand-in: what needs more than four micro-batches at once has no room."""

    device = torch.device("cpu")

    def __init__(self, model, dtype):
        self.asked = []

    def prepare(self, x):
        self.asked.append(x)
        if x.micros == 1 and x.examples > 4 * SHAPES["tiny"].examples:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return lambda: None


def test_a_batch_that_does_not_fit_is_a_result_and_larger_ones_are_not_tried(monkeypatch):
    monkeypatch.setattr(benchmark, "TrainingStep", FakeStep)
    chosen, shown = benchmark.settings("tiny", quick=False, recompute=[False]), []
    found = benchmark.on_gpu(chosen, 2, lambda results: shown.append(len(results)))
    skipped = [x.facts["batch"] for x in found if x.skipped == "out of memory"]
    assert skipped == [8 * SHAPES["tiny"].examples, 16 * SHAPES["tiny"].examples]
    assert all(x.median is not None for x in found if not x.skipped) and shown == [9, 9]
    assert "out of memory" in benchmark.table(found)


def test_settings():
    found = benchmark.settings("tiny", quick=False, recompute=[True, False])
    assert len(found) == len(set(found)) == 18 and found[0].recompute and not found[-1].recompute
    assert {x.examples for x in found if x.micros > 1} == {SHAPES["tiny"].examples}
    assert max(x.batch for x in found) == 16 * SHAPES["tiny"].examples
    assert Setting("tiny", 16, 8).embeddings == 2 * 128 * 128 * 4


def test_one_sentence_where_the_training_libraries_are_missing(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        gradient_cache_step.importlib.util,
        "find_spec",
        lambda name: None if name in ("peft", "deepspeed") else find(name),
    )
    assert benchmark.main(["--device", "cpu"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "needs peft, deepspeed" in said and "PYTHONPATH" in said
