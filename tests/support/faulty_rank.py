"""A rank that meets a fault: `python faulty_rank.py FAULT STEP ARGUMENTS...` trains like `python -m l2v.train`.

memory: from that step on the process may map no more than its present size and a little, so that a large forward fails to
allocate. sleep: the data of that step never arrive. read: the data of that step raise an OSError. once: the same, but only the
first time. crash: the loop raises an error that nobody expects.
"""

import os
import resource
import sys
import time
from pathlib import Path

from l2v import train
from l2v.training import loop, prefetch

ROOM = int(os.environ.get("ROOM", 96)) << 20
fault, at, asked = sys.argv[1], int(sys.argv[2]), []


def memory(step):
    if step == at and not asked:
        asked.append(step)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, resource.RLIM_INFINITY))


def crash(step):
    if step == at:
        raise KeyError("nobody expected this")


def data(self, step, real=prefetch.BatchPrefetcher._prepare):
    if step + 1 == at and not (fault == "once" and asked):
        asked.append(step)
        if fault == "sleep":
            time.sleep(10**6)
        raise OSError(5, "Input/output error")
    return real(self, step)


def watched(real=loop.Training.forward_and_backward):
    def forward_and_backward(self, step):
        {"memory": memory, "crash": crash}[fault](step + 1)
        return real(self, step)

    return forward_and_backward


if fault in ("memory", "crash"):
    loop.Training.forward_and_backward = watched()
else:
    prefetch.BatchPrefetcher._prepare = data
sys.exit(train.main(sys.argv[3:]))
