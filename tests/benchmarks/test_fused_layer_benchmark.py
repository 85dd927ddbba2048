import json

import torch

from benchmarks.harness import Ceilings
from benchmarks.kernels import fused_layer as benchmark


def test_smoke_run_is_labelled_and_complete(tmp_path, capsys):
    assert benchmark.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    assert "SMOKE TEST on a CPU" in capsys.readouterr().out
    data = json.loads((tmp_path / "fused_layer.json").read_text())
    assert data["facts"]["smoke"]
    times = {x["provider"]: x for x in data["results"]}
    assert set(times) == {v.name for v in benchmark.VARIANTS}
    for name, x in times.items():
        assert (x["median"] is None) == ("compile" in name), x["skipped"]
    assert times["transformers + PEFT"]["error"] < 1e-5
    assert all(x["verdict"] == "not measured" for x in data["targets"])  # a CPU's time answers no target


def test_a_wrong_variant_is_not_timed(monkeypatch):
    step_of = benchmark.step_of

    def wrong(model, batch):
        run = step_of(model, batch)
        return run if model.fused is not None else lambda: [2 * x for x in run()]

    monkeypatch.setattr(benchmark, "step_of", wrong)
    w = benchmark.workloads(torch.device("cpu"), True)[0]
    found = {x.provider: x for x in benchmark.run(w, benchmark.MINI, Ceilings(1e9, 1e9), torch.device("cpu"), 0.01)}
    assert "differ from those of 'fused'" in found["transformers + PEFT"].skipped
    assert found["fused"].median


def test_flops_are_those_of_the_definition():
    w = benchmark.Workload("", 10, 5)
    config = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 12}
    linear = 8 * 8 * 2 + 2 * 8 * 4 + 3 * 8 * 12
    assert benchmark.flops(config, w, 3) == 3 * 10 * (4 * linear + 14 * 5 * 8)
