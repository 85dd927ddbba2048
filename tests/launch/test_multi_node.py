"""docs/multi-node.md, run as it is written: two hosts on this machine, two ranks on each, over gloo."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from support.processes import ROOT, finish, free_port, training_environment
from support.two_hosts import HOSTS, missing, two_hosts

DOCUMENT = (ROOT / "docs" / "multi-node.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", DOCUMENT, flags=re.DOTALL)
STAGES = ("mntp", "simcse", "supervised")
SETTINGS, SCRIPT, LAUNCHER, NO_SSH, TORCHRUN, SLURM, KUBERNETES = range(7)
PASSED_ON = (
    "DS_ACCELERATOR",
    "L2V_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "HF_HUB_OFFLINE",
    "HF_DATASETS_CACHE",
    "TOKENIZERS_PARALLELISM",
)

# What Slurm does of it: variables, one call of the script, one task a node.
SBATCH = """#!/usr/bin/env bash
set -eu
[[ $1 == --nodes && $3 == --gpus-per-node ]]
export SLURM_NNODES=$2 SLURM_GPUS_ON_NODE=$4 SLURM_JOB_ID=$JOB SLURM_JOB_NODELIST='node-[a-b]'
shift 4
exec bash "$@"
"""
SRUN = """#!/usr/bin/env bash
[[ $1 == --kill-on-bad-exit=1 ]] || exit 64
shift
SLURM_NODEID=1 "$@" & other=$!
SLURM_NODEID=0 "$@"; status=$?
wait $other || status=$?
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
[[ "$*" == "show hostnames node-[a-b]" ]] && printf '127.0.0.2\\n127.0.0.3\\n'
"""


def test_every_way_of_the_page_is_run():
    assert len(BLOCKS) == 7
    for at, word in zip(
        range(7), ("export", "multi_node.sh", "deepspeed", "--no_ssh", "torchrun", "sbatch", "kubectl"), strict=True
    ):
        assert word in BLOCKS[at]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """The folder that both hosts share, and an environment in which the page's commands are typed."""
    if reason := missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("shared")
    (folder / "launch").symlink_to(ROOT / "launch")
    (folder / "hostfile").write_text("".join(f"{host} slots=2\n" for host in HOSTS))
    with two_hosts(tmp_path_factory.mktemp("hosts") / "ssh") as path:
        environment = training_environment() | {"HF_HUB_OFFLINE": "1", "L2V_VISIBLE_DEVICES": ""}
        before = [str(path), str(Path(sys.executable).parent), environment["PATH"]]
        environment |= {"PATH": os.pathsep.join(before), "NODES": "2", "GPUS_PER_NODE": "2", "MASTER_ADDR": "127.0.0.2"}
        yield folder, environment


@pytest.fixture(scope="module")
def train(hosts, tiny_recipe):
    """train(name, block, on="here") -> the run's folder: a block of the page, typed here or on each host."""
    folder, environment = hosts

    def start(block: str, host: str | None, variables: dict[str, str]) -> subprocess.Popen:
        command = ["bash", "-c", block]
        if host:
            own = {k: v for k, v in variables.items() if k in PASSED_ON or k.startswith(("MASTER", "NODE", "PYTHON"))}
            own |= {k: variables[k] for k in ("PATH", "RECIPE", "GPUS_PER_NODE") if k in variables}
            own |= {k: v for k, v in variables.items() if k in ("JOB_COMPLETION_INDEX",)}
            exports = " ".join(f"{key}={shlex.quote(value)}" for key, value in own.items())
            command = [
                "ssh",
                host,
                f"cd {shlex.quote(str(folder))} && export {exports} && bash -c {shlex.quote(block)}",
            ]
        return subprocess.Popen(
            command, cwd=folder, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def run(name: str, block: str, *, each: str | None = None, expect: int = 0, **more: str) -> tuple[Path, str]:
        own = folder / name
        own.mkdir()
        recipe = tiny_recipe(own, **more.pop("changes", {}))
        variables = (
            environment | {"RECIPE": str(recipe), "MASTER_PORT": str(free_port()), "LOGS": str(own / "logs")} | more
        )
        if each:
            processes = [start(block, host, variables | {each: str(at)}) for at, host in enumerate(HOSTS)]
        else:
            processes = [start(block, None, variables)]
        outputs = finish(processes, expect=expect, timeout=280)
        return own, "\n".join(outputs)

    return run


@pytest.fixture(scope="module")
def expected(train):
    """Four ranks on one host."""
    block = 'deepspeed --num_gpus 4 --master_port "$MASTER_PORT" launch/train.py "$RECIPE"'
    return adapters(train("one-host", block)[0])


def adapters(folder: Path) -> dict[str, bytes]:
    found = {}
    for stage in STAGES:
        assert json.loads((folder / "run" / stage / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1
        for key, value in load_file(folder / "run" / stage / "adapter" / "adapter_model.safetensors").items():
            found[f"{stage}.{key}"] = value.numpy().tobytes()
    assert len(found) == 3 * 28
    return found


@pytest.mark.slow
def test_over_ssh_by_the_script(train, expected):
    folder, output = train("script", BLOCKS[SCRIPT])
    assert adapters(folder) == expected
    assert "supervised: done, adapter in" in output
    logs = sorted((folder / "logs").glob("*_rank?.log"), key=lambda log: log.name[-5])
    assert [log.name[-5] for log in logs] == list("0123")
    assert "Adapter" not in logs[3].read_text() and "mntp: done" in logs[0].read_text()


@pytest.mark.slow
def test_over_ssh_by_the_launcher(hosts, train, expected):
    folder, environment = hosts
    sent = [f"{key}={environment[key]}\n" for key in PASSED_ON if key in environment]
    (folder / ".deepspeed_env").write_text("".join(sent))
    try:
        assert adapters(train("launcher", BLOCKS[LAUNCHER])[0]) == expected
    finally:
        (folder / ".deepspeed_env").unlink()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "block"), [("no-ssh", NO_SSH), ("torchrun", TORCHRUN)])
def test_on_each_node(train, expected, name, block):
    assert adapters(train(name, BLOCKS[block], each="NODE_RANK")[0]) == expected


@pytest.mark.slow
def test_slurm_under_stand_ins(hosts, train, expected):
    folder, environment = hosts
    path = folder / "slurm"
    path.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (path / name).write_text(text)
        (path / name).chmod(0o755)
    while (port := free_port()) >= 40000:
        pass
    # The script takes its port from the job's number and its address from Slurm.
    block = f"unset MASTER_ADDR MASTER_PORT\n{BLOCKS[SLURM]}"
    more = {"PATH": f"{path}:{environment['PATH']}", "JOB": str(port - 20000)}
    assert adapters(train("sbatch", block, **more)[0]) == expected


@pytest.mark.slow
def test_the_pods_command(train, expected):
    service, job = yaml.safe_load_all((ROOT / "launch" / "kubernetes" / "train.yaml").read_text())
    container = job["spec"]["template"]["spec"]["containers"][0]
    given = {each["name"]: each.get("value") for each in container["env"]}
    assert given["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert container["command"] == ["bash", "-c"] and len(container["args"]) == 1
    assert adapters(train("pods", container["args"][0], each="JOB_COMPLETION_INDEX")[0]) == expected


@pytest.mark.slow
def test_what_stops_training_is_said_and_its_exit_code_kept(train):
    changes = {"stages.mntp.lora": {"targets": ["no_proj"]}}
    folder, output = train("wrong", BLOCKS[SCRIPT], expect=2, changes=changes)
    assert "lora.targets ['no_proj']" in output
    assert "multi_node.sh: training ended with exit code 2; the last line of each rank" in output
    assert f"whole in {folder / 'logs'}" in output
