"""The deepspeed launcher itself, with ranks that only note their environment. Ranks that train start by `start_ranks` in most
tests, which gives them the same environment without the launcher's start."""

import json
import os

import psutil
import pytest
from support.processes import free_port, training_environment

from l2v import train
from l2v.training.launcher import launch

RANK = """
import json, os, signal, sys, time
from pathlib import Path

from l2v.training.launcher import restore_visible_devices

restore_visible_devices()
rank, folder = os.environ["RANK"], Path(sys.argv[-1])
attempt = len(list(folder.glob(f"rank-{rank}-*")))
facts = {"pid": os.getpid(), "arguments": sys.argv[1:], "environment": dict(os.environ)}
(folder / f"rank-{rank}-{attempt}").write_text(json.dumps(facts))
if attempt == 0:
    while len(list(folder.glob("rank-?-0"))) < 2:
        time.sleep(0.01)
    if rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
if rank == "0":
    print("l2v: a mistake in the recipe", file=sys.stderr, flush=True)
sys.exit(2)
"""


@pytest.mark.slow
def test_ranks_have_their_place_and_a_killed_job_starts_again(tmp_path, monkeypatch, capfd):
    """Rank 1 is killed, which ends rank 0; started again, both end by a user's mistake, which no restart would fix."""
    (tmp_path / "noting_rank.py").write_text(RANK)
    environment = training_environment() | {"MASTER_PORT": str(free_port()), "CUDA_VISIBLE_DEVICES": "5,3"}
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]]))
    assert launch("noting_rank", ["steps=2", str(tmp_path)], 2, restarts=2) == 2
    out, said = capfd.readouterr()
    assert "l2v: the job ended with exit code 247 (a rank was killed by SIGKILL" in said
    assert "; restart 1 of 2 in 3 s" in said and "restart 2" not in said
    assert said.count("l2v: a mistake in the recipe") == 1
    assert "[ERROR]" not in out + said, "deepspeed's own line below the sentence"
    assert "VISIBLE_DEVICES" not in out + said, "deepspeed says that it ignores the user's GPUs"
    ranks = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("rank-*")}
    assert sorted(ranks) == ["rank-0-0", "rank-0-1", "rank-1-0", "rank-1-1"]
    assert not _runs(ranks["rank-0-0"]["pid"]), "a rank outlived its job"
    for name, facts in ranks.items():
        rank = name.split("-")[1]
        # What `start_ranks` gives its processes.
        expected = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        expected |= {key: environment[key] for key in ("MASTER_PORT", "DS_ACCELERATOR", "OMP_NUM_THREADS")}
        expected["CUDA_VISIBLE_DEVICES"] = "5,3"
        assert expected.items() <= facts["environment"].items(), name
        assert facts["arguments"] == [f"--local_rank={rank}", "steps=2", str(tmp_path)]


@pytest.mark.parametrize("given", ["", "GPU-3f1c,MIG-77aa", None])
def test_a_rank_sees_the_gpus_that_the_user_chose(monkeypatch, given):
    """Also none: `CUDA_VISIBLE_DEVICES= l2v train` trains on the CPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # by the launcher
    monkeypatch.delenv("L2V_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("L2V_VISIBLE_DEVICES", given)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(train, "_train", lambda args: 41)
    monkeypatch.setattr(train, "launched", lambda: True)
    assert train.main(["any.yaml"]) == 41
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ("0,1" if given is None else given)
    assert "L2V_VISIBLE_DEVICES" not in os.environ


@pytest.mark.parametrize(
    ("given", "set_to"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, {"PYTORCH_CUDA_ALLOC_CONF": ""}),
    ],
)
def test_memory_of_a_rank_grows_in_segments_unless_the_user_configured_it(monkeypatch, given, set_to):
    for name in [name for name in os.environ if name.endswith("ALLOC_CONF")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # so that what the rank sets is taken back
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(train, "launched", lambda: True)
    monkeypatch.setattr(train, "_train", lambda args: 0)
    assert train.main(["any.yaml"]) == 0
    assert {k: v for k, v in os.environ.items() if k.endswith("ALLOC_CONF")} == set_to


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_program_hands_its_arguments_to_the_launcher(tmp_path, tiny_recipe, monkeypatch):
    given = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(train, "launch", lambda *arguments, **more: given.append((arguments, more)) or 17)
    arguments = [str(tiny_recipe(tmp_path)), "--stage", "mntp", "--processes", "3", "--restarts", "1", "steps=2"]
    assert train.main(arguments) == 17
    assert given == [(("l2v.train", arguments, 3), {"restarts": 1})]
