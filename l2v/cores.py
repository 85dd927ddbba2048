"""The cores that torch's threads get, and what a thread does while it waits; chosen before torch is loaded, which reads it once.

Two threads share each operation of torch and wait for each other at its end. OpenMP lets the one that is done spin, for
milliseconds, and where other work holds a core it spins instead of giving way: SmolLM2's step of 1,024 tokens in bf16 on two
cores took 1.6 s, and 4.5 s with one core busy; with threads that sleep (OMP_WAIT_POLICY=PASSIVE) 1.85 and 2.8 s. Any core
may become busy in the middle of a run, so they always sleep. What the user has set is never changed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, MutableMapping
from pathlib import Path

THREADS = "OMP_NUM_THREADS"
WAIT = "OMP_WAIT_POLICY"
OF_WAITING = (WAIT, "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Any of these says how threads wait, for GNU's OpenMP or LLVM's and Intel's."""
OF_COUNT = (THREADS, "MKL_NUM_THREADS", "GOMP_CPU_AFFINITY", "OMP_PLACES")
"""Any of these says how many threads there are, or where they run."""
LOOK_SECONDS = 0.1

_set_here: set[str] = set()


def choose(
    environment: MutableMapping[str, str] | None = None,
    *,
    processes: int = 1,
    threads: bool = True,
    steady: bool = False,
) -> None:
    """Set what the environment does not say yet: that threads sleep while they wait, and how many there are.

    Call it before torch is loaded, or with the environment of a process to be started. processes: that share this machine.
    threads: whether to set their number; no on a GPU's host. steady: the number does not depend
    on what else runs now, as training needs: sums are split by it, and a run on the same machine repeats itself.
    """
    own = environment is None
    environment = os.environ if environment is None else environment
    if not own and THREADS in _set_here and environment.get(THREADS) == os.environ.get(THREADS):
        del environment[THREADS]  # the choice of this process for itself, and not the user's
    if own and "torch" in sys.modules:
        return
    new = {}
    if not any(name in environment for name in OF_WAITING):
        new[WAIT] = "PASSIVE"
    if threads and not any(name in environment for name in OF_COUNT):
        new[THREADS] = str(threads_of(processes, steady=steady))
    environment.update(new)
    if own:
        _set_here.update(new)


def threads_of(processes: int = 1, *, steady: bool = True, busy: Callable[[set[int]], float] | None = None) -> int:
    """Threads for each of `processes` processes that share this machine's cores.

    All cores that the process may use; or, unless `steady`, those that are idle now where these are more than half. Where they
    are fewer, threads that take turns with the other work are as fast, and faster once it ends. Two cores are never divided.
    busy: cores that others use, of a set; default: measured.
    """
    cores = allowed()
    count = min(len(cores), quota() or len(cores))
    if not steady and count > 2:
        idle = count - round((busy or busy_cores)(cores))
        if 2 * idle > count:
            count = min(count, idle)
    return max(1, count // processes)


def allowed() -> set[int]:
    """The numbers of the cores on which this process may run."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def quota(file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int | None:
    """Cores that a container may use at a time, rounded up; None without a limit."""
    try:
        most, period = file.read_text(encoding="ascii").split()
        return None if most == "max" else max(1, -(-int(most) // int(period)))
    except (OSError, ValueError, ZeroDivisionError):
        return None


def busy_cores(cores: set[int], stat: Path = Path("/proc/stat"), seconds: float = LOOK_SECONDS) -> float:
    """How many of these cores others use, as Linux counts it over some time in which this process sleeps; elsewhere 0."""
    before = _ticks(cores, stat)
    time.sleep(seconds)
    after = _ticks(cores, stat)
    shares = (
        1 - (after[core][0] - idle) / (after[core][1] - total)
        for core, (idle, total) in before.items()
        if core in after and after[core][1] > total
    )
    return sum(shares)


def _ticks(cores: set[int], stat: Path) -> dict[int, tuple[int, int]]:
    """Idle ticks and all ticks of each core."""
    try:
        lines = stat.read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    out = {}
    for name, *fields in map(str.split, lines):
        number = name.removeprefix("cpu")
        if number.isdigit() and name != number and int(number) in cores:
            ticks = [int(field) for field in fields[:8]]  # what follows is part of the first two
            out[int(number)] = ticks[3] + ticks[4], sum(ticks)
    return out


def may_have_gpu(devices: Path = Path("/dev")) -> bool:
    """Whether torch may find a GPU, without the seconds that its import takes. Never False where it finds one.

    devices: the folder of device files. NVIDIA's driver has nvidia*, on Jetson nvhost* or nvmap; WSL 2 has dxg and no
    other; ROCm has kfd.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return any(any(devices.glob(name)) for name in ("nvidia*", "nvhost*", "nvmap", "dxg", "kfd"))


def describe(threads: int) -> str:
    """One line about the threads of this process, which has so many."""
    cores = allowed()
    count = min(len(cores), quota() or len(cores))
    line = f"{threads} on {count} core{'s' if count > 1 else ''}, {busy_cores(cores):.1f} in use now; "
    said = [f"{name}={os.environ[name]}" for name in OF_WAITING if name in os.environ]
    if not said:
        return line + "threads that wait spin (OMP_WAIT_POLICY is not set)"
    by = "set by l2v" if WAIT in _set_here else "set by you"
    sleeps = os.environ.get(WAIT, "").upper() == "PASSIVE"
    return line + (f"threads that wait sleep ({said[0]}, {by})" if sleeps else f"waiting: {', '.join(said)}, {by}")
