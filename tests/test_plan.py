"""`l2v plan`: what it tells, and what it refuses, with nothing downloaded."""

import json

import pytest

from l2v import plan
from l2v.plan.gpus import SHEETS


def planned(capsys, *arguments, expect=0):
    assert plan.main([*arguments, "--json"]) == expect
    return json.loads(capsys.readouterr().out)


def test_the_shipped_recipe_on_eight_gpus(capsys):
    found = planned(capsys, "llama3-8b-da", "--gpu", "h200", "--gpus", "8")
    assert found["gpus"] == 8 and found["shape_from"] == "base.config"
    assert set(found["stages"]) == {"mntp", "simcse", "supervised"}
    assert plan.main(["llama3-8b-da", "--gpu", "h200", "--gpus", "8"]) == 0
    text = capsys.readouterr().out
    assert "not calibrated by a run on this GPU" in text and "memory of a GPU, GiB" in text


def test_twice_the_steps_take_twice_the_time(capsys):
    def hours(steps):
        found = planned(capsys, "llama3-8b-da", "--gpu", "h200", "--stage", "mntp", f"steps={steps}")
        return found["stages"]["mntp"]["speed"]["hours"]

    assert hours(200) == pytest.approx(2 * hours(100), rel=1e-6)


def test_what_cannot_fit_says_what_would(capsys):
    assert plan.main(["llama3-8b-da", "--gpu", "rtx4090", "--stage", "mntp"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("l2v: ") and "mntp" in said


@pytest.mark.parametrize("gpu", SHEETS)
def test_every_gpu_of_the_table_can_be_planned_for(gpu, capsys):
    plan.main(["llama3-8b-da", "--gpu", gpu, "--gpus", "8", "--stage", "simcse"])
    assert gpu in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["llama3-8b-da", "--gpu", "h9000"], "h9000"),
        (["llama3-8b-da", "--gpu", "h200", "--gpus", "0"], "--gpus and --per-node are at least 1"),
        (["llama3-8b-da", "--gpu", "h200", "base.config=null", "base.model=nobody/nothing"], "nobody/nothing"),
        (["no-such-recipe", "--gpu", "h200"], "there is no recipe 'no-such-recipe'"),
    ],
)
def test_bad_input_is_one_sentence(arguments, says, capsys):
    assert plan.main(arguments) != 0
    said = capsys.readouterr().err
    assert said.startswith("l2v: ") and says in said and len(said.strip().splitlines()) == 1
