"""metrics.jsonl of a stage: one JSON object per line, every step once."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from l2v.errors import UserError
from l2v.files import replace_text

METRICS_FILE = "metrics.jsonl"


def read_metrics(stage: Path) -> list[dict[str, Any]]:
    """Rows of a stage; an incomplete last line of a running training is skipped.

    Raises:
        UserError: another line is not JSON.
    """
    file, rows = stage / METRICS_FILE, []
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for at, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if at < len(lines):
                raise UserError(f"{file}:{at}: not JSON; remove the line") from None
    return rows


class MetricsFile:
    """Appends rows to a stage's metrics.jsonl. A full disk does not stop training: rows wait in memory until there is space."""

    def __init__(self, stage: Path, *, resumed_at: int, log: Callable[[str], None]) -> None:
        """resumed_at: rows after this step are dropped. log: is called once when the disk is full.

        Raises:
            UserError: the file cannot be written.
        """
        self.path, self._log, self._waiting, self._warned = stage / METRICS_FILE, log, "", False
        try:
            _cut(self.path, resumed_at)
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written: {error.strerror}; free some space and start the same command again"
            ) from None

    def append(self, row: dict[str, Any]) -> None:
        """Write the rows that wait, then this one."""
        self._waiting += json.dumps(row) + "\n"
        data = self._waiting.encode()
        try:
            while data:
                data = data[self._file.write(data) :]
            self._warned = False
        except OSError as error:
            if not self._warned:
                self._log(
                    f"WARNING: {self.path} cannot be written ({error.strerror}); training continues, its rows wait for space"
                )
            self._warned = True
        self._waiting = data.decode()

    def close(self) -> None:
        """Close the file; a full disk was logged when a row could not be written."""
        with contextlib.suppress(OSError):
            self._file.close()


def _cut(path: Path, step: int) -> None:
    """Drop rows after the step that training resumes from, and a row that a kill left incomplete: every step appears once."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if step else ():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    replace_text(path, "".join(kept))
