"""Metrics as JSON lines, TensorBoard and optionally Weights & Biases; a progress bar with rate and time left."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from l2v.errors import RecipeError
from l2v.recipe import Tracking
from l2v.runs.metrics import MetricsFile


class Metrics:
    """Writes one row per logged step on rank 0; on other ranks every call does nothing."""

    def __init__(
        self, folder: Path, tracking: Tracking, *, name: str, active: bool, resumed_at: int = 0,
        log: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        """resumed_at: rows after this step are dropped. log: called when a file cannot be written.

        Raises:
            RecipeError: tracking.wandb is set and wandb is not installed.
        """
        self.file: MetricsFile | None = None
        self.board, self.run = None, None
        if not active:
            return
        self.folder, self.log = folder, log
        self.file = MetricsFile(folder, resumed_at=resumed_at, log=log)
        if tracking.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1 if resumed_at else None)
        if tracking.wandb:
            try:
                import wandb
            except ImportError:
                raise RecipeError("tracking.wandb is set but wandb is not installed: pip install wandb") from None
            self.run = wandb.init(project=tracking.wandb, name=name, dir=str(folder), resume="allow")

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one row; scalars also go to TensorBoard. A full disk does not stop training: rows wait for space."""
        if self.file is None:
            return
        self.file.append({"step": step} | values)
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
        if self.board:
            try:
                for key, value in numbers.items():
                    self.board.add_scalar(key, value, step)
            except OSError as error:  # its writer thread has ended
                self.log(
                    f"WARNING: {self.folder / 'tensorboard'} cannot be written ({error}); TensorBoard logging stops"
                )
                self.board = None
        if self.run:
            self.run.log(numbers, step=step)

    def close(self) -> None:
        """Flush and close everything."""
        for sink in (self.file, self.board):
            if sink:
                with contextlib.suppress(OSError):  # a full disk was already logged by `write`
                    sink.close()
        if self.run:
            self.run.finish()


class Progress:
    """A progress bar of steps with rate and time left; within a step of many micro-batches it also shows their progress.

    Without a terminal it prints a line every 10 seconds.
    """

    def __init__(self, total: int, initial: int, name: str, *, active: bool) -> None:
        live = sys.stderr.isatty()
        self.bar = tqdm(
            total=total, initial=initial, desc=name, unit="step", disable=not active, dynamic_ncols=live,
            mininterval=0.2 if live else 10.0, smoothing=0.1,
        )  # fmt: skip
        self.every, self.shown, self.text = self.bar.mininterval if active else math.inf, time.monotonic(), ""

    def within(self, number: int, done: int, of: int) -> None:
        """`done` of `of` micro-batches of pass `number` are finished: pass 1 encodes, pass 2 is the backward."""
        now = time.monotonic()
        if now - self.shown < self.every or of < 2:
            return
        self.shown = now
        parts = filter(None, (f"{('encode', 'backward')[number - 1]} {done}/{of}", self.text))
        self.bar.set_postfix_str(", ".join(parts))

    def step(self) -> None:
        """Count one finished step."""
        self.bar.set_postfix_str(self.text, refresh=False)
        self.bar.update(1)
        self.shown = time.monotonic()

    def status(self, text: str) -> None:
        """Set the text after the bar."""
        self.text = text
        self.bar.set_postfix_str(text, refresh=False)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self.bar.write(text)

    def close(self) -> None:
        """Close the bar and leave it on the screen."""
        self.bar.close()
