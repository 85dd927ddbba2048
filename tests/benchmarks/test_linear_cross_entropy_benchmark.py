import json

import pytest
import torch

from benchmarks.harness import Ceilings, Result, Unavailable
from benchmarks.kernels import linear_cross_entropy as benchmark
from benchmarks.kernels.linear_cross_entropy import PROVIDERS, STEP, Workload

CPU = torch.device("cpu")
TINY = Workload(9, 50, 16, CPU, torch.float32)


def test_smoke_run_is_labelled_and_complete(tmp_path, capsys):
    assert benchmark.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert "SMOKE TEST on a CPU" in capsys.readouterr().out
    data = json.loads((tmp_path / "linear_cross_entropy.json").read_text())
    page = (tmp_path / "linear_cross_entropy.md").read_text()
    assert data["facts"]["smoke"] and page.startswith("SMOKE TEST on a CPU")
    assert {x["verdict"] for x in data["targets"]} == {"not measured"} and "| not measured |" in page
    assert len(data["results"]) == 2 * (len(PROVIDERS) + 1)
    assert all((x["median"] is None) == bool(x["skipped"]) for x in data["results"])
    assert {x["provider"] for x in data["results"] if x["median"]} >= {"l2v", "torch_logits", "bare_matmuls"}


def test_a_given_shape(capsys):
    assert benchmark.main(["--device", "cpu", "--shape", "5", "40", "8"]) == 0
    assert "| 5 x 40 x 8 | forward+backward | l2v |" in capsys.readouterr().out


@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda x: x.__name__)
def test_cpu_providers_are_right_or_say_why_not(provider):
    weight, labels = TINY.head()
    hidden = TINY.hidden()
    try:
        step = provider(TINY, weight, labels)
    except Unavailable as error:
        assert str(error)
        return
    logits = hidden.double() @ weight.double().T
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    (want,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(step(hidden)[0].double(), loss.detach())
    torch.testing.assert_close(benchmark.exact_gradient(TINY, weight, labels, hidden).float(), want)
    assert benchmark.error_of(TINY, step, hidden, want.double()) < 1e-5


def test_a_wrong_provider_is_not_timed_and_a_full_memory_is_a_result(monkeypatch):
    def wrong(w, weight, labels):
        return lambda hidden: (None, torch.zeros_like(hidden))

    def large(w, weight, labels):
        raise RuntimeError("CUDA out of memory. Tried to allocate 16 GiB")

    monkeypatch.setattr(benchmark, "PROVIDERS", (PROVIDERS[0], wrong, large))
    monkeypatch.setattr(benchmark, "PEERS", ("wrong", "large"))
    results = {x.provider: x for x in benchmark.run(TINY, Ceilings(1e9, 1e9), seconds=0.001)}
    assert results["l2v"].median and results["bare_matmuls"].median
    assert "wrong gradient: relative error 1.0" in results["wrong"].skipped and results["wrong"].median is None
    assert results["large"].skipped == "out of memory"
    assert "out of memory" in benchmark.comparison(list(results.values()))


def test_targets_take_the_worst_of_what_was_measured():
    def rows(workload, **times):
        return [Result(workload, name, STEP, median=time, memory=700 << 20) for name, time in times.items()]

    names = dict.fromkeys(benchmark.PEERS)
    results = rows("3277 x 128256 x 4096", l2v=0.012, **names | {"torch_logits": 0.018, "liger": 0.03})
    results += rows("8192 x 131072 x 4096", l2v=0.03, **names | {"torch_logits": 0.024, "torch_compiled": 0.06})
    time, memory, torch_, liger, cut = benchmark.targets(results, smoke=False)
    assert time.value == pytest.approx(12) and time.limit == pytest.approx(15.6) and time.verdict == "met"
    assert memory.value == 700 and memory.limit == pytest.approx(768 + 51.2, abs=0.1)
    assert torch_.value == pytest.approx(0.8) and torch_.verdict == "not met"
    assert liger.value == pytest.approx(2.5) and cut.verdict == "not measured"
    assert {x.verdict for x in benchmark.targets(results, smoke=True)} == {"not measured"}


def test_sizes():
    assert all(w.n * w.v * w.e < 1e6 for w in benchmark.workloads(CPU, quick=True))
    quick = benchmark.workloads(torch.device("cuda"), quick=True)
    assert (quick[0].n, quick[0].v, quick[0].e) == benchmark.LLAMA
    assert quick[0].flops == 4 * 3277 * 128256 * 4096 and quick[0].bytes_of_logits == 16 * 3277 * 128256
