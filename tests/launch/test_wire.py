"""Bytes of every collective of real runs, counted in the rank's process, against what `l2v plan` says of them."""

import json
import subprocess
import sys
from collections import Counter

import pytest
import torch
from support.processes import ROOT, finish, training_environment

from l2v.plan import gpus, wire
from l2v.plan.estimate import model_of
from l2v.plan.shapes import shape_of
from l2v.plan.work import Share, lengths_of, work_of
from l2v.recipe.load import load_recipe
from l2v.training.engine import deepspeed_config

STAGES = ("mntp", "simcse", "supervised", "groups")
STEPS = 4
FLAG = 32
"""Bytes up to which an all-reduce is a flag, a norm or a count."""
SHARDED = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
# ranks, ZeRO's part of the configuration. The tiny weights all count as small for ZeRO-3 as it is.
SETTINGS = {
    "zero0x2": (2, {"stage": 0}),
    "zero1x4": (4, {"stage": 1}),
    "zero2x2": (2, {"stage": 2}),
    "zero3x4": (4, {"stage": 3} | SHARDED),
    "zero3x2-small": (2, {"stage": 3}),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_recipe, write_jsonl, sentences):
    """Several micro-batches a step in every stage; queries of all ranks meet in one of them, and owners are asked for."""
    groups = {"objective": "supervised", "length": 48, "lr": 1e-3, "negatives": "micro", "group": 2, "batch": 4}
    folder = tmp_path_factory.mktemp("wire")
    pairs = [{"query": f"Hvem er {i}?", "positive": text} for i, text in enumerate(sentences[:24])]
    changes = {"stages.groups": groups | {"data": write_jsonl(folder / "groups.jsonl", pairs), "micro_tokens": 120}}
    changes |= {
        f"stages.{name}.{key}": value for name in STAGES for key, value in {"steps": STEPS, "from": "base"}.items()
    }
    changes |= {"stages.mntp.batch": 9, "stages.mntp.micro_tokens": 128, "stages.simcse.batch": 7}
    changes |= {"stages.simcse.micro_tokens": 64, "stages.supervised.batch": 4, "stages.supervised.micro_tokens": 120}
    changes |= {
        "stages.supervised.directions": ["query_to_doc", "doc_to_query"],
        "stages.supervised.hard_negatives": "own",
    }
    return tiny_recipe(folder, **changes)


def measured(recipe, setting: str) -> list[list]:
    """Rows of rank 0 from one `engine.step` to the next; every rank must say the same."""
    world, zero = SETTINGS[setting]
    folder = recipe.parent / setting
    folder.mkdir()
    config = folder / "zero.json"
    config.write_text(json.dumps({"zero_optimization": zero}))
    program = [sys.executable, str(ROOT / "benchmarks" / "communication" / "count_bytes.py"), str(folder / "bytes")]
    arguments = [str(recipe), f"out={folder / 'run'}", f"zero.config={config}"]
    environment = training_environment() | {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(world)}
    finish([
        subprocess.Popen(
            [*program, *arguments], env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world)
    ])  # fmt: skip
    found = [json.loads((folder / f"bytes.{rank}.json").read_text()) for rank in range(world)]
    assert all(other == found[0] for other in found[1:])
    return found[0]


def planned(recipe, setting: str, name: str) -> list[list[wire.Transfer]]:
    """Of each step."""
    world, zero = SETTINGS[setting]
    read = load_recipe(str(recipe), [f"zero.stage={zero['stage']}"])
    stage = read.stages[name]
    lengths = lengths_of(read, name)
    assert lengths.real
    model = model_of(read.base, shape_of(read.base)[0], stage, 4)
    config = deepspeed_config(stage, read.zero, torch.float32, model.trainable)["zero_optimization"] | zero
    work = work_of(lengths, stage, world, read.stage_seed(name), steps=STEPS)
    assert len(work) == STEPS
    return [wire.transfers(model, stage, config, 4, world, each.busiest) for each in work]


def by_kind(rows) -> dict[str, int]:
    found = Counter()
    for what, size in rows:
        if what in ("all-reduce", "all-gather", "reduce-scatter") and not (what == "all-reduce" and size <= FLAG):
            found[what] += size
    return dict(found)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_bytes_of_a_run_are_those_of_the_plan(recipe, setting):
    steps = measured(recipe, setting)
    assert len(steps) == len(STAGES) * STEPS + 1
    for at, name in enumerate(STAGES):
        plan = planned(recipe, setting, name)
        for step in (2, 3):  # what stands between two updates; ZeRO-3 learns its order in the first
            rows = steps[at * STEPS + step]
            expected = by_kind((each.op, each.bytes) for each in plan[step])
            assert by_kind(rows) == expected, (name, step, sorted(Counter(map(tuple, rows)).items()), plan[step])
            flags = [size for what, size in rows if what == "all-reduce" and size <= FLAG]
            assert sum(flags) < 200


LLAMA = wire.Transfer("gradients", "all-reduce", 4 * 41_943_040, 1)
H200 = gpus.named("h200")


def test_a_rank_sends_its_share_of_a_ring():
    assert LLAMA.sent(8) == 2 * 7 / 8 * LLAMA.bytes
    assert wire.Transfer("x", "all-gather", 800, 1).sent(8) == 700


def test_time_of_a_collective_by_hand():
    inside = wire.seconds(LLAMA, 8, 8, H200)
    assert inside == pytest.approx(8.4e-6 + 14 * 3.4e-6 + 1.75 * LLAMA.bytes / (0.8 * 450e9))
    two = wire.seconds(LLAMA, 16, 8, H200)  # a port of 50 GB/s a node, of which a collective reaches 0.8
    assert two == pytest.approx(8.4e-6 + 28 * 3.4e-6 + 2 * 9.6e-6 + 1.875 * LLAMA.bytes / 40e9)
    assert wire.seconds(LLAMA, 1, 8, H200) == 0


def test_small_all_reduces_climb_a_tree_on_many_nodes():
    small = wire.Transfer("flags", "all-reduce", 4096, 1)
    climb = 2 * (7 * 1.2e-6 + 7 * 8.5e-6)
    assert wire.seconds(small, 1024, 8, H200) == pytest.approx(4.4e-6 + climb + 2 * 4096 / (0.9 * 0.915 * 40e9))


def test_what_each_zero_stage_sends_of_llama(tmp_path):
    read = load_recipe("llama3-8b-da")
    stage = read.stages["mntp"]
    model = model_of(read.base, shape_of(read.base)[0], stage, 2)
    share = Share([[2048], [2048]], [[], []])
    trained = 41_943_040

    def total(zero: dict) -> dict[str, int]:
        return by_kind((each.op, each.bytes) for each in wire.transfers(model, stage, zero, 2, 8, share))

    assert total({"stage": 0}) == {"all-reduce": 4 * trained}
    assert total({"stage": 1}) == {"all-reduce": 4 * trained, "all-gather": 2 * trained}
    assert total({"stage": 2}) == {"all-reduce": 2 * 4 * trained, "all-gather": 2 * trained}
    three = total({"stage": 3, "stage3_param_persistence_threshold": 0})
    assert three["reduce-scatter"] == 2 * 4 * trained
    frozen = 6_979_321_856 + 65 * 4096  # linears and norms
    ends = 2 * 128256 * 4096
    assert three["all-gather"] == 2 * 2 * (2 * (frozen + trained) + ends + ends // 2)
