"""Checkpoints written beside the training: the step goes on while a thread writes, syncs and renames."""

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
    """Writes one checkpoint at a time in a thread of its own; on ranks other than 0 it does nothing.

    The tensors that it is given are copies on the host, so training may change the weights meanwhile; a second checkpoint
    waits for the first, so at most two are in memory. A disk that is full costs no training: the failure is told loudly, the
    older checkpoints stay, and the next one is tried again. log: prints a line.
    """

    def __init__(self, folder: Path, *, keep: int, active: bool, log: Log) -> None:
        self.folder, self.keep, self.log = folder, keep, log
        self.failed: str | None = None
        self.safe: int | None = None
        self._thread = ThreadPoolExecutor(1) if active else None
        self._writing: Future[Path] | None = None
        self._step = 0

    def submit(self, checkpoint: Checkpoint) -> None:
        """Hand a checkpoint over; waits only where the one before is not written yet."""
        if self._thread is None:
            return
        self.wait()
        self._step = checkpoint.step
        self._writing = self._thread.submit(save, self.folder, checkpoint, keep=self.keep)

    def poll(self) -> None:
        """Tell of a checkpoint that has reached the disk, or has not; never waits."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self, seconds: float | None = None) -> None:
        """Until the checkpoint on its way is safe, or has failed, or `seconds` are over."""
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
            self.log(f"WARNING: {error}. Training goes on, without a checkpoint newer than {self._newest()}")
        self._writing = None

    def close(self) -> None:
        """Finish what is being written."""
        with suppress(KeyboardInterrupt):
            self.wait()
        if self._thread:
            self._thread.shutdown()

    def _newest(self) -> str:
        return "none" if self.safe is None else f"that of step {self.safe}"


def retried(work: Callable[[], object], *, times: int = 3, pause: float = 1.0):
    """What `work` returns; an OSError (a network file system that hiccups) is tried again, `times` in all."""
    for left in range(times - 1, -1, -1):
        try:
            return work()
        except OSError:
            if not left:
                raise
            time.sleep(pause)
    raise AssertionError
