"""Checkpoints written in the background: training continues while a thread writes, syncs and renames."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooLong
from contextlib import suppress
from pathlib import Path

from l2v.errors import UserError
from l2v.training.checkpoint import Checkpoint, save

Log = Callable[[str], None]


class Saver:
    """Writes one checkpoint at a time in its own thread; on ranks other than 0 it does nothing.

    The tensors are copies on the host, so training may change the weights meanwhile. A second checkpoint waits for the
    first, so at most two are in memory. A full disk does not stop training: the failure is logged as a warning, older
    checkpoints stay, and the next checkpoint is written as usual. log: prints a line.
    """

    def __init__(self, folder: Path, *, keep: int, active: bool, log: Log) -> None:
        self.folder, self.keep, self.log = folder, keep, log
        self.failed: str | None = None
        self.safe: int | None = None
        self._thread = ThreadPoolExecutor(1) if active else None
        self._writing: Future[Path] | None = None
        self._step = 0

    def submit(self, checkpoint: Checkpoint) -> None:
        """Start writing a checkpoint; waits only if the previous one is not written yet."""
        if self._thread is None:
            return
        self.wait()
        self._step = checkpoint.step
        self._writing = self._thread.submit(save, self.folder, checkpoint, keep=self.keep)

    def poll(self) -> None:
        """Log whether a finished write succeeded; never waits."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the pending checkpoint is written or has failed, for at most `seconds`."""
        if self._writing is None:
            return
        try:
            path = self._writing.result(timeout=seconds)
            self.failed, self.safe = None, self._step
            self.log(f"step {self._step} is saved: {path}")
        except TooLong:
            return
        except UserError as error:
            self.failed = str(error)
            self.log(f"WARNING: {error}. Training continues; the newest checkpoint is {self._newest()}")
        self._writing = None

    def close(self) -> None:
        """Finish pending writes and end the thread."""
        with suppress(KeyboardInterrupt):
            self.wait()
        if self._thread:
            self._thread.shutdown()

    def _newest(self) -> str:
        return "none" if self.safe is None else f"that of step {self.safe}"


def retried(work: Callable[[], object], *, times: int = 3, pause: float = 1.0):
    """Returns `work()`; after an OSError (a network file system that fails for a moment) it is retried, `times` in total."""
    for left in range(times - 1, -1, -1):
        try:
            return work()
        except OSError:
            if not left:
                raise
            time.sleep(pause)
    raise AssertionError
