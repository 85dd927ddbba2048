"""The same training on one process, on two and on four, under every ZeRO stage, fused and plain, with dropout on.

Two and four ranks of the slow settings stand under the real deepspeed launcher. Batches of 7 give them unequal shares, and the
last batch of an epoch of pairs has three examples: of four ranks, one has nothing.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.processes import finish, start_ranks, training_environment
from support.run_state import column, flat, part, state

LONG = os.environ.get("L2V_SLOW") == "1"
STEPS = 20 if LONG else 8
# tests/training/test_spread.py has a few steps of groups.
STAGES = ("mntp", "simcse", "supervised", "options", "all", *(["groups", "all_mntp"] if LONG else []))
# Every option that brings ranks together: queries of all, owners of all, a loss for each prefix.
OPTIONS = {
    "directions": ["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"],
    "hard_negatives": "own",
    "max_negatives": 2,
    "false_negative_margin": 0.01,
    "matryoshka": [8, 16, 32],
    "matryoshka_weights": [0.5, 1, 1],
}
# All weights trained; clipping and a rate that keeps Adam from enlarging rounding errors of single weights.
ALL = {"lora": None, "lr": 1e-4, "weight_decay": 0.01, "attention_dropout": 0.3}
# Three groups a step: on several ranks each is divided among all of them, and one rank takes one after another.
GROUPS = {"negatives": "micro", "group": 3, "batch": 9, "directions": ["query_to_doc", "doc_to_query"]}
# ranks, ZeRO stage, tokens a micro-batch: 104 makes several a step (and a gradient cache) on each of four ranks, 4096 one.
# The layers are fused but for "plain".
SETTINGS = {
    "one": (1, 1, 104),
    "uncached": (1, 1, 4096),
    "zero2x2": (2, 2, 104),
}
SLOW = {
    "plain": (1, 1, 104),
    "zero3x4": (4, 3, 104),
    "zero0x2": (2, 0, 104),
    "zero1x2": (2, 1, 104),
    "zero3x2": (2, 3, 104),
    "zero1x4": (4, 1, 104),
    "zero2x4": (4, 2, 104),
    "uncached-zero2x4": (4, 2, 4096),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_recipe, write_jsonl, sentences) -> Path:
    folder = tmp_path_factory.mktemp("parity")
    pairs = [  # none, one or two negatives; the positive of every fifth is that of its neighbour
        {"query": f"Hvem {text.split(' ', 1)[1]}", "positive": sentences[i - (i % 5 == 1)], "negatives": others}
        for i, text in enumerate(sentences[:24])
        for others in [sentences[100 + i : 100 + i + i % 3]]
    ]
    options = {"objective": "supervised", "data": write_jsonl(folder / "uneven.jsonl", pairs), "micro_tokens": 512}
    changes = {"stages.options": options | OPTIONS | {"length": 48}}
    texts = write_jsonl(folder / "texts.jsonl", [{"text": text} for text in sentences[:40]])
    changes["stages.all"] = ALL | {"objective": "simcse", "data": texts, "length": 48}
    if LONG:
        changes["stages.groups"] = options | {"length": 48}
        documents = write_jsonl(
            folder / "long.jsonl", [{"text": " ".join(sentences[i : i + 6])} for i in range(0, 90, 6)]
        )
        changes["stages.all_mntp"] = ALL | {"objective": "mntp", "data": documents, "length": 64}
        del changes["stages.all_mntp"]["attention_dropout"]
    shared = {"steps": STEPS, "batch": 7, "save_every": 1, "keep": STEPS, "from": "base", "clip": 0.5}
    changes |= {f"stages.{name}.{key}": value for name in STAGES for key, value in shared.items()}
    if LONG:
        changes |= {f"stages.groups.{key}": value for key, value in GROUPS.items()}
    # A loss near zero would be all rounding: a mild scale keeps it above 0.1.
    soft = {f"stages.{name}.scale": 3 for name in STAGES[1:] if name != "all_mntp"}
    soft |= {f"stages.{name}.lr": 1e-3 for name in STAGES[1:] if not name.startswith("all")}
    return tiny_recipe(folder, **changes, **{"lora.dropout": 0.1, "stages.simcse.attention_dropout": 0.3, **soft})


@pytest.fixture(scope="module")
def runs(recipe):
    """runs(setting) -> the folder of its run, trained when it is first asked for."""
    folder, ready = recipe.parent, {}
    # The tiny weights would all count as too small to be sharded.
    sharded = folder / "sharded.json"
    sharded.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))

    def run(setting: str) -> Path:
        if setting not in ready:
            world, zero, micro = (SETTINGS | SLOW)[setting]
            out = folder / setting
            arguments = [recipe, f"out={out}", f"zero.stage={zero}", f"zero.config={sharded}"]
            arguments.append(f"base.layers={'plain' if setting == 'plain' else 'fused'}")
            arguments += [f"stages.{stage}.micro_tokens={micro}" for stage in STAGES]
            finish([launch(arguments, world)] if world > 1 and setting in SLOW else start_ranks([arguments] * world))
            ready[setting] = out
        return ready[setting]

    return run


def launch(arguments: list[object], world: int) -> subprocess.Popen:
    """Under deepspeed's own launcher, as `deepspeed --num_gpus N --module l2v.train` starts it."""
    environment = training_environment()
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", world, "--master_port", environment["MASTER_PORT"]]
    command = [sys.executable, *map(str, [*launcher, "--module", "l2v.train", *arguments])]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "setting", [*list(SETTINGS)[1:], *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_every_setting_equals_one_rank(runs, setting, stage):
    one, several = runs("one"), runs(setting)
    # After the first update Adam's first moment is 0.1 of the (clipped) gradient, so it shows the gradient of step 1.
    gradient_one, gradient_several = (flat(part(state(run, stage, 1), "exp_avg")) for run in (one, several))
    assert gradient_one.abs().max() > 0
    assert (gradient_one - gradient_several).abs().max() <= 1e-5 * gradient_one.abs().max()
    # Clipping and Adam both forgive a gradient that is too long by a factor; its norm does not.
    norms_one, norms_several = (column(run, stage, "gradient_norm") for run in (one, several))
    torch.testing.assert_close(norms_one, norms_several, rtol=1e-4, atol=0)
    losses_one, losses_several = column(one, stage), column(several, stage)
    assert len(losses_one) == len(norms_one) == STEPS
    torch.testing.assert_close(losses_one, losses_several, rtol=1e-5, atol=0)
    first, last_one = (part(state(one, stage, step), "weight") for step in (1, STEPS))
    last_several = part(state(several, stage, STEPS), "weight")
    names = [name for name in first if stage.startswith("all") or "lora_A" in name]
    assert len(names) > 8
    moved_one = torch.cat([(last_one[name] - first[name]).flatten() for name in names])
    moved_several = torch.cat([(last_several[name] - first[name]).flatten() for name in names])
    assert (moved_one - moved_several).norm() <= 1e-3 * moved_one.norm()


@pytest.mark.parametrize("stage", STAGES)
def test_training_changes_something(runs, stage):
    values = column(runs("one"), stage)
    assert values[-4:].mean() < values[:4].mean()


def test_loss_is_the_mean_over_the_whole_batch(runs):
    """Seven examples a step and 24 in all: the fourth batch of an epoch has three, and no rank may weigh them double."""
    rows = [json.loads(line) for line in (runs("zero2x2") / "supervised" / "metrics.jsonl").read_text().splitlines()]
    epochs = [row["epoch"] for row in rows]
    assert epochs[3] == 1.0 and epochs[7] == 2.0
