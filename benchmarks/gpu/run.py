"""Runs the plan of a stay on a GPU: every step a process of its own, with its own limit, its result kept as soon as it exists."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.gpu.keep import DONE, FAILED, STOPPED, Results, logged
from benchmarks.gpu.plan import Step, groups

ROOT = Path(__file__).resolve().parents[2]
POLL = 0.25
SHOWN = 12
"""Lines of a step's output on the screen; the log has all."""
GRACE = 3.0
"""Seconds from SIGTERM to SIGKILL; as long again is waited for a process that even that does not end."""


class Running:
    """A step's process."""

    def __init__(self, step: Step, limit: float, results: Results, work: Path, environment: dict[str, str]) -> None:
        self.step, self.results = step, results
        self.scratch = work / "steps" / step.name
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        results.restore(step, self.scratch)
        self.output = self.scratch / "output.txt"
        places = {"{out}": str(self.scratch), "{work}": str(work)}
        self.arguments = [_filled(x, places) for x in step.arguments]
        own = {"L2V_TESTS_JSON": str(self.scratch / "tests.json")} if step.result == "tests.json" else {}
        self.began = time.monotonic()
        self.end, self.seen = self.began + limit, 0
        with open(self.output, "wb") as output:
            self.process = subprocess.Popen(
                [environment.get("PYTHON") or sys.executable, *self.arguments], cwd=ROOT, env=environment | own,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def poll(self) -> bool:
        """Collect what is new; True once the step has ended, by itself or at its limit."""
        if self.step.result:
            with contextlib.suppress(OSError):
                changed = (self.scratch / self.step.result).stat().st_mtime_ns
                if changed != self.seen:
                    self.seen = changed
                    self.results.collect(self.step, self.scratch)
        code = self.process.poll()
        if code is None and time.monotonic() < self.end:
            return False
        self.finish(code)
        return True

    def finish(self, code: int | None) -> None:
        """Keep how it ended; code: None where it still runs, and is ended."""
        seconds = time.monotonic() - self.began
        stopped = code is None
        gone = self._end() if stopped else True
        self._end_group()
        self.results.collect(self.step, self.scratch)
        state = STOPPED if stopped else FAILED if code else DONE
        facts = {"state": state, "seconds": round(seconds, 1), "exit_code": code}
        if not gone:
            facts["remains"] = "the process could not be killed: it waits for the device"
        self.results.keep(self.step, **facts)
        why = f" at its limit of {seconds:.0f} s" if stopped else f", exit code {code}" if code else ""
        line, text = f"== {self.step.name}: {state}{why or f', {seconds:.0f} s'}", logged(self.output)
        print("\n".join([line, *text.splitlines()[-SHOWN:]]), flush=True)
        self.results.log(f"\n{line}\n$ python {' '.join(self.arguments)}\n{text}\n")

    def _end(self) -> bool:
        """SIGTERM, then SIGKILL, to the process and all that it started; False if it is still there."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)
                return True
        return False

    def _end_group(self) -> None:
        """Workers of a process that is gone would hold the device's memory."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)


def _filled(text: str, places: dict[str, str]) -> str:
    for name, value in places.items():
        text = text.replace(name, value)
    return text


def order(plan: Sequence[Step], results: Results) -> list[list[Step]]:
    """What is left to run: groups that never ran or were stopped, then those that failed, which may well fail again."""
    left = [[step for step in group if results.of(step.name).get("state") != DONE] for group in groups(list(plan))]
    fresh = [[s for s in group if results.of(s.name).get("state") != FAILED] for group in left]
    again = [[s for s in group if results.of(s.name).get("state") == FAILED] for group in left]
    return [group for group in fresh + again if group]


def run(
    plan: Sequence[Step], results: Results, work: Path, seconds: float, environment: dict[str, str],
    clock: Callable[[], float] = time.monotonic,
) -> int:  # fmt: skip
    """Run what is left of the plan, for so many seconds; returns the exit code: 0 if every step is done.

    A step whose ops' tests fail runs after all others. An exception (KeyboardInterrupt) ends the steps that run, and is
    passed on.
    """
    end = clock() + seconds - 2 * GRACE
    todo, postponed = order(plan, results), []
    while todo or postponed:
        group = todo.pop(0) if todo else postponed.pop(0)
        ready: list[Step] = []
        for step in group:
            if results.red(step.ops) and todo:
                postponed.append([step])
            elif end - clock() < step.least:
                results.keep(step, state="not run", reason="no time was left")
                print(f"== {step.name}: not run, no time was left", flush=True)
            else:
                ready.append(step)
        _run_group(ready, results, work, environment, end, clock)
    return int(any(results.of(step.name).get("state") != DONE for step in plan))


def _run_group(ready: list[Step], results: Results, work: Path, environment: dict[str, str], end: float, clock) -> None:
    running: list[Running] = []
    try:
        for step in ready:
            results.begin(step, results.red(step.ops))
            running.append(Running(step, min(step.limit, end - clock()), results, work, environment))
        while running:
            time.sleep(POLL)
            running = [each for each in running if not each.poll()]
    except BaseException:
        for each in running:
            each.finish(each.process.poll())
        raise
