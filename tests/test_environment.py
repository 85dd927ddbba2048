"""docs/environment.md lists the variables that the code reads, and no other; the container's files and commands exist."""

import re
import shlex
import tomllib

import pytest
import yaml
from support.environment import makefile_names, python_names, read_names, shell_names
from support.processes import ROOT

from l2v.commands.main import COMMANDS

PAGE = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
# Read by libraries or services, and named for the user; no line of this repository reads them.
OF_LIBRARIES = {
    "HF_TOKEN", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT", "WANDB_API_KEY",
}  # fmt: skip


def listed() -> set[str]:
    """The names in the first column of the tables of variables."""
    tables = PAGE.partition("## What is kept where")[0]
    rows = re.findall(r"^\| (`[A-Z].*?) \|", tables, flags=re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([A-Z][A-Z0-9_]+)`", row)}


def test_every_variable_that_is_read_is_listed():
    read = read_names()
    missing = {name: files for name, files in read.items() if name not in listed()}
    assert not missing, f"docs/environment.md does not list {missing}"
    assert {"L2V_CACHE", "RANK", "WORKERS", "GPUS_PER_NODE"} <= read.keys()  # Python, launcher, Makefile, shell


def test_no_variable_is_listed_that_nothing_reads():
    assert listed() - read_names().keys() <= OF_LIBRARIES


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('import os\nNAME = "L2V_X"\nos.environ.get(NAME)', {"L2V_X"}),
        (
            'import os\nos.environ["A_B"] = "1"\nos.environ.setdefault("C", "d")\nos.environ.pop("E", None)',
            {"A_B", "C", "E"},
        ),
        ('import os\nif "NO_COLOR" in os.environ: os.getenv("F")', {"NO_COLOR", "F"}),
        ('import os\nother.get("G")\nenviron = {"H": 1}\nos.environ[key]', set()),
    ],
)
def test_names_are_found_in_python(source, found):
    assert python_names(source) == found


def test_names_are_found_in_shell_and_make():
    assert shell_names("a=${PORT:-1}\nb=${LOGS:?set it}\nc=${OWN}\nd=${LLM2VEC-}") == {"PORT", "LOGS", "LLM2VEC"}
    assert makefile_names("PYTHON ?= python3\nBIN := x\nt:\n\t$(BIN)/y $(ARGS)") == {"PYTHON", "ARGS"}


def instructions() -> list[tuple[str, str]]:
    """Instruction and arguments of each line of the Dockerfile; continued lines are one."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def test_the_container_copies_what_exists_and_installs_what_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    copied = [name for word, rest in instructions() if word == "COPY" for name in rest.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    assert {f"!{name}" for name in copied} <= set(ignored) and ignored[0] == "*"
    # The build of the wheel needs these: packages, forced files, readme and licence.
    needed = {path.split("/")[0] for path in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]}
    needed |= {path.split("/")[0] for path in project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]}
    assert needed | {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]} <= set(
        copied
    )
    [install] = [rest for word, rest in instructions() if word == "RUN" and "pip install" in rest]
    extras = re.search(r"'\.\[([\w,]+)\]'", install)[1].split(",")
    assert set(extras) <= project["project"]["optional-dependencies"].keys() and "-c constraints.txt" in install
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(pin in makefile for pin in re.findall(r"[\w-]+==[\d.]+", install))  # the same weights and results
    [base] = [rest for word, rest in instructions() if word == "FROM"]
    assert tuple(map(int, re.match(r"python:(\d+)\.(\d+)", base).groups())) >= (3, 11)


def test_the_containers_command_is_one_of_l2v():
    [command] = [yaml.safe_load(rest) for word, rest in instructions() if word == "CMD"]
    assert command[0] == "l2v" and command[1] in COMMANDS
    from l2v.commands.doctor import parser

    parser().parse_args(command[2:])
    word_order = [word for word, _ in instructions()]
    assert word_order[0] == "FROM" and word_order.index("USER") > max(
        at for at, w in enumerate(word_order) if w == "RUN"
    )
    assert set(word_order) <= {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "CMD"}


def test_pod_page_and_container_name_one_image():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    _, job = yaml.safe_load_all((ROOT / "launch" / "kubernetes" / "train.yaml").read_text(encoding="utf-8"))
    pod = job["spec"]["template"]["spec"]
    image = pod["containers"][0]["image"]
    assert image == f"registry.example.com/l2v:{version}"
    for place in ("Dockerfile", "docs/deployment.md"):
        assert f"docker build -t {image} ." in (ROOT / place).read_text(encoding="utf-8")
    environment = dict(
        pair.split("=", 1) for word, rest in instructions() if word == "ENV" for pair in shlex.split(rest)
    )
    given = {each["name"]: each.get("value") for each in pod["containers"][0]["env"]}
    assert all(given[name] == environment[name] for name in ("HF_HOME", "L2V_CACHE"))
    [user] = [rest for word, rest in instructions() if word == "USER"]
    assert pod["securityContext"] == {"runAsUser": int(user), "fsGroup": int(user)}


def test_the_slurm_job_asks_for_time_partition_and_cpus():
    text = (ROOT / "launch" / "slurm" / "train.sbatch").read_text(encoding="utf-8")
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, flags=re.MULTILINE))
    assert {"time", "partition", "cpus-per-gpu", "ntasks-per-node", "signal"} <= asked.keys()
    assert re.fullmatch(r"\d+:\d\d:\d\d", asked["time"]) and int(asked["cpus-per-gpu"]) >= 1
    before_code = text.partition("\nset -euo pipefail")[0]
    assert all(
        line.startswith("#") for line in before_code.splitlines()
    )  # Slurm reads no #SBATCH after the first command
