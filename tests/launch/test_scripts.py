"""The scripts of launch/ by themselves: what they refuse, what they pass on, and what they keep to themselves."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from support.processes import ROOT

SCRIPTS = [ROOT / "launch" / "multi_node.sh", ROOT / "launch" / "slurm" / "train.sbatch"]
# Takes the place of the launcher: prints its arguments, logs for two ranks, and ends with the given exit code.
LAUNCHER = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$SEEN/arguments"
cp "$DS_ENV_FILE" "$SEEN/environment"
while (($#)); do [[ $1 == --enable_each_rank_log ]] && logs=$2; shift; done
echo 'rank 0 speaks' >"$logs/20250101000000_rank0.log"
echo 'rank 1 fell over' >"$logs/20250101000000_rank1.log"
sleep 1.5
exit "$CODE"
"""


@pytest.fixture
def script(tmp_path):
    """script(*arguments, **environment) -> what multi_node.sh did, with a launcher that only writes down."""
    for name, text in (("deepspeed", LAUNCHER), ("pdsh", "#!/bin/sh\n")):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "hostfile").write_text("node-a slots=2\n")

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess:
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        environment = (
            os.environ | {"PATH": path, "SEEN": str(tmp_path), "CODE": "0", "LOGS": str(tmp_path / "logs")} | more
        )
        return subprocess.run(
            ["bash", SCRIPTS[0], *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
        )

    return run


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_shell(file):
    subprocess.run(["bash", "-n", file], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", file], check=True)


def test_arguments_and_environment_are_passed_on_and_secrets_are_not(script, tmp_path):
    shown = {"NCCL_SOCKET_IFNAME": "eth0", "HF_HOME": "/shared/hf", "L2V_CACHE": "/shared/l2v", "OMP_NUM_THREADS": "3"}
    hidden = {
        "HF_TOKEN": "hf_secret",
        "HUGGING_FACE_HUB_TOKEN": "hf_secret",
        "WANDB_API_KEY": "secret",
        "DS_PASSWORD": "secret",
    }
    done = script("hostfile", "mine", "--stage", "mntp", "steps=2", MASTER_ADDR="10.0.0.1", **shown, **hidden)
    assert done.returncode == 0 and done.stdout == "rank 0 speaks\n", done
    told = (tmp_path / "arguments").read_text().splitlines()
    assert told[-5:] == [str(ROOT / "launch" / "train.py"), "mine", "--stage", "mntp", "steps=2"]
    assert told[: told.index("--master_port")] == ["--hostfile", "hostfile", "--master_addr", "10.0.0.1"]
    sent = (tmp_path / "environment").read_text()
    assert set(sent.splitlines()) >= {f"{key}={value}" for key, value in shown.items()}
    assert "secret" not in sent and "MASTER_ADDR" not in sent


def test_a_failure_keeps_its_exit_code_and_shows_last_words(script, tmp_path):
    done = script("hostfile", "mine", CODE="7")
    assert done.returncode == 7
    assert f"training ended with exit code 7; the last line of each rank (whole in {tmp_path / 'logs'})" in done.stderr
    assert "20250101000000_rank1: rank 1 fell over" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "bash launch/multi_node.sh HOSTFILE RECIPE"),
        (("nofile", "mine"), "hostfile nofile not found; copy launch/"),
    ],
)
def test_what_is_missing_is_said(script, arguments, says):
    done = script(*arguments)
    assert done.returncode == 2 and says in done.stderr


def test_the_example_of_a_hostfile_is_one():
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(ROOT / "launch" / "hostfile.example")) == {"node-a": 8, "node-b": 8}


def test_the_job_and_its_service_belong_together():
    service, job = yaml.safe_load_all(Path(ROOT / "launch" / "kubernetes" / "train.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    given = {each["name"]: each for each in pod["containers"][0]["env"]}
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(given["NODES"]["value"])
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == int(given["GPUS_PER_NODE"]["value"])
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert "value" not in given["HF_TOKEN"]
    mounted = {each["name"] for each in pod["containers"][0]["volumeMounts"]}
    assert mounted == {each["name"] for each in pod["volumes"]}
