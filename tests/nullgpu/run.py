"""Start ranks on the null GPU and collect what they recorded."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .cases import Case
from .data import prepare
from .place import Home, Plan

TIMEOUT = 1200.0


@dataclass
class Run:
    """A run that has ended. recordings: a tree of `recorder.py` for each rank that wrote one."""

    case: Case
    codes: list[int]
    outputs: list[str]
    recordings: list[dict[str, Any]] = field(default_factory=list)


def run_case(home: Home, case: Case, *, fault: str | None = None, timeout: float = TIMEOUT) -> Run:
    """Train on as many ranks as the case has, each in its own process, as a launcher starts them.

    What a run wrote before is removed, and afterwards what it trained, 640 MB a case: the recordings and the output stay.
    fault: name of a planted fault.
    """
    folder = home.folder / "runs" / (f"{case.name}+{fault}" if fault else case.name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    plan = Plan(record=str(folder / "recording"), lines=case.lines, fault=fault)
    try:
        return run_train(home, case, case.arguments(prepare(home), folder / "run"), plan, folder, timeout)
    finally:
        shutil.rmtree(folder / "run", ignore_errors=True)


def run_train(home: Home, case: Case, arguments: Sequence[str], plan: Plan, folder: Path, timeout: float) -> Run:
    """`python -m l2v.train` with these arguments on every rank of a case; outputs go to files of the folder."""
    environment = home.environment(plan, capability=case.capability, devices=case.world)
    # Recording needs the allocator as it is by default: its fragments are what the check of reserved memory is about.
    environment |= {"PYTORCH_ALLOC_CONF": "", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    environment |= {"WORLD_SIZE": str(case.world), "LOCAL_SIZE": str(case.world)}
    logs = [folder / f"output.rank{rank}.txt" for rank in range(case.world)]
    ranks = []
    for rank, log in enumerate(logs):
        with open(log, "w") as file:
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [str(home.python), "-m", "l2v.train", *arguments]
            ranks.append(
                subprocess.Popen(
                    command, env=own, cwd=folder, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
                )
            )
    codes = _wait(ranks, timeout)
    outputs = [log.read_text(errors="replace") for log in logs]
    files = sorted(folder.glob(f"{Path(plan.record or 'none').name}.rank*.json"))
    return Run(case, codes, outputs, [json.loads(file.read_text()) for file in files])


def _wait(ranks: Sequence[subprocess.Popen], timeout: float) -> list[int]:
    """Exit codes; when a rank fails or the time is over, the others end too."""
    end = time.monotonic() + timeout
    try:
        while any(rank.poll() is None for rank in ranks):
            if time.monotonic() > end or any(rank.returncode for rank in ranks):
                break
            time.sleep(0.2)
        for rank in ranks:  # one that failed is given a moment to end as the others notice
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.wait(20 if time.monotonic() < end else 0)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                os.killpg(rank.pid, signal.SIGKILL)
                rank.wait()
    return [rank.returncode for rank in ranks]


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def shrunk(case: Case, layers: int) -> Case:
    """The same case with so many layers."""
    return replace(case, overrides=(*case.overrides, f"base.overrides={{num_hidden_layers: {layers}}}"))
