"""The promise of docs/balance.md: no rank waits long, whatever the stage, on 8 and 16 GPUs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.communication import balance
from l2v.plan.estimate import Context, model_of
from l2v.plan.gpus import device_and_dtype
from l2v.plan.shapes import shape_of
from l2v.plan.work import Lengths
from l2v.recipe.load import load_recipe

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "balance" / "balance.json"


def drawn(name: str) -> Lengths:
    """Lengths as text has them: many short, a few long (log-normal), cut where the recipe cuts."""
    generator, count = np.random.default_rng(7), 2048
    if name == "mntp":
        lengths, segments = np.full(count, 512), np.ones(count, dtype=np.int64)
        squares = generator.uniform(0.1, 1, count) * 512**2
    elif name == "simcse":
        lengths, segments = (
            2 * np.clip(generator.lognormal(3.4, 0.5, count), 6, 128).astype(np.int64),
            np.full(count, 2),
        )
        squares = lengths**2 / 2
    else:
        parts = np.clip(generator.lognormal((3, 5), (0.4, 0.5), (count, 2)), 6, 256).astype(np.int64)
        lengths, segments = parts.sum(1), np.full(count, 2)
        squares = (parts**2).sum(1)
    return Lengths(lengths, segments, squares.astype(np.float64), real=True)


def context(recipe_name: str, name: str, lengths: Lengths, world: int) -> Context:
    recipe = load_recipe(recipe_name)
    sheet, dtype = device_and_dtype("h200", recipe)
    stage = recipe.stages[name]
    model = model_of(recipe.base, shape_of(recipe.base)[0], stage, dtype.itemsize)
    return Context(recipe, stage, model, sheet, dtype, world, 8, lengths, recipe.stage_seed(name))


@pytest.mark.parametrize("world", [8, 16])
@pytest.mark.parametrize("name", ["mntp", "simcse", "supervised"])
@pytest.mark.parametrize("recipe", balance.RECIPES)
def test_ranks_are_balanced_in_every_stage_of_both_recipes(recipe, name, world):
    found = context(recipe, name, drawn(name), world)
    works = balance.works(found, found.stage.micro_tokens, steps=3)
    assert len(works) == 3 and not any(work.idle for work in works)
    speed = found.speed(works, "none")
    assert speed.balance >= 0.95
    # The measure sees it if a rank has nothing.
    empty = replace(works[0].ranks[0], units=[[1]], squares=[[1.0]], losses=[[]])
    planted = [replace(works[0], ranks=[empty, *works[0].ranks[1:]])]
    assert found.speed(planted, "none").balance < speed.balance - 0.03


def test_the_written_table_keeps_the_promise():
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert set(found["recipes"]) == set(balance.RECIPES)
    for stages in found["recipes"].values():
        assert set(stages) == {"mntp", "simcse", "supervised"}
        for rows in stages.values():
            assert [row["gpus"] for row in rows] == [1, 8, 16]
            assert all(row["balance"] >= 0.95 and row["idle"] == 0 and 0 < row["device_share"] <= 1 for row in rows)


@pytest.mark.slow
def test_the_real_sample_is_balanced(tmp_path, capsys):
    assert balance.main(["--steps", "4", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "balance.json").read_text(encoding="utf-8"))
    rows = [row for stages in found["recipes"].values() for each in stages.values() for row in each]
    assert len(rows) == 18 and all(row["balance"] >= 0.95 for row in rows)
    assert (tmp_path / "balance.md").read_text(encoding="utf-8") == capsys.readouterr().out
