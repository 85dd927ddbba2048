"""Steps with NaN or Inf are skipped: no weight changes, they are counted, and too many in a row end the run."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training.test_ranks import broken_base

from l2v.training import checkpoint, loop

ALONE = {"stages.simcse.from": "base", "stages.supervised.from": "base"}


@pytest.fixture
def recipe(tiny_recipe, tmp_path, tiny_config, bos_tokenizer_folder, write_jsonl, sentences):
    """recipe(bad rows, **changes): supervised, 6 steps of 4 pairs, where those rows hold a text with an infinite vector."""

    def write(bad: list[int], **changes) -> Path:
        base = broken_base(tmp_path / "base", tiny_config, bos_tokenizer_folder, "%")
        pairs = [{"query": f"{i}: hvem?", "positive": text} for i, text in enumerate(sentences[:24])]
        for row in bad:
            pairs[row]["positive"] = "100 %"
        common = {"base.model": base, "base.init": "pretrained", "base.config": None, "base.tokenizer": None}
        common |= {"stages.supervised.data": write_jsonl(tmp_path / "rows.jsonl", pairs)}
        common |= {f"stages.supervised.{k}": v for k, v in {"save_every": 1, "steps": 6, "keep": 9}.items()}
        return tiny_recipe(tmp_path, **ALONE, **common, **changes)

    return write


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_step_that_is_not_finite_moves_nothing(recipe, run_here, tmp_path, zero, precision):
    path = recipe([19], **{"zero.stage": zero, "base.precision": precision})
    output = run_here(path, "--stage", "supervised")
    run = tmp_path / "run/supervised"
    found = [row["step"] for row in rows(run) if row["loss"] is None]
    assert len(found) == 1 and [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5, 6]
    (bad,) = found
    assert f"WARNING: step {bad}: the embedding of the positive of example 19 is NaN or Inf" in output
    assert "so the step is skipped (1 in a row; training stops at 3)" in output
    # DeepSpeed tells no norm under ZeRO 0 in fp32
    assert [row["step"] for row in rows(run) if row["gradient_norm"] is None] == [bad]
    assert [row.get("skipped_steps", 0) for row in rows(run)] == [int(step >= bad) for step in range(1, 7)]
    states = {step: load_file(run / f"checkpoints/step-{step:06d}" / checkpoint.TENSORS) for step in range(1, 7)}
    if bad > 1:
        assert all(torch.equal(value, states[bad][name]) for name, value in states[bad - 1].items())
    assert bad == 6 or any(not torch.equal(value, states[6][name]) for name, value in states[bad].items())
    assert all(value.isfinite().all() for value in states[6].values())


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_one_infinite_gradient_skips_its_step(recipe, run_here, tmp_path, precision, monkeypatch):
    """Loss and embeddings are finite, and DeepSpeed does not search the gradients itself."""
    real, seen = loop.broken_gradients, []

    def third_is_infinite(engine):
        seen.append(engine)
        if len(seen) == 3:
            [gradients] = engine.optimizer.averaged_gradients.values()
            gradients[0].view(-1)[1] = float("inf")
        return real(engine)

    monkeypatch.setattr(loop, "broken_gradients", third_is_infinite)
    path = recipe([], **{"zero.stage": 1, "base.precision": precision})
    output = run_here(path, "--stage", "supervised")
    run = tmp_path / "run/supervised"
    assert (
        "WARNING: step 3: a gradient is NaN or Inf, so the step is skipped (1 in a row; training stops at 3)" in output
    )
    assert len(seen) == 6 and [row["step"] for row in rows(run) if row["gradient_norm"] is None] == [3]
    states = [load_file(run / f"checkpoints/step-{step:06d}" / checkpoint.TENSORS) for step in (2, 3, 4)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert any(not torch.equal(value, states[2][name]) for name, value in states[1].items())


def test_a_run_that_left_a_step_out_goes_on_with_the_same_bits(recipe, run_here, tmp_path):
    """The count of updates that Adam has seen is not the count of steps."""
    path = recipe([19])
    run_here(path, "--stage", "supervised", f"out={tmp_path / 'whole'}")
    run_here(path, "--stage", "supervised")
    run = tmp_path / "run/supervised"
    bad = next(row["step"] for row in rows(run) if row["loss"] is None)
    for newer in range(bad + 1, 7):
        (run / f"checkpoints/step-{newer:06d}").rename(tmp_path / f"gone-{newer}")
    (run / "adapter").rename(tmp_path / "adapter")
    output = run_here(path, "--stage", "supervised")
    assert f"continues after step {bad}" in output or bad == 6
    name = "adapter/adapter_model.safetensors"
    assert (run / name).read_bytes() == (tmp_path / "whole/supervised" / name).read_bytes()


def test_too_many_in_a_row_end_the_run_and_the_batch_is_kept(recipe, run_here, tmp_path):
    path = recipe(list(range(24)), **{"stages.supervised.skip_limit": 2})
    output = run_here(path, "--stage", "supervised", expect=1)
    assert "(2 steps in a row), so it was not applied; " in output and "Traceback" not in output
    run = tmp_path / "run/supervised"
    kept = load_file(run / "broken/step-000002-rank-0.safetensors")
    assert len(kept["0.example_ids_S"]) == 8 and kept["0.input_ids_T"].numel() == kept["0.lengths_S"].sum()
    assert checkpoint.newest(run / "checkpoints").step == 2 and not (run / "adapter").exists()
    assert "Every rank's part of the batch is in" in output
