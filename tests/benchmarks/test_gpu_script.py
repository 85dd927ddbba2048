"""benchmarks/gpu.sh with a stand-in for Python: which steps it runs, and what a red test keeps from running."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.sh"


@pytest.fixture
def run(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "ran $*"\ncase "$*" in *"$RED"*) exit 3;; esac\n')
    python.chmod(0o755)

    def run(*parts, red="nothing"):
        environment = os.environ | {"PYTHON": str(python), "RED": red}
        command = ["bash", str(SCRIPT), str(tmp_path / "out"), *parts]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        return (
            done.returncode,
            [line.split(":")[0][3:] for line in done.stdout.splitlines() if line.startswith("==")],
            done,
        )

    return run


def test_all_parts_tests_first(run):
    code, steps, done = run()
    assert (code, steps) == (
        0, ["tests-info_nce", "tests-attention", "attention", "contrastive", "gradient_cache"]
    )  # fmt: skip
    assert done.stdout.count("--quick") == 3


def test_the_parts_of_the_fused_layer(run):
    parts = ["step_ops", "lora_linear", "linear_cross_entropy", "fp8"]
    code, steps, _ = run(*parts, red="test_step_ops_gpu.py")
    tests = [f"tests-{part}" for part in parts]
    assert (code, steps) == (1, [*tests, "fused_layer", "step_ops", "linear_cross_entropy", "fp8"])
    code, steps, done = run(*parts)
    assert code == 0 and "not run" not in done.stdout


def test_a_part_and_a_red_test(run):
    code, steps, done = run("info_nce", red="test_info_nce_gpu.py")
    assert (code, steps) == (1, ["tests-info_nce", "contrastive"])
    assert "contrastive: not run, the tests are red" in done.stdout
    code, steps, _ = run("gradient_cache", red="gradient_cache")
    assert (code, steps) == (1, ["gradient_cache"])


def test_the_long_parts_are_asked_for(run, monkeypatch):
    monkeypatch.setenv("LLM2VEC", "/some/packages")
    monkeypatch.setenv("WORK", "/some/weights")
    code, steps, done = run("train_step", "encode")
    assert (code, steps) == (0, ["train_step", "encode"])
    assert "-m benchmarks.train_step.bench --minutes 8.5" in done.stdout and "--llm2vec /some/packages" in done.stdout
    assert done.stdout.count("--work /some/weights") == 2
    monkeypatch.delenv("LLM2VEC")
    assert "--llm2vec" not in run("train_step")[2].stdout
