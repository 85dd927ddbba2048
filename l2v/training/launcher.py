"""Start the deepspeed launcher on this machine, and start it again after a fault."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import torch

from l2v.machine import threads

# The launcher's outer process would die of an interrupt before the ranks have saved: it ignores it, the inner one passes it on.
LAUNCHER = (
    "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.argv[0] = 'deepspeed'; "
    "runpy.run_module('deepspeed.launcher.runner', run_name='__main__')"
)
# 0 is done; 1 and 2 are a user's to mend, or a stop that was asked for: another start would end there again.
FINAL = (0, 1, 2)
PAUSE = 3.0  # seconds between an end and the next start, for ports and file systems to settle


def launched() -> bool:
    """True under the deepspeed launcher (or torchrun), which set the rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(module: str, argv: list[str], processes: int, *, restarts: int = 0) -> int:
    """Run `module` in so many processes until it ends; returns the exit code.

    restarts: how often it is started again after a fault (a rank that was killed, a watchdog's verdict, a crash), never after a
    mistake of the user's or a stop. SIGINT, SIGTERM and SIGUSR1 are passed on as an interrupt: the ranks save and stop.
    """
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
        environment.setdefault("OMP_NUM_THREADS", str(threads(processes)))
        # glibc gives large blocks back to the system after every op and faults them in again: 15% of a step on 2 cores.
        environment.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 33))
        environment.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 33))
    command = [sys.executable, "-c", LAUNCHER, "--num_gpus", str(processes), "--log_level", "error"]
    if "MASTER_PORT" in environment:
        command += ["--master_port", environment["MASTER_PORT"]]
    command += ["--module", module, *argv]
    for left in range(restarts, -1, -1):
        code, asked = _once(command, environment)
        if code in FINAL or asked or not left:
            return code
        again = f"restart {restarts - left + 1} of {restarts}"
        print(f"l2v: the job ended with exit code {code}; {again} in {PAUSE:.0f} s", file=sys.stderr, flush=True)
        time.sleep(PAUSE)
    raise AssertionError


def _once(command: list[str], environment: dict[str, str]) -> tuple[int, bool]:
    """Exit code, and whether a stop was asked for."""
    asked = False
    process = subprocess.Popen(command, env=environment, start_new_session=True)

    def forward(*_) -> None:
        nonlocal asked
        asked = True
        os.killpg(process.pid, signal.SIGINT)

    old = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        return process.wait(), asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
