import json
from dataclasses import replace

import pytest
import torch

from benchmarks.harness import Ceilings, Result, Target, Unavailable
from benchmarks.kernels import contrastive as benchmark
from benchmarks.kernels.contrastive_peers import PROVIDERS, Workload, bare_matmuls

CPU = torch.device("cpu")
TINY = Workload(12, 24, 16, CPU, torch.float32)


def test_smoke_run_is_labelled_and_complete(tmp_path, capsys):
    assert benchmark.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert "SMOKE TEST on a CPU" in capsys.readouterr().out
    data = json.loads((tmp_path / "contrastive.json").read_text())
    page = (tmp_path / "contrastive.md").read_text()
    assert data["facts"]["smoke"] and page.startswith("SMOKE TEST on a CPU")
    assert {x["verdict"] for x in data["targets"]} == {"not measured"} and "| not measured |" in page
    results = data["results"]
    assert len(results) == 2 * (len(PROVIDERS) + 1) + 8
    assert all((x["median"] is None) == bool(x["skipped"]) for x in results)
    timed = {x["provider"] for x in results if x["median"]}
    assert timed >= {"l2v", "l2v_chunked", "torch_naive", "torch_chunked", "torch_one_pass", "bare_matmuls"}


@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda x: x.__name__)
def test_cpu_providers_are_right_or_say_why_not(provider):
    for w in (TINY, replace(TINY, n=11, m=11)):
        tensors = w.inputs()
        try:
            step = provider(w)
        except Unavailable as error:
            assert str(error)
            return
        loss, *_ = step(*tensors)
        # Gradients that are all rounding would prove nothing.
        assert float(loss) > 0.1
        assert benchmark.error_of(w, step, tensors, benchmark.exact_gradients(w, *tensors)) < 1e-5


@pytest.mark.parametrize("provider", [p for p in PROVIDERS if p.__name__ in ("torch_chunked", "torch_one_pass")])
def test_chunks_are_put_together(provider, monkeypatch):
    monkeypatch.setattr(Workload, "rows_of_a_chunk", 5)
    tensors = TINY.inputs()
    assert benchmark.error_of(TINY, provider(TINY), tensors, benchmark.exact_gradients(TINY, *tensors)) < 1e-5


def test_the_reference_is_the_definition():
    q, k = (x.detach().double().requires_grad_() for x in TINY.inputs())
    unit = [x / x.norm(dim=1, keepdim=True) for x in (q, k)]
    loss = torch.nn.functional.cross_entropy(TINY.scale * unit[0] @ unit[1].T, TINY.targets_N())
    for got, want in zip(benchmark.exact_gradients(TINY, q, k), torch.autograd.grad(loss, (q, k)), strict=True):
        assert (got - want).norm() <= 1e-6 * want.norm()


def test_a_wrong_provider_is_not_timed_and_a_full_memory_is_a_result(monkeypatch):
    def wrong(w):
        return lambda q, k: (None, torch.zeros_like(q), torch.zeros_like(k))

    def large(w):
        raise RuntimeError("CUDA out of memory. Tried to allocate 16 GiB")

    monkeypatch.setattr(benchmark, "PROVIDERS", (PROVIDERS[0], wrong, large))
    results = {x.provider: x for x in benchmark.run(TINY, Ceilings(1e9, 1e9), seconds=0.001)}
    assert results["l2v"].median and results["bare_matmuls"].median
    assert "wrong gradients: relative error 1.0" in results["wrong"].skipped and results["wrong"].median is None
    assert results["large"].skipped == "out of memory"
    assert "out of memory" in benchmark.comparison(list(results.values()))


def test_sizes():
    assert all(w.n * w.m * w.e < 1e6 for w in benchmark.workloads(CPU, quick=True))
    gpu = torch.device("cuda")
    full, quick = (benchmark.workloads(gpu, quick) for quick in (False, True))
    assert {(65536, 65536, e) for e in benchmark.WIDTHS} <= {(w.n, w.m, w.e) for w in full}
    assert any(w.m == 8 * w.n for w in full) and any(w.m == 8 * w.n for w in quick)
    assert any((w.n, w.m, w.e) == (65536, 65536, 4096) for w in quick)
    small, large = Workload(8192, 8192, 4096, gpu, torch.bfloat16), Workload(16384, 16384, 4096, gpu, torch.bfloat16)
    many = Workload(65536, 8 * 65536, 4096, gpu, torch.bfloat16)
    assert (small.matmuls, large.matmuls, many.matmuls) == (3, 3, 4)
    assert small.flops == 6 * 8192 * 8192 * 4096 and small.bytes_of_inputs == 2 * 8192 * 4096 * 2
    assert large.rows_of_a_chunk == 8192


def steps(times, workload="65536 x 65536 x 4096", n=65536, memory=None):
    facts = {"n": n, "m": n, "e": 4096, "inputs": 2 << 29}
    return [
        Result(workload, name, benchmark.STEP, median=time, memory=memory if name == "l2v" else None, facts=facts)
        for name, time in times.items()
    ]


def test_targets_take_the_worst_of_what_was_measured():
    times = {"l2v": 1.0, "bare_matmuls": 0.9, "inf_cl": 2.0, "torch_chunked": 1.1}
    worse = {"l2v": 1.0, "bare_matmuls": 0.5, "torch_chunked": 0.9, "inf_cl": None}
    results = steps(times, memory=1 << 30) + steps(worse, "8192 x 8192 x 4096", 8192)
    names = ("one loss", "six prefixes")
    for name, forward, both in zip(names, (1.0, 1.2), (3.0, 5.2), strict=True):
        for direction, time in (("forward", forward), (benchmark.STEP, both)):
            results.append(Result("matryoshka 16", name, direction, median=time))
    found = benchmark.targets(results, smoke=False)
    memory, bare, inf_cl, chunked, forward, backward = found
    assert memory.value == 1024 and memory.limit == pytest.approx(1.2 * 2048 + 512) and memory.verdict == "met"
    assert (bare.value, bare.verdict) == (2.0, "not met")
    assert (inf_cl.value, inf_cl.verdict) == (2.0, "met")
    assert (chunked.value, chunked.verdict) == (0.9, "not met")
    assert forward.value == pytest.approx(1.2) and backward.value == pytest.approx(2.0)
    assert {x.verdict for x in benchmark.targets(results, smoke=True)} == {"not measured"}
    assert Target("x", 1.0, float("nan")).verdict == "not met"


def test_bare_matmuls_do_as_many_as_the_work_needs(monkeypatch):
    seen = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: (seen.append(a[0].shape), mm(*a, **k))[1])
    bare_matmuls(TINY)(*TINY.inputs())
    assert len(seen) == TINY.matmuls == 3
