import json

import pytest
import torch

from benchmarks.harness import Ceilings, Result, Unavailable, fill, time_interleaved
from benchmarks.kernels import attention as benchmark
from benchmarks.kernels.attention_peers import PROVIDERS, Workload
from benchmarks.pages import table


def test_smoke_run_is_labelled_and_complete(tmp_path, capsys):
    assert benchmark.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert "SMOKE TEST on a CPU" in capsys.readouterr().out
    data = json.loads((tmp_path / "attention.json").read_text())
    assert data["facts"]["smoke"] and data["facts"]["torch"] == torch.__version__
    assert (tmp_path / "attention.md").read_text().startswith("SMOKE TEST on a CPU")
    results = data["results"]
    assert len(results) == len(benchmark.workloads(torch.device("cpu"), True)) * len(PROVIDERS) * 2
    assert all((x["median"] is None) == bool(x["skipped"]) for x in results)
    assert all(x["low"] <= x["median"] <= x["high"] and x["tflops"] > 0 for x in results if x["provider"] == "l2v")


def test_a_wrong_provider_is_not_timed(monkeypatch):
    def wrong(w):
        return lambda q, k, v: q * 1.01 + 0 * (k.sum() + v.sum())

    w = Workload("tiny", (5, 3), 2, 2, 16, 0.0, torch.device("cpu"), torch.float32)
    monkeypatch.setattr(benchmark, "PROVIDERS", (PROVIDERS[0], wrong))
    results = benchmark.run(w, Ceilings(1e9, 1e9), seconds=0.001)
    assert {x.provider for x in results if x.median} == {"l2v"}
    assert all("wrong o" in x.skipped for x in results if x.provider == "wrong")


def test_sentences_fill_the_pack():
    lengths = benchmark.sentences(16384)
    assert sum(lengths) == 16384 and min(lengths) >= 1 and 27 < sum(lengths) / len(lengths) < 33


def test_timing_takes_turns_and_rotates():
    seen = []
    calls = {name: [lambda name=name, i=i: seen.append((name, i)) for i in range(2)] for name in "ab"}
    times = time_interleaved(calls, torch.device("cpu"), seconds=1e-6, rounds=3)
    assert [len(x) for x in times.values()] == [3, 3]
    # After warming up: a then b, b then a, a then b; each over both sets of inputs.
    assert [name for name, i in seen[8:] if i == 0] == ["a", "b", "b", "a", "a", "b"]


def test_rates():
    w = Workload("x", (4, 2), 8, 2, 64, 0.0, torch.device("cpu"), torch.bfloat16)
    assert w.flops(False) == 4 * 8 * 64 * 20 and w.flops(True) == 2.5 * w.flops(False)
    assert w.bytes(False) == 2 * 6 * 64 * (8 + 8 + 2 + 2)
    result = fill(Result("x", "l2v", "forward", flops=1e12, bytes=1e9), [1.0, 2.0, 4.0], Ceilings(1e12, 1e12))
    assert (result.median, result.tflops, result.roofline) == (2.0, 0.5, 0.5)
    assert "| 2000000.0 | 150.0% | 0.5 | 50% |" in table([result])
    assert "no reason" in table([Result("x", "y", "forward", skipped="no reason")])


@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda x: x.__name__)
def test_cpu_providers_are_right_or_say_why_not(provider):
    for window in (None, 3):
        w = Workload("equal", (8, 8), 4, 2, 16, 0.0, torch.device("cpu"), torch.float32, window)
        tensors = benchmark.inputs(w, 1)[0]
        try:
            attend = provider(w)
            attend(*tensors[:3])
        except (Unavailable, RuntimeError) as error:
            assert str(error)
            continue
        benchmark.check(w, attend, tensors, benchmark.exact_results(w, tensors, 0.0))


def test_pairs_within_a_window_are_counted():
    for window in (None, 1, 3, 6, 9):
        w = Workload("x", (6, 2), 1, 1, 1, 0.0, torch.device("cpu"), torch.float32, window)
        near = [abs(i - j) < (window or 9) for n in w.lengths for i in range(n) for j in range(n)]
        assert w.flops(False) == 4 * sum(near)


def test_packs_by_name(capsys):
    cpu = torch.device("cpu")
    assert [w.name for w in benchmark.workloads(cpu, True, ["sentences", "512"])] == ["sentences llama-3-8b"] * 2
    (windowed,) = benchmark.workloads(torch.device("cuda"), True, ["window"])
    assert windowed.window == benchmark.WINDOW and set(windowed.lengths) == {2048} and windowed.tokens == 16384
    assert benchmark.main(["--packs", "512,sentence", "--device", "cpu"]) == 1
    assert "--packs has no sentence; choose of sentences, 128, 256" in capsys.readouterr().err


def test_code_from_the_hub_needs_the_users_word(monkeypatch):
    monkeypatch.setattr("benchmarks.kernels.attention_peers.need_cuda", lambda device: None)
    (provider,) = [x for x in PROVIDERS if x.__name__ == "flash_attn_4"]
    w = Workload("x", (4,), 1, 1, 16, 0.0, torch.device("cpu"), torch.float32)
    monkeypatch.delenv("L2V_HUB_KERNELS", raising=False)
    with pytest.raises(Unavailable, match="L2V_HUB_KERNELS=1 takes kernels-community/flash-attn4 from the Hub"):
        provider(w)
    monkeypatch.setenv("L2V_HUB_KERNELS", "1")
    with pytest.raises(Unavailable, match="kernels is not installed"):
        provider(w)
