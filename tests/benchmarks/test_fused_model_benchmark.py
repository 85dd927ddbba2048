import json

import pytest

from benchmarks.harness import Result
from benchmarks.kernels import fused_model as benchmark


def test_the_mini_model_is_compared_and_labelled(tmp_path, capsys):
    assert (
        benchmark.main(["--quick", "--device", "cpu", "--dtype", "fp32", "--rounds", "2", "--out", str(tmp_path)]) == 0
    )
    assert "SMOKE TEST" in capsys.readouterr().out
    data = json.loads((tmp_path / "fused_model.json").read_text())
    assert [(x["workload"], x["provider"]) for x in data["results"]] == [
        (workload, name) for workload in ("supervised", "mntp") for name in benchmark.PROVIDERS
    ]
    assert all(x["median"] > 0 and len(x["facts"]["times"]) == 2 for x in data["results"])
    assert all(x["error"] < 1e-5 for x in data["results"] if x["provider"] == "fused")
    assert [x["verdict"] for x in data["targets"]] == ["not measured"]


def test_layers_that_disagree_are_not_timed(monkeypatch):
    step_of, timed = benchmark.step_of, []

    def wrong(model, batch, workload):
        run = step_of(model, batch, workload)
        return run if model.fused is None else lambda: {k: 2 * v for k, v in run().items()}

    monkeypatch.setattr(benchmark, "step_of", wrong)
    monkeypatch.setattr(benchmark, "measure", lambda *_: timed.append(1))
    with pytest.raises(ValueError, match=r"gradients of fused and plain layers differ by 1\.0e"):
        benchmark.main(["--quick", "--device", "cpu", "--dtype", "fp32"])
    assert not timed


@pytest.mark.parametrize(("plain", "verdict"), [(2.6, "met"), (2.5, "not met")])
def test_the_target_is_the_processors_time_on_a_cpu_and_the_clocks_on_a_gpu(plain, verdict):
    results = [
        Result("supervised", "plain", "", 9.0, facts={"processor": plain}),
        Result("supervised", "fused", "", 1.0, facts={"processor": 2.0}),
    ]
    facts = {"model": "gemma3-270m", "smoke": False, "cuda": None}
    (target,) = benchmark.targets(results, facts)
    assert target.value == plain / 2 and target.verdict == verdict
    assert benchmark.targets(results, facts | {"cuda": "13"})[0].value == 9.0
    assert benchmark.targets(results[:1], facts)[0].verdict == "not measured"
