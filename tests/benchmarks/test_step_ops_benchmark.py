import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import Ceilings, Unavailable
from benchmarks.kernels import step_ops as benchmark
from benchmarks.kernels import step_ops_peers as peers
from benchmarks.kernels.step_ops_peers import PROVIDERS, Workload, definition, l2v

CPU = (torch.device("cpu"), torch.float32)


def test_smoke_run_is_labelled_and_complete(tmp_path, capsys):
    assert benchmark.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    assert "SMOKE TEST on a CPU" in capsys.readouterr().out
    data = json.loads((tmp_path / "step_ops.json").read_text())
    assert data["facts"]["smoke"] and data["facts"]["torch"] == torch.__version__
    text = (tmp_path / "step_ops.md").read_text()
    assert text.startswith("SMOKE TEST on a CPU")
    results = data["results"]
    assert len(results) == len(benchmark.workloads(CPU[0], False)) * len(PROVIDERS) * 2
    assert len(text.splitlines()) == len(results) + 4
    assert all((x["median"] is None) == bool(x["skipped"]) for x in results)
    for x in results:
        if x["provider"] in ("l2v", "eager"):
            assert x["facts"]["gigabytes_per_second"] == pytest.approx(x["bytes"] / x["median"] / 1e9)
            assert x["error"] < 1e-6
        else:
            assert x["skipped"]


def test_a_wrong_provider_is_not_timed(monkeypatch):
    def wrong(w):
        step = definition(w)
        return lambda *leaves: tuple(x * 1.01 for x in step(*leaves))

    monkeypatch.setattr(benchmark, "PROVIDERS", (l2v, wrong))
    results = benchmark.run(Workload("swiglu", "tiny", 3, 5, *CPU), Ceilings(1e9, 1e9), seconds=0.001)
    assert {x.provider for x in results if x.median} == {"l2v"}
    assert all("wrong results" in x.skipped and x.facts["failed"] for x in results if x.provider == "wrong")


@pytest.mark.parametrize("kept_graph", [True, False])
def test_a_compiled_peer_serves_the_backwards_of_a_kept_graph(monkeypatch, kept_graph):
    """Compiled for a CPU without code of its own; one that cannot keep its graph is skipped with the reason, not a crash."""
    compile_it = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **more: compile_it(f, backend="aot_eager", **more))
    if kept_graph:
        monkeypatch.setattr(
            peers, "compile_for", lambda f, _, **more: harness.compiled(f, torch.device("cuda"), **more)
        )
    else:
        monkeypatch.setattr(peers, "compile_for", lambda f, _, **more: harness.compiled(f, torch.device("cuda")))
    monkeypatch.setattr(benchmark, "PROVIDERS", (peers.compiled, l2v))
    with harness.functorch_config.patch(donated_buffer=True):  # and as it was, afterwards
        results = benchmark.run(Workload("rms_norm", "tiny", 3, 8, *CPU), Ceilings(1e9, 1e9), seconds=0.001)
    assert all(x.median for x in results if x.provider == "l2v")
    for x in (x for x in results if x.provider == "compiled"):
        assert (x.median and not x.skipped) if kept_graph else "donated buffers" in x.skipped


def test_bytes_are_those_of_the_definition():
    bf16 = (torch.device("cpu"), torch.bfloat16)
    sizes = {
        Workload("rms_norm", "", 10, 8, *bf16): (4 * 10 * 8 * 2, 4 * 10 * 8 * 2),
        Workload("head_norm", "", 10, 8, *bf16, heads=3): (2 * 10 * 3 * 8 * 2, 3 * 10 * 3 * 8 * 2),
        Workload("sandwich_norm", "", 10, 8, *bf16): (4 * 10 * 8 * 2, 6 * 10 * 8 * 2),
        Workload("geglu", "", 10, 8, *bf16): (3 * 10 * 8 * 2, 5 * 10 * 8 * 2),
        Workload("swiglu", "", 10, 8, *bf16): (3 * 10 * 8 * 2, 5 * 10 * 8 * 2),
        Workload("segment_pool", "", 10, 8, *bf16, lengths=(4, 6)): (10 * 8 * 2 + 64, 2 * 10 * 8 * 2 + 64),
    }
    for w, want in sizes.items():
        assert (w.bytes(False), w.bytes(True)) == want


@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda x: x.__name__)
@pytest.mark.parametrize("op", ["rms_norm", "sandwich_norm", "head_norm", "swiglu", "geglu", "segment_pool"])
def test_cpu_providers_run_or_say_why_not(op, provider):
    w = Workload(op, "", 6, 8, *CPU, heads=2 if op == "head_norm" else 1, lengths=(2, 4))
    try:
        step = provider(w)
    except Unavailable as error:
        assert str(error)
        return
    assert len(step(*w.leaves())) == (2 if op in ("rms_norm", "sandwich_norm") else 1)


def test_the_numbers_of_the_docs():
    """Bytes and times a token in docs/step-ops.md are those that the benchmark counts, at 4.3 TB/s."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "step-ops.md").read_text(encoding="utf-8")
    sizes = {"rms_norm": 4096, "swiglu": 14336, "segment_pool": 4096}
    found, total = {}, 0.0
    for name, amount, time in re.findall(r"^\| (\w+ [^|]+) \|[^|]*\|[^|]*\| (\d+) \| ([\d.]+) \|$", text, re.MULTILINE):
        assert float(time) == pytest.approx(int(amount) / 4300, abs=0.05), name
        found[name.split(",")[0]] = int(amount)
    for op, width in sizes.items():
        w = Workload(op, "", 1, width, torch.device("cpu"), torch.bfloat16)
        for direction in ("forward", "backward"):
            assert found.pop(f"{op} {direction}") == w.bytes(direction == "backward")
            total += w.bytes(direction == "backward") * {"rms_norm": 2, "swiglu": 1, "segment_pool": 0}[op]
    # Two norms recomputed, and a SwiGLU output.
    assert found == {"rms_norm recomputed": 2 * 4096 * 2}
    total += 2 * 2 * 4096 * 2 + 3 * 14336 * 2
    assert f"that is {total / 4300:.0f} ns a token and layer" in text
    assert f"{total / 4.3e12 * 16384 * 32 * 1e3:.0f} ms of a step" in text
