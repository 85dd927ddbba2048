import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import encode as benchmark
from benchmarks import harness
from benchmarks.encode import MODELS, Profile
from benchmarks.harness import Unavailable

SHAPE = MODELS["mini"].shape | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(benchmark, "MODELS", MODELS | {"mini": replace(MODELS["mini"], shape=SHAPE)})


def test_smoke_run_is_labelled_and_complete(tiny, tmp_path, capsys):
    command = ["--quick", "--device", "cpu", "--texts", "16", "--rounds", "2", "--out", str(tmp_path)]
    assert benchmark.main([*command, "--precision", "fp32"]) == 0
    data = json.loads((tmp_path / "encode_mini.json").read_text())
    page = (tmp_path / "encode_mini.md").read_text()
    assert page.startswith("SMOKE TEST on a CPU") and data["facts"]["smoke"]
    assert data["facts"]["dtype"] == "float32"
    results = data["results"]
    providers = {"l2v", *(f"sentence_transformers, {n}" for n in (4, 8, 32))}
    assert {(x["workload"], x["provider"]) for x in results} == {(p, q) for p in benchmark.PROFILES for q in providers}
    assert all(x["median"] > 0 and x["error"] < 1e-5 and not x["skipped"] for x in results)
    for x in results:
        assert x["facts"]["tokens_per_second"] == pytest.approx(x["facts"]["tokens"] / x["median"])
        assert x["facts"]["padded"] == 0 if x["provider"] == "l2v" else 0 <= x["facts"]["padded"] < 1
    queries = next(x for x in results if x["workload"] == "queries")["facts"]
    assert queries["texts"] == 16 and 10 < queries["tokens"] / 16 < 35
    assert (tmp_path / "encode_mini.png").stat().st_size > 1000


def test_other_vectors_are_not_timed():
    profile = Profile("x", ["a", "b"], 4)
    vectors = np.eye(2, dtype=np.float32)

    class Places:
        def of(self, call):
            return call(), 8

    def full(texts):
        raise RuntimeError("CUDA out of memory. Tried to allocate")

    others = {"right": lambda texts: vectors, "wrong": lambda texts: vectors[::-1], "full": full}
    cpu = torch.device("cpu")
    found = {
        x.provider: x for x in benchmark.run(profile, lambda texts: vectors, others, Places(), cpu, torch.float32, 2)
    }
    assert found["l2v"].median and found["right"].median and found["right"].facts["padded"] == 0.5
    assert found["right"].facts["faster"] > 0
    assert "other vectors: 1.4e+00 apart" in found["wrong"].skipped and found["wrong"].median is None
    assert found["full"].skipped == "out of memory" and "out of memory" in benchmark.table(list(found.values()))


class Spinner:
    killed = False

    def kill(self):
        self.killed = True

    def wait(self):
        assert self.killed


def test_without_sentence_transformers_ours_is_timed(tiny, monkeypatch, capsys, tmp_path):
    def missing(folder, device):
        raise Unavailable("sentence-transformers is not installed")

    monkeypatch.setattr(benchmark, "sentence_transformer", missing)
    monkeypatch.setattr(benchmark, "PROFILES", {"queries": benchmark.PROFILES["queries"]})
    running = []
    monkeypatch.setattr(harness.subprocess, "Popen", lambda command: running.append(Spinner()) or running[-1])
    command = ["--quick", "--device", "cpu", "--texts", "4", "--rounds", "1", "--threads", "1", "--busy", "2"]
    assert benchmark.main([*command, "--out", str(tmp_path)]) == 0
    assert [x.killed for x in running] == [True, True], "they end with the benchmark"
    page = (tmp_path / "encode_mini.md").read_text()
    assert "1 thread(s), 2 busy process(es) beside it; processor time." in page
    assert "sentence-transformers is not installed" in capsys.readouterr().err
