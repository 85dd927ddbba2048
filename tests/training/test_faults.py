"""Faults that are injected for real: a process is killed or stopped, memory and disks run out, data cannot be read."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.forked import start
from support.processes import ROOT, finish, start_ranks, training_environment

from l2v.training import checkpoint
from l2v.training.watchdog import EXIT_FAULT

FAULTY = ROOT / "tests" / "support" / "faulty_rank.py"
ADAPTER = "adapter/adapter_model.safetensors"


def weights(folder: Path) -> dict:
    return load_file(folder / ADAPTER)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def start_faulty(arguments: list, *, rank: int, fault: str, at: int, world: int = 2, **environment) -> list:
    """`world` ranks of which one meets a fault at a step."""
    shared = training_environment() | {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(world)} | environment
    return [
        start(
            [*([str(FAULTY), fault, str(at)] if r == rank else ["-m", "l2v.train"]), *map(str, arguments)],
            shared | {"RANK": str(r), "LOCAL_RANK": str(r)},
        )
        for r in range(world)
    ]


def wait_for(condition, processes, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes), (
            "ended or hangs before the fault"
        )
        time.sleep(0.02)


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_is_gone_ends_the_job_and_is_named(tmp_path, tiny_recipe, rank, how):
    """Within 60 seconds; a stopped one is noticed by its heartbeat, a killed one in the process table."""
    recipe = tiny_recipe(tmp_path, **{"stages.mntp.steps": 4000, "stages.mntp.save_every": 5})
    ranks = start_ranks([[recipe, "--stage", "mntp"]] * 2)
    try:
        wait_for(lambda: list((tmp_path / "run/mntp/checkpoints").glob("step-*")), ranks)
        began = time.monotonic()
        ranks[rank].send_signal(how)
        other = ranks[1 - rank]
        said = other.communicate(timeout=90)[0]
        took = time.monotonic() - began
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert other.returncode == EXIT_FAULT, said
    assert took < 60
    host = os.uname().nodename
    named = re.search(
        rf"l2v: rank {rank} on {host} \(process {ranks[rank].pid}\) (sent no heartbeat for|ended without a message)",
        said,
    )
    assert named and "the same command resumes from the newest checkpoint" in said, said
    assert checkpoint.newest(tmp_path / "run/mntp/checkpoints") is not None


def test_a_rank_that_stands_still_is_named_with_its_place(tmp_path, tiny_recipe):
    recipe = tiny_recipe(tmp_path, timeout=8)
    said = finish(
        start_faulty([recipe, "--stage", "mntp"], rank=1, fault="sleep", at=3), expect=EXIT_FAULT, timeout=120
    )
    told = re.search(
        r"l2v: no progress for \d+ s \(timeout 8 s\), (\d) of 2 ranks wait for (rank \d)[^;]*; ", "".join(said)
    )
    assert told and told.groups() == ("1", "rank 1"), said
    assert "step 3: data" in "".join(said) or "step 2: agreement" in "".join(said), said


def test_a_rank_that_fails_is_named_with_its_error(tmp_path, tiny_recipe):
    recipe = tiny_recipe(tmp_path)
    said = finish(
        start_faulty([recipe, "--stage", "mntp"], rank=1, fault="crash", at=2), expect=EXIT_FAULT, timeout=120
    )
    assert "KeyError: 'nobody expected this'" in said[1] and "Traceback" in said[1]
    assert re.search(r"l2v: rank 1 on \S+ \(process \d+\) failed at .*: KeyError: 'nobody expected this'", said[0]), (
        said[0]
    )
    assert "Traceback" not in said[0]


@pytest.mark.slow
def test_data_that_cannot_be_read_end_the_run_after_a_checkpoint(tmp_path, tiny_recipe):
    recipe = tiny_recipe(tmp_path)
    said = finish(start_faulty([recipe, "--stage", "mntp"], rank=1, fault="read", at=3), expect=1, timeout=120)
    assert re.search(
        r"l2v: the examples of the next step cannot be read on rank 1 on \S+: OSError: .*Input/output error", said[0]
    )
    assert checkpoint.newest(tmp_path / "run/mntp/checkpoints").step == 2
    assert "continues after step 2" in finish(start_ranks([[recipe, "--stage", "mntp"]] * 2))[0]
    assert [row["step"] for row in rows(tmp_path / "run/mntp")] == [1, 2, 3, 4]


def test_a_hiccup_of_the_disk_is_tried_again(tmp_path, tiny_recipe):
    recipe = tiny_recipe(tmp_path)
    finish(start_faulty([recipe, "--stage", "mntp"], rank=0, fault="once", at=3, world=1), timeout=120)
    assert [row["step"] for row in rows(tmp_path / "run/mntp")] == [1, 2, 3, 4]


BATCHES = {"stages.mntp.batch": 64, "stages.simcse.batch": 256}


@pytest.fixture
def wide(tmp_path, tiny_config, write_jsonl, sentences) -> dict:
    """Changes of a recipe that make a forward of 16,384 tokens far larger than what else a process allocates."""
    texts = write_jsonl(tmp_path / "many.jsonl", [{"text": f"{i} {t}"} for i in range(6) for t in sentences])
    config = tiny_config | {"hidden_size": 128, "intermediate_size": 2048, "head_dim": 32}
    return BATCHES | {"base.config": config, "stages.simcse.data": texts, "stages.mntp.data": texts}


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize("stage", ["mntp", "simcse"])
def test_memory_that_runs_out_costs_nothing_but_time(tmp_path, tiny_recipe, wide, stage, zero):
    """The process may map no more from step 2 on: the step is discarded and repeated in smaller micro-batches."""
    changes = wide | {"zero.stage": zero}
    changes |= {f"stages.{stage}.{k}": v for k, v in {"micro_tokens": 16384, "from": "base", "lr": 1e-3}.items()}
    recipe = tiny_recipe(tmp_path, **changes)
    whole, short = tmp_path / "whole", tmp_path / "short"
    finish(start_ranks([[recipe, "--stage", stage, f"out={whole}"]] * 2))
    ranks = start_faulty([recipe, "--stage", stage, f"out={short}"], rank=1, fault="memory", at=2)
    said = finish(ranks, timeout=300)[0]
    assert f"{stage}: WARNING: out of memory at step 2; all ranks take the step back" in said, said
    budget = json.loads((short / stage / "budget.json").read_text())["micro_tokens"]
    assert 0 < budget < 16384
    losses = [[row["loss"] for row in rows(out / stage)] for out in (whole, short)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[1]) == 4
    for name, value in weights(whole / stage).items():
        assert (value - weights(short / stage)[name]).norm() <= 1e-3 * value.norm() + 1e-6, name


@pytest.mark.slow
def test_under_zero_3_the_job_starts_again_with_a_smaller_budget(tmp_path, tiny_recipe, wide):
    changes = wide | {"zero.stage": 3, "stages.mntp.save_every": 1}
    recipe = tiny_recipe(tmp_path, **changes, **{"stages.mntp.micro_tokens": 16384})
    run = tmp_path / "run/mntp"
    said = finish(
        start_faulty([recipe, "--stage", "mntp"], rank=1, fault="memory", at=3), expect=EXIT_FAULT, timeout=300
    )
    assert "rank 1 on" in said[0] and "out of memory" in said[0] and "micro_tokens 8192" in said[0], said[0]
    assert json.loads((run / "budget.json").read_text()) == {"micro_tokens": 8192}
    assert "continues after step 2" in finish(start_ranks([[recipe, "--stage", "mntp"]] * 2))[0]
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4]


def test_killed_and_started_again_it_ends_with_the_same_bits(tmp_path, tiny_recipe):
    """What a restart of the launcher does (test_launcher.py); test_resume.py has all stages, on two ranks too."""
    recipe = tiny_recipe(tmp_path, **{"stages.mntp.steps": 60, "stages.mntp.save_every": 5})
    arguments, run = [recipe, "--stage", "mntp"], tmp_path / "run/mntp"
    finish(start_ranks([[*arguments, f"out={tmp_path / 'whole'}"]]))
    (rank,) = start_ranks([arguments])
    wait_for(lambda: list(run.glob("checkpoints/step-*")), [rank])
    rank.kill()
    rank.communicate()
    assert rank.returncode == -signal.SIGKILL and not (run / ADAPTER).exists()
    assert "mntp: continues after step" in finish(start_ranks([arguments]))[0]
    assert (run / ADAPTER).read_bytes() == (tmp_path / "whole/mntp" / ADAPTER).read_bytes()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_costs_no_training(tmp_path, tiny_recipe, run_here):
    small, run = tmp_path / "small", tmp_path / "small/run"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=488k", "tmpfs", small]).returncode:
        pytest.skip("this machine mounts no tmpfs")
    try:
        recipe = tiny_recipe(
            tmp_path,
            **{f"stages.mntp.{k}": v for k, v in {"steps": 8, "save_every": 1, "keep": 9}.items()},
            **{"lora.r": 16},
        )
        run_here(recipe, "--stage", "mntp", f"out={tmp_path / 'whole'}")
        output = run_here(recipe, "--stage", "mntp", f"out={run}", expect=1)
        assert "WARNING" in output and "the checkpoint cannot be written (" in output and "Training continues" in output
        assert "Traceback" not in output
        saved = checkpoint.newest(run / "mntp/checkpoints")
        assert saved is not None and 1 <= saved.step < 8
        said = {int(n) for n in re.findall(r"step (\d+) is saved", output)}
        assert max(said) == saved.step, "what was reported as saved is there"
        subprocess.run(["mount", "-o", "remount,size=20m", small], check=True)
        assert f"continues after step {saved.step}" in run_here(recipe, "--stage", "mntp", f"out={run}")
        assert (run / "mntp" / ADAPTER).read_bytes() == (tmp_path / "whole/mntp" / ADAPTER).read_bytes()
    finally:
        subprocess.run(["umount", "-l", small])
