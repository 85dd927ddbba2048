"""What a stage is told at its start: balance, device share, and the micro-batch that `recompute: auto` chooses and keeps."""

import dataclasses

import numpy as np
import pytest
import torch

from l2v.model.memory import TailMemory
from l2v.plan import advice, gpus
from l2v.plan.shapes import shape_of
from l2v.recipe.load import load_recipe
from l2v.training.advice import Question
from l2v.training.faults import is_chosen, read_budget, write_budget
from l2v.training.memory import execution_mode

GIB = 2**30


@dataclasses.dataclass
class Examples:
    """Pairs of 240 to 300 tokens."""

    lengths: np.ndarray
    segments: np.ndarray
    notes: tuple = ()
    mixture: None = None


def question(world: int, free: int, *changes: str, name: str = "supervised", may_choose: bool = True) -> Question:
    recipe = load_recipe("llama3-8b-da", list(changes), name)
    stage = recipe.stages[name]
    generator = np.random.default_rng(1)
    examples = Examples(generator.integers(240, 300, 2048), np.full(2048, 2))
    mode = execution_mode(stage, fused=True, kernels=True)

    def end(tokens: int) -> TailMemory:
        return TailMemory(kept=tokens * 8192)

    return Question(
        recipe, name, stage, examples, shape_of(recipe.base)[0], torch.bfloat16, world, world, stage.micro_tokens, may_choose,
        free, mode, end,
    )  # fmt: skip


@pytest.fixture
def on_h200(monkeypatch):
    """The predictions of a machine with an H200; only the device is asked for, nothing runs on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(advice, "at_hand", lambda dtype: gpus.named("h200"))


def test_on_80_gb_smaller_micro_batches_are_taken_instead_of_recomputing_layers(on_h200):
    found = advice.advise(question(1, 60 * GIB))
    assert found.recompute in ("none", "cheap") and 12_000 < found.micro_tokens < 25_000
    assert found.cost.multiprocessors == 132
    assert found.lines[-1].startswith(
        f"recompute: auto takes micro_tokens {found.micro_tokens:,}, the fastest of at most 32,768"
    )


def test_what_fits_stays_as_the_recipe_says(on_h200):
    """512 pairs on 16 GPUs have about 8,700 tokens each: 40 GiB without recompute."""
    found = advice.advise(question(16, 60 * GIB))
    assert (found.recompute, found.micro_tokens) == ("none", 32768)
    assert found.lines[0].startswith(("balance of ranks 0.9", "balance of ranks 1.00"))
    assert not any("micro_tokens" in line for line in found.lines)


def test_a_run_that_resumes_keeps_its_micro_batches(on_h200):
    found = advice.advise(question(1, 60 * GIB, may_choose=False))
    assert (found.recompute, found.micro_tokens) == (None, 32768)
    assert advice.advise(question(1, 60 * GIB, "recompute=cheap")).micro_tokens == 32768  # a recipe that names one


def test_a_stage_that_the_host_limits_says_so(on_h200):
    found = advice.advise(question(8, 60 * GIB, "batch=16", name="simcse"))
    assert "device share 0." in found.lines[0]
    assert (
        found.lines[1].startswith("the host is the limit, with ")
        and "GPUs instead of 8 would be as fast" in found.lines[1]
    )


def test_on_a_cpu_ranks_are_balanced_by_tokens():
    found = advice.advise(question(8, 60 * GIB))
    assert (found.cost, found.recompute, found.micro_tokens) == (None, None, 32768)
    assert found.lines == ["balance of ranks 1.00 (mean over largest number of tokens)"]
    assert advice.advise(question(1, 60 * GIB)).lines == []


def test_a_choice_is_kept_for_the_recipe_that_it_was_made_for(tmp_path):
    assert read_budget(tmp_path, 32768) == 32768 and not is_chosen(tmp_path, 32768)
    write_budget(tmp_path, 14080, chosen_from=32768)
    assert read_budget(tmp_path, 32768) == 14080 and is_chosen(tmp_path, 32768)
    assert read_budget(tmp_path, 8192) == 8192 and not is_chosen(tmp_path, 8192)
    write_budget(tmp_path, 7040)  # memory ran out: holds whatever the recipe says
    assert read_budget(tmp_path, 32768) == read_budget(tmp_path, 8192) == 7040 and is_chosen(tmp_path, 8192)
    (tmp_path / "budget.json").write_text("{damaged")
    assert read_budget(tmp_path, 32768) == 32768
