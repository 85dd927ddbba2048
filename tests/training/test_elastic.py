"""A run that resumes with another number of ranks or ZeRO stage: every example once per epoch, the same losses."""

import json
from collections import Counter

import pytest
from support.processes import finish, start_ranks

CHANGES = {"steps": 12, "keep": 9, "save_every": 4, "from": "base", "batch": 6, "micro_tokens": 128}
SOFT = {"scale": 3, "lr": 1e-3}  # a loss near zero would be all rounding
EPOCHS = {"mntp": (48, 8), "simcse": (40, 7), "supervised": (24, 4)}  # examples and steps of one


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["mntp", "simcse", "supervised"])
def test_four_ranks_then_two_then_three(tmp_path, tiny_recipe, monkeypatch, stage):
    """Both changes of ranks fall within or between epochs; ranks write down what they were given (L2V_CHECK=1)."""
    monkeypatch.setenv("L2V_CHECK", "1")
    changes = CHANGES if stage == "mntp" else CHANGES | SOFT
    recipe = tiny_recipe(tmp_path, **{f"stages.{stage}.{k}": v for k, v in changes.items()})
    whole, run = tmp_path / "whole" / stage, tmp_path / "run" / stage
    finish(start_ranks([[recipe, "--stage", stage, f"out={whole.parent}"]] * 2))
    for at, (world, zero) in enumerate(((4, 3), (2, 1), (3, 2))):
        # It runs to its end; then what came after the change of ranks is taken away, as if it had been killed there.
        ranks = start_ranks([[recipe, "--stage", stage, f"zero.stage={zero}"]] * world)
        said = finish(ranks)[0]
        if at:
            assert f"continues after step {4 * at}" in said
        if at < 2:
            for newer in range(4 * (at + 2), 13, 4):
                (run / f"checkpoints/step-{newer:06d}").rename(tmp_path / f"gone-{at}-{newer}")
            (run / "adapter").rename(tmp_path / f"gone-adapter-{at}")
    seen: dict[int, Counter] = {}
    taken = {1: (4, range(4)), 2: (2, range(4, 8)), 3: (3, range(8, 12))}
    for file in sorted((run / "audit").glob("rank-*.jsonl")):
        for line in map(json.loads, file.read_text().splitlines()):
            if any(line["world"] == world and line["step"] in steps for world, steps in taken.values()):
                seen.setdefault(line["step"], Counter()).update(line["examples"])
    assert sorted(seen) == list(range(12))
    examples, steps = EPOCHS[stage]
    for first in range(0, 12, steps):
        epoch = sum((seen[step] for step in range(first, min(first + steps, 12))), Counter())
        assert set(epoch.values()) == {1}, f"an example twice in the epoch of step {first}"
        if first + steps <= 12:
            assert epoch == Counter(range(examples)), f"an example is missing in the epoch of step {first}"
    losses = [[row["loss"] for row in rows(folder)] for folder in (whole, run)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[1]) == 12


@pytest.mark.slow
def test_two_runs_of_a_deterministic_recipe_have_the_same_bits(tmp_path, tiny_recipe):
    recipe = tiny_recipe(tmp_path, deterministic=True)
    finish(start_ranks([[recipe, f"out={tmp_path / 'one'}"]] * 2))
    finish(start_ranks([[recipe, f"out={tmp_path / 'two'}"]] * 2))
    for stage in ("mntp", "simcse", "supervised"):
        one, two = (tmp_path / name / stage / "adapter/adapter_model.safetensors" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes(), stage
