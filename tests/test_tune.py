"""`l2v tune`: the search, the file next to the recipe, and training that applies it."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from support.forked import start
from support.processes import training_environment

from l2v.commands import tune as tune_command
from l2v.errors import UserError
from l2v.recipe import Mntp, Source
from l2v.recipe.load import load_recipe
from l2v.tuning import search as tune
from l2v.tuning.apply import apply_tuned, place, tuned_file


def stage(micro_tokens=1000, length=50):
    return Mntp(data=[Source("x")], batch=4, steps=4, lr=1e-3, micro_tokens=micro_tokens, length=length)


def search(rate, seconds=1e9, options=None, **kwargs):
    """A search in which `rate(candidate)` is the tokens/s, or a string that says why there are none."""
    calls = []

    def measure(candidate):
        calls.append((candidate.micro_tokens, candidate.recompute))
        found = rate(candidate)
        if isinstance(found, str):
            candidate.failed = found
        else:
            candidate.rates.append(found)

    return tune.Search(stage(**kwargs), measure, seconds, **options or {}), calls


def fits(limit):
    """Larger is faster, up to what fits; less recomputing is faster and takes more."""
    cost = {"auto": 1, "none": 2, "cheap": 1, "layer": 0.5}
    gain = {"auto": 1, "none": 1.2, "cheap": 1, "layer": 0.8}

    def rate(c):
        fit = c.micro_tokens * cost[c.recompute] <= limit
        return 100 * c.micro_tokens**0.5 * gain[c.recompute] if fit else "out of memory"

    return rate


def test_the_search_climbs_to_what_fits():
    found, calls = search(fits(9000))
    best = found.run()
    assert (best.micro_tokens, best.recompute) == (8000, "auto")
    assert [n for n, how in calls if how == "auto"][:5] == [1000, 2000, 4000, 8000, 16000]
    assert found.tried[16000, "auto", "l2v", "default"].failed == "out of memory" and (8000, "none") in calls
    again = [call for call in set(calls) if calls.count(call) == 3]
    assert len(best.rates) == 3 and len(set(calls)) == len(found.tried)
    assert len(again) == 4 and (1000, "auto") in again  # the recipe's own settings and the best three
    assert len(set(calls[-4:])) == 4 and calls[-8:-4] == calls[-4:]  # in turn, not each twice in a row


def test_it_takes_less_recomputing_where_there_is_room():
    found, _ = search(lambda c: 120.0 if c.recompute == "none" else 100.0)
    assert found.run().recompute == "none"


def test_it_goes_down_from_a_recipe_that_does_not_fit():
    found, calls = search(fits(300))
    assert found.run().micro_tokens == 250 and calls[0] == (1000, "auto")
    found, _ = search(lambda c: "out of memory")
    with pytest.raises(UserError, match="no micro-batch of the stage runs here; the smallest, micro_tokens 62"):
        found.run()


def test_other_backends_and_timed_kernels_come_last():
    def rate(c):
        return 100.0 + 50 * (c.kernels == "timed") + {"l2v": 0, "sdpa": -10, "flash_attention_2": 20}[c.backend]

    found, _ = search(rate, options={"backends": ["sdpa", "flash_attention_2"], "timed": True})
    best = found.run()
    assert (best.backend, best.kernels) == ("flash_attention_2", "default")  # timed kernels are l2v's own
    tried = {(c.backend, c.kernels) for c in found.tried.values()}
    assert tried == {("l2v", "default"), ("sdpa", "default"), ("flash_attention_2", "default")}
    found, _ = search(rate, options={"backends": ["sdpa"], "timed": True})
    best = found.run()
    assert (best.backend, best.kernels) == ("l2v", "timed") and str(best).endswith("backend l2v, kernels timed")


def test_recompute_cheap_does_not_go_to_plain_layers():
    found, _ = search(
        lambda c: {"cheap": 130.0}.get(c.recompute, 100.0) + 50 * (c.backend == "sdpa"), options={"backends": ["sdpa"]}
    )
    best = found.run()
    assert (best.backend, best.recompute) == ("sdpa", "none")
    found, _ = search(lambda c: 100.0, options={"backend": "sdpa"})
    found.run()
    assert {(c.backend, c.recompute) for c in found.tried.values()} == {("sdpa", x) for x in ("auto", "none", "layer")}


@pytest.mark.parametrize(
    ("change", "others"),
    [
        ({}, ["sdpa"]),
        ({"base.layers": "fused"}, []),
        ({"base.backend": "sdpa", "stages.simcse.attention_dropout": 0}, ["l2v"]),
        ({"stages.mntp.recompute": "cheap"}, []),
    ],
    ids=["default", "fused", "sdpa", "cheap"],
)
def test_only_what_the_recipe_allows_is_tried(change, others, tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    recipe = load_recipe(str(tiny_recipe(tmp_path, **change)))
    assert tune.alternatives(recipe, "mntp") == (others, False)
    if not change:  # its noise has no other backend
        assert tune.alternatives(recipe, "simcse") == ([], False)


def test_time_ends_it():
    found, calls = search(fits(1e9), seconds=-1)
    assert found.run().micro_tokens == 1000 and calls == [(1000, "auto")]


def test_no_micro_batch_is_shorter_than_a_text():
    found, calls = search(lambda c: 100.0, micro_tokens=60, length=50)
    found.run()
    assert min(n for n, _ in calls) == 50


def noisy(rates, work=None, **kwargs):
    """A search on rates by (micro_tokens, recompute), each a list that repeats; all others have 90."""
    runs, calls = {}, []

    def measure(candidate):
        key = (candidate.micro_tokens, candidate.recompute)
        calls.append(key)
        found = rates.get(key, [90.0])
        candidate.rates.append(found[runs.get(key, 0) % len(found)])
        candidate.work = work
        runs[key] = runs.get(key, 0) + 1

    return tune.Search(stage(**kwargs), measure, 1e9), calls


def test_noise_is_not_called_a_winner():
    """One lucky run decides nothing: the recipe's own settings stay unless every run of another is faster."""
    found, _ = noisy({(1000, "auto"): [100.0, 97.0, 103.0], (2000, "auto"): [111.0, 101.0, 99.0]})
    chosen = found.run()
    assert chosen is found.own and chosen.micro_tokens == 1000
    lucky = found.tried[2000, "auto", "l2v", "default"]
    assert lucky.rate > chosen.rate and lucky.spread == pytest.approx(12 / 101)
    assert tune.verdict(chosen, found.own) == (
        "no other setting is faster than the recipe's own beyond the spread of the runs"
    )


def test_what_is_faster_in_every_run_wins():
    found, _ = noisy({(1000, "auto"): [100.0, 97.0, 103.0], (1000, "none"): [108.0, 104.0, 110.0]})
    chosen = found.run()
    assert (chosen.micro_tokens, chosen.recompute) == (1000, "none")
    assert tune.verdict(chosen, found.own).endswith(
        "recompute none, backend l2v: 8% faster than the recipe's own settings, in every run"
    )


def test_no_micro_batch_beyond_the_work_of_a_step_is_timed():
    """A step has 700 tokens: 1000, 1500, 2000 and all above do the same work, so only the recipe's is timed."""
    found, calls = noisy({}, work=700)
    assert found.run() is found.own
    assert max(micro for micro, _ in calls) == 1000 and {micro for micro, _ in calls if micro > 700} == {1000}
    found, calls = noisy({(600, "auto"): [150.0]}, work=700, micro_tokens=300)
    assert found.run().micro_tokens == 600
    assert sum(micro >= 700 for micro, how in set(calls) if how == "auto") == 1  # one that holds the whole step


def test_a_single_run_is_no_winner_either():
    """Time for the search but not for its repetition."""
    found, _ = noisy({(2000, "auto"): [140.0]})
    measured = found.measure

    def measure(candidate):
        measured(candidate)
        if len(found.tried) > 4:
            found.ends = -1.0

    found.measure = measure
    chosen = found.run()
    assert chosen is found.own and len(chosen.rates) == 1
    assert "with more --minutes candidates are run more than once" in tune.verdict(chosen, found.own)


@pytest.fixture
def tuned(tiny_recipe, tmp_path):
    """tuned(settings, **place) -> the recipe's path, with a file of `l2v tune` beside it."""
    path = tiny_recipe(tmp_path)

    def write(settings, names=("mntp",), **where):
        settings = settings and {"backend": "l2v", "kernels": "default"} | settings
        data = {"place": place(1) | where, "stages": {name: {"settings": settings} for name in names}}
        tuned_file(str(path)).write_text(json.dumps(data))
        return str(path)

    return write


def applied(path, *overrides):
    recipe = load_recipe(path, overrides)
    return recipe.stages["mntp"], apply_tuned(recipe, path, overrides, 1)


def test_training_takes_it_up_but_for_what_the_user_named(tuned):
    path = tuned({"micro_tokens": 256, "recompute": "cheap"})
    stage, told = applied(path)
    assert (stage.micro_tokens, stage.recompute) == (256, "cheap")
    assert told == ["mntp: micro_tokens 256, recompute cheap, as tiny.tuned.json has it"]
    stage, told = applied(path, "stages.mntp.micro_tokens=512")
    assert (stage.micro_tokens, stage.recompute) == (512, "cheap")
    assert told == ["mntp: recompute cheap, as tiny.tuned.json has it"]
    assert applied(path, "mntp.micro_tokens=512", "stages.mntp.recompute=layer")[1] == []
    assert applied(path, "stages.simcse.micro_tokens=512")[0].micro_tokens == 256


def test_a_backend_is_taken_up_where_all_stages_agree(tuned, monkeypatch):
    monkeypatch.setenv("L2V_AUTOTUNE", "0")  # so that it is put back afterwards whatever is set in between
    monkeypatch.delenv("L2V_AUTOTUNE")
    settings = {"micro_tokens": 512, "recompute": "none", "backend": "sdpa", "kernels": "timed"}

    def backend(path, *overrides, stage=None):
        recipe = load_recipe(path, overrides, stage)
        told = apply_tuned(recipe, path, overrides, 1)
        return recipe.base.backend, told

    path = tuned(settings)
    assert backend(path)[0] == "l2v" and "L2V_AUTOTUNE" not in os.environ  # the other stages were not tuned
    path = tuned(settings, names=("mntp", "simcse", "supervised"))
    found, told = backend(path, "stages.simcse.attention_dropout=0")
    assert found == "sdpa" and told[0] == "base.backend sdpa, as tiny.tuned.json has it"
    assert os.environ["L2V_AUTOTUNE"] == "1" and told[1].startswith("kernels timed")
    assert backend(path, "base.backend=l2v")[0] == "l2v"
    found, told = backend(path)  # views by attention dropout: only l2v addresses its noise
    assert (
        found == "l2v" and told[0].startswith("base.backend sdpa is not applied: ") and "attention_dropout" in told[0]
    )
    monkeypatch.setenv("L2V_AUTOTUNE", "0")  # the user's word
    backend(path, "stages.simcse.attention_dropout=0")
    assert os.environ["L2V_AUTOTUNE"] == "0"


@pytest.mark.parametrize(
    "where", [{"device": "NVIDIA H200"}, {"processes": 8}, {"torch": "1.0"}], ids=lambda w: next(iter(w))
)
def test_what_was_tuned_elsewhere_is_not_applied(where, tuned):
    stage, told = applied(tuned({"micro_tokens": 256, "recompute": "cheap"}, **where))
    assert (stage.micro_tokens, stage.recompute) == (512, "auto")
    assert (
        len(told) == 1
        and f"was tuned on {next(iter(where.values()))} (here: " in told[0]
        and "is not applied" in told[0]
    )


@pytest.mark.parametrize("settings", [{}, {"micro_tokens": "many", "recompute": "cheap"}])
def test_a_damaged_file_is_said(settings, tuned):
    with pytest.raises(UserError, match=r"tiny\.tuned\.json is damaged: run l2v tune again"):
        applied(tuned(settings))


def one_rank(command, *, env, **_):
    """What `subprocess.run` gives for a run of the training program, which is here the one rank of a launcher."""
    assert command[:3] == [sys.executable, "-m", "l2v.train"] and command[-2:] == ["--processes", "1"]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    process = start(command[1:], training_environment() | env | place)
    output = process.communicate(timeout=300)[0]
    return subprocess.CompletedProcess(command, process.returncode, output)


def test_tune_measures_training_and_training_takes_it_up(tiny_recipe, tmp_path, run_here, monkeypatch):
    """For real: a few runs of the training program, the file, and a run that reads it and resumes with it."""
    path = str(tiny_recipe(tmp_path))
    monkeypatch.setattr(tune, "subprocess", SimpleNamespace(**vars(subprocess) | {"run": one_rank}))
    assert tune_command.main([path, "--stage", "mntp", "--minutes", "0", "--steps", "2", "--processes", "1"]) == 0
    found = json.loads(tuned_file(path).read_text())
    entry = found["stages"]["mntp"]
    assert found["place"] == place(1) and entry["settings"] == {
        "micro_tokens": 512, "recompute": "auto", "backend": "l2v", "kernels": "default"
    }  # fmt: skip
    assert entry["candidates"][0]["rates"][0] > 0 and entry["tokens_per_second"] > 0
    entry["settings"]["micro_tokens"] = 256
    tuned_file(path).write_text(json.dumps(found))
    assert "mntp: micro_tokens 256, recompute auto, as tiny.tuned.json has it" in run_here(path, "--stage", "mntp")
    # Tuned again after it began: it resumes with the settings that it began with.
    entry["settings"]["micro_tokens"] = 128
    tuned_file(path).write_text(json.dumps(found))
    assert "mntp: micro_tokens 256, recompute auto, as it began" in run_here(path, "--stage", "mntp")


@pytest.mark.slow
def test_a_mistake_in_the_recipe_is_said_by_the_first_run(tiny_recipe, tmp_path):
    path = str(tiny_recipe(tmp_path, **{"stages.mntp.data": str(tmp_path / "no.jsonl")}))
    with pytest.raises(UserError, match=r"stage 'mntp' does not train: .*no\.jsonl"):
        tune_command.main([path, "--stage", "mntp", "--minutes", "0", "--processes", "1"])
