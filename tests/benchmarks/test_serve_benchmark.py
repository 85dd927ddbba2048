import json
from dataclasses import replace

import pytest

from benchmarks import encode as shared
from benchmarks import serve as benchmark
from benchmarks.serve import Turn
from benchmarks.train_step.work import MODELS


def test_ratios_are_taken_round_by_round():
    """A round in which the machine was slow counts as one, on both sides."""
    found = []
    for encode, serve in ((1.0, 1.25), (10.0, 10.0), (2.0, 4.0)):
        found += [Turn("encode", encode, 0.9), Turn("serve", serve, 1.0, 0.1)]
    page = benchmark.page(found, 50, {"model": "mini", "rounds": 3, "load": 0.5})
    assert "as a share of encode on the same core | >= 0.9 x | 0.8 x |" in page
    assert "processor seconds of the model's thread | >= 0.9 x | 0.9 x |" in page
    assert "| encode | 25.0 | 18.00 | 0.00 |" in page and "| serve | 12.5 | 20.00 | 2.00 |" in page


@pytest.mark.slow
def test_smoke_run_is_complete(monkeypatch, tmp_path):
    shape = MODELS["mini"].shape | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    monkeypatch.setattr(shared, "MODELS", MODELS | {"mini": replace(MODELS["mini"], shape=shape)})
    assert benchmark.main(["--quick", "--device", "cpu", "--texts", "48", "--rounds", "2", "--out", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "serve.json").read_text(encoding="utf-8"))
    assert [turn["provider"] for turn in data["turns"]] == ["encode", "serve"] * 2
    assert all(turn["seconds"] > 0 and turn["model_seconds"] > 0 for turn in data["turns"])
