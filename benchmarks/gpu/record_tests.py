"""A plugin of pytest: outcomes and times of a run, written after every test to the file that L2V_TESTS_JSON names.

A run that is killed, or whose GPU fails, keeps what it found.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

from l2v.files import replace_text

LONGEST = 10
MESSAGE = 1500
"""Characters of a failure that are kept: its end."""


class Record:
    """Counts of outcomes, the failures, and the slowest tests."""

    def __init__(self, file: Path) -> None:
        self.file, self.counts = file, Counter()
        self.failures: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.reasons: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report) -> None:
        """Called for the setup, the call and the teardown of each test, in the process that started the others."""
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.counts["failed"] += report.nodeid not in self.failures
            self.failures[report.nodeid] = str(report.longrepr)[-MESSAGE:]
        elif report.skipped:
            self.counts["skipped"] += 1
            if isinstance(report.longrepr, tuple):
                self.reasons[report.longrepr[-1].removeprefix("Skipped: ")] += 1
        elif report.when == "call":
            self.counts["passed"] += 1
        else:
            return
        self.write(finished=False)

    def pytest_sessionfinish(self, session, exitstatus) -> None:
        """The last write, which says that nothing is missing. Exit status 0 and 1 are those of a whole run."""
        if not hasattr(session.config, "workerinput"):
            self.write(finished=int(exitstatus) in (0, 1))

    def write(self, finished: bool) -> None:
        """Everything so far."""
        slowest = sorted(self.seconds, key=self.seconds.__getitem__, reverse=True)[:LONGEST]
        data = {
            "finished": finished, "passed": self.counts["passed"], "failed": self.counts["failed"],
            "skipped": self.counts["skipped"], "skipped_because": dict(self.reasons), "failures": self.failures,
            "slowest": {name: round(self.seconds[name], 2) for name in slowest},
        }  # fmt: skip
        replace_text(self.file, json.dumps(data, indent=1))


def pytest_configure(config) -> None:
    """In the main process alone: workers send it their reports."""
    file = os.environ.get("L2V_TESTS_JSON")
    if file and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Record(Path(file)), "l2v-record-tests")
