"""A stage trains longer: finished or not, with the bits of one run where the learning rate allows it."""

import json
import re

import pytest
from support.processes import ROOT

from l2v.runs.claim import CHANGEABLE_KEYS, difference
from l2v.runs.folder import read_stage

ALONE = {"stages.simcse.from": "base", "stages.supervised.from": "base", "stages.mntp.decay_epochs": 10}


def adapter(run, stage="mntp"):
    return (run / stage / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def recipe(tiny_recipe, tmp_path):
    return tiny_recipe(tmp_path, **ALONE)


def test_four_steps_then_seven_are_seven(run_here, recipe, tmp_path):
    """Also where the second run is stopped between, and with another rhythm of checkpoints and logs."""
    run_here(recipe, "--stage", "mntp", "steps=7", f"out={tmp_path / 'whole'}")
    run_here(recipe, "--stage", "mntp")
    first = adapter(tmp_path / "run")
    output = run_here(recipe, "--stage", "mntp", "steps=7", "save_every=2", "log_every=3", "skip_limit=9")
    assert "mntp: continues after step 4" in output
    assert (
        f'Next:\n  l2v search {tmp_path}/run/mntp "your query" --texts {tmp_path}/documents.jsonl\n'
        f"  l2v eval {tmp_path}/run/mntp --benchmark seb-da\n  l2v report {tmp_path}/run"
    ) in output
    assert "mntp: trained for 4 steps before; its adapter stays until that of step 7 replaces it" in output
    assert "learning rate" not in output
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole") != first
    assert {file.name for file in (tmp_path / "run" / "mntp").iterdir() if file.name.startswith(".")} == set()
    assert "already trained" in run_here(recipe, "--stage", "mntp", "steps=7")
    refused = run_here(recipe, "--stage", "mntp", "steps=5", expect=1)
    assert (
        "was claimed for 7 steps, and stages.mntp.steps is now 5: a stage can be trained longer, not shorter" in refused
    )
    rows = [json.loads(line) for line in (tmp_path / "run/mntp/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 6, 7]


def test_data_that_changed_since_the_checkpoint_are_refused(run_here, recipe, tmp_path):
    """Two documents change places: as many tokens of the same lengths, and another run."""
    run_here(recipe, "--stage", "mntp", "steps=2")
    first, file = adapter(tmp_path / "run"), tmp_path / "documents.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    same = next(i for i in range(1, len(lines)) if lines[i] != lines[0])
    file.write_text("".join([lines[same], *lines[1:same], lines[0], *lines[same + 1 :]]))
    refused = run_here(recipe, "--stage", "mntp", "steps=3", expect=1)
    assert "stage 'mntp': its data have changed since the checkpoint of step 2" in refused and "--fresh" in refused
    assert adapter(tmp_path / "run") == first
    file.write_text("".join(lines))
    assert "continues after step 2" in run_here(recipe, "--stage", "mntp", "steps=3")


def test_an_adapter_of_fewer_steps_is_not_taken_for_done(run_here, recipe, tmp_path, monkeypatch):
    """The start that was asked for more steps ends before they are trained; the next one trains them."""
    from l2v.training import stage as module

    run_here(recipe, "--stage", "mntp", "steps=2")
    first = adapter(tmp_path / "run")

    def fault(*_, **__):
        raise module.UserError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(module, "build", fault)
        run_here(recipe, "--stage", "mntp", expect=1)
    assert read_stage(tmp_path / "run" / "mntp")["adapter_steps"] == 2 and adapter(tmp_path / "run") == first
    assert "continues after step 2" in run_here(recipe, "--stage", "mntp")
    assert adapter(tmp_path / "run") != first and "adapter_steps" not in read_stage(tmp_path / "run" / "mntp")


def test_a_curve_that_ends_with_the_steps_is_said_and_later_stages_are_named(run_here, tiny_recipe, tmp_path):
    recipe = tiny_recipe(
        tmp_path, **{"stages.mntp.decay_steps": "end", "stages.mntp.steps": 2, "stages.simcse.steps": 1}
    )
    run_here(recipe, "--stage", "mntp")
    run_here(recipe, "--stage", "simcse")
    output = run_here(recipe, "stages.mntp.steps=4", expect=1)
    assert (
        "mntp: the learning rate of the first 2 steps fell towards step 2, and from now on it falls towards step 4"
        in output
    )
    assert (
        "mntp: WARNING: trained from its old adapter, which will be replaced: simcse; train each again afterwards"
        in output
    )
    assert "mntp: done" in output
    last = output.strip().splitlines()[-1]
    assert "simcse was trained from an adapter that was trained again, trained longer or replaced since" in last
    assert "--fresh --stage simcse" in last
    again = run_here(recipe, "stages.mntp.steps=4", "--stage", "simcse", "--fresh")
    assert "simcse: done" in again


def test_without_its_checkpoint_it_cannot_go_on(run_here, recipe, tmp_path):
    run_here(recipe, "--stage", "mntp", "steps=1")
    (tmp_path / "run/mntp/checkpoints/step-000001/state.json").unlink()
    output = run_here(recipe, "--stage", "mntp", "steps=2", expect=1)
    assert "it cannot train on to step 2, because its checkpoint is missing or damaged; train it from scratch" in output
    assert adapter(tmp_path / "run")


def facts(**keys):
    from l2v.recipe.load import from_dict, to_dict

    stage = {"objective": "supervised", "data": "a.jsonl", "batch": 8, "steps": 10, "lr": 1e-4, "seed": 3} | keys
    tree = {"name": "x", "base": "b", "stages": {"one": stage}}
    return {"stage": "one", "recipe": to_dict(from_dict(tree, "x.yaml")), "merged": []}


def test_what_may_change_and_what_may_not():
    free = {
        "log_every": 9, "eval_every": 5, "eval_data": "b.jsonl", "save_every": 7, "keep": 5, "skip_limit": 8,
        "micro_tokens": 999, "recompute": "layer", "steps": 11,
    }  # fmt: skip
    assert difference(facts(), facts(**free)) is None
    for key, value in {"lr": 2e-4, "batch": 4, "data": "b.jsonl", "seed": 4, "warmup": 1, "decay": "none"}.items():
        found = difference(facts(), facts(**{key: value}))
        named = "data.path" if key == "data" else key  # what differs inside a source, not the whole source
        assert f"stages.one.{named} was " in found and " and is now " in found and "--fresh" in found
        assert f"use stages.one.{named}=" in found
    row = re.search(
        r"^\| may change \| (.*?); and", (ROOT / "docs" / "training.md").read_text(encoding="utf-8"), re.MULTILINE
    )[1]
    assert set(re.findall(r"`(\w+)`", row)) == CHANGEABLE_KEYS == set(free) - {"steps"}
    # A number that is not above `steps` is how old recipes wrote the end.
    assert difference(facts(decay_steps=1), facts(decay_steps="end")) is None
    assert difference(facts(decay_steps=10), facts(decay_steps="end", steps=20)) is None
    assert difference(facts(decay_steps=11), facts(decay_steps="end")) is not None


def test_the_old_number_of_negatives_stays(run_here, tiny_recipe, tmp_path):
    """A run that began with one hard negative resumes with it, though the recipe now says auto."""
    rows = [
        {"query": f"Nummer {n}?", "positive": f"Det er {n}.", "negatives": [f"Nej, {n + 1}.", f"Nej, {n + 2}."]}
        for n in range(12)
    ]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = tiny_recipe(tmp_path, **ALONE, **{"stages.supervised.data": str(tmp_path / "two.jsonl")})
    output = run_here(recipe, "--stage", "supervised", "max_negatives=1", "steps=1")
    assert "12 of 24 hard negatives are unused: max_negatives is 1" in output
    assert "12 pairs are very few to learn from" in output
    output = run_here(recipe, "--stage", "supervised", "steps=2")
    assert "continues after step 1" in output and "12 of 24 hard negatives are unused" in output
    output = run_here(recipe, "--stage", "supervised", "steps=1", "--fresh")
    assert "24 hard negatives, up to 2 a row" in output and "unused" not in output


def test_own_negatives_without_any_are_refused(run_here, tiny_recipe, tmp_path, write_jsonl):
    data = write_jsonl(tmp_path / "none.jsonl", [{"query": f"{n}?", "positive": f"{n}."} for n in range(6)])
    recipe = tiny_recipe(tmp_path, **ALONE, **{"stages.supervised.data": data})
    output = run_here(recipe, "--stage", "supervised", "hard_negatives=own", expect=1)
    assert f"hard_negatives: own compares a query with its own hard negatives, and no row of {data} has any" in output
