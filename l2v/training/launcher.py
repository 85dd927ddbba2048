"""Start the deepspeed launcher on this machine, and start it again after a fault."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from l2v.cores import choose

# On an interrupt the launcher's outer process would end before the ranks have saved. So it ignores the signal, and the inner
# process passes it on.
LAUNCHER = (
    "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.argv[0] = 'deepspeed'; "
    "runpy.run_module('deepspeed.launcher.runner', run_name='__main__')"
)
# 0 is success. 1 and 2 are errors that the user has to fix, or a requested stop: a restart would end the same way.
FINAL_EXIT_CODES = (0, 1, 2)
RESTART_PAUSE = 3.0  # seconds before a restart, for ports and file systems to settle
HOSTFILE = Path("/job/hostfile")
"""Where deepspeed looks for the other nodes of a job; they must all know the port, so there it stays deepspeed's default."""


def launched() -> bool:
    """True under the deepspeed launcher (or torchrun), which set the rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def ranks_here() -> int:
    """Ranks on this machine, as set by the deepspeed launcher or torchrun; 0 without either."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 0)


def restore_visible_devices() -> None:
    """In a rank, before anything asks CUDA: the CUDA_VISIBLE_DEVICES of the process that called `launch`.

    The deepspeed launcher numbers a rank's GPUs 0, 1, ... whatever the user chose: other GPUs than those named, and all
    of them where the user hid them.
    """
    given = os.environ.pop("L2V_VISIBLE_DEVICES", None)
    if given is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = given


def set_allocator() -> None:
    """In a rank, before torch is loaded: let CUDA's allocator grow its segments, unless the user configured it.

    Steps have varying numbers of tokens, so blocks of fixed size fit the next step badly: as much again stayed reserved.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def launch(module: str, argv: list[str], processes: int, *, restarts: int = 0) -> int:
    """Run `module` in `processes` processes until it ends; returns the exit code.

    restarts: how often to start again after a fault (a killed rank, a hang that the watchdog ended, a crash). A user's error
    or a requested stop is never restarted. SIGINT, SIGTERM and SIGUSR1 reach the ranks as an interrupt: they save and stop.
    """
    import torch  # here, so that a mistake in the recipe is reported without it

    from l2v.machine import free_port

    environment = dict(os.environ)
    visible = environment.pop("CUDA_VISIBLE_DEVICES", None)
    if visible is not None:
        environment["L2V_VISIBLE_DEVICES"] = visible  # see `restore_visible_devices`
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
        # By default glibc returns large blocks to the system after every op and faults them in again: 15% of a step on 2
        # cores.
        environment.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 33))
        environment.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 33))
    choose(environment, processes=processes, threads=not torch.cuda.is_available(), steady=True)
    command = [sys.executable, "-c", LAUNCHER, "--num_gpus", str(processes), "--log_level", "critical"]
    port = environment.get("MASTER_PORT")
    for left in range(restarts, -1, -1):
        # Another training on this machine may have the default port.
        chosen = port or (None if HOSTFILE.is_file() else str(free_port()))
        at = ["--master_port", chosen] if chosen else []
        code, stop_requested = _run_once([*command, *at, "--module", module, *argv], environment)
        if code in FINAL_EXIT_CODES or stop_requested:
            return code
        if not left:
            print(f"l2v: the job ended with exit code {code}{_killed(code)}", file=sys.stderr, flush=True)
            return code
        again = f"restart {restarts - left + 1} of {restarts}"
        print(
            f"l2v: the job ended with exit code {code}{_killed(code)}; {again} in {RESTART_PAUSE:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(RESTART_PAUSE)
    raise AssertionError


def _killed(code: int) -> str:
    """The signal that ended a rank, from the exit code that deepspeed passes on (256 minus its number); empty for none."""
    try:
        name = signal.Signals(256 - code).name
    except ValueError:
        return ""
    return f" (a rank was killed by {name}" + (
        "; the system does so when memory runs out)" if name == "SIGKILL" else ")"
    )


def _run_once(command: list[str], environment: dict[str, str]) -> tuple[int, bool]:
    """Exit code, and whether a stop was requested."""
    stop_requested = False
    process = subprocess.Popen(command, env=environment, start_new_session=True)

    def forward(*_) -> None:
        nonlocal stop_requested
        stop_requested = True
        os.killpg(process.pid, signal.SIGINT)

    old = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        return process.wait(), stop_requested
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
