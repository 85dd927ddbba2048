"""What a peer of the train-step benchmark is given, and how it records its steps. Needs torch and nothing else.

A peer runs in its own process, in any environment: `python -m benchmarks.MODULE SPEC.json`. It appends one line of JSON
a step to the spec's `out` as soon as the step is done, so that a killed run keeps what it has.
"""

from __future__ import annotations

import contextlib
import json
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Unavailable, reason, release, synchronize


@dataclass(frozen=True)
class Setting:
    """How a peer runs a step: examples a micro-batch (None is all of them), and whether layers are computed twice."""

    rows: int | None = None
    checkpointing: bool = False

    def __str__(self) -> str:
        text = "checkpointing" if self.checkpointing else "no checkpointing"
        return f"{text}, {self.rows} rows at a time" if self.rows else text


@dataclass
class Spec:
    """What a peer is to run.

    base: a folder of weights and tokenizer. batches: a file of `work.batches`. seconds: after so many no other
    step is begun, once two are timed. settings: of Setting, tried one after another. length: tokens at which a text is cut.
    """

    provider: str
    stage: str
    base: str
    dtype: str
    device: str
    batches: str
    batch: int
    length: int
    lora: dict[str, Any]
    lr: float
    betas: list[float]
    weight_decay: float
    clip: float
    warmup: int
    steps: int
    seconds: float
    out: str
    settings: list[dict[str, Any]]
    scale: float = 20.0
    attention_dropout: float = 0.0
    mask_probability: float = 0.2


class Recorder:
    """Times a peer's steps and writes them."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.file, self.device = spec, Path(spec.out), torch.device(spec.device)
        self.setting, self.done, self.began, self.at, self.used = Setting(), 0, 0.0, 0.0, 0.0

    def settings(self) -> Iterator[Setting]:
        """The settings to try; one that does not fit is written down as such, and the next one follows."""
        for setting in self.spec.settings:
            self.setting = Setting(**setting)
            yield self.setting
            release(self.device)

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Around the steps of a setting: no room for it is a result."""
        try:
            yield
        except RuntimeError as error:
            if reason(error) != "out of memory":
                raise
            self.write({"skipped": "out of memory"})

    def start(self) -> None:
        """The clock runs from here to the end of the first step."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        synchronize(self.device)
        self.done, self.began = 0, time.perf_counter()
        self.at, self.used = self.began, time.process_time()

    def step(self, tokens: int, places: int, loss: float) -> bool:
        """Record a step: its real tokens, the places it computed with the pads, its loss. Returns whether to continue."""
        synchronize(self.device)
        now, used = time.perf_counter(), time.process_time()
        row = {
            "seconds": now - self.at,
            "processor": used - self.used,
            "tokens": tokens,
            "places": places,
            "loss": loss,
        }
        self.at, self.used = now, used
        self.done += 1
        self.write(row | {"warmup": self.done <= self.spec.warmup, "peak": self._peak()})
        timed = self.done - self.spec.warmup
        return timed < self.spec.steps and (timed < 2 or now - self.began < self.spec.seconds)

    def _peak(self) -> int:
        # As the training program's own log has it: tensors on a GPU, the process on a CPU.
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def write(self, row: dict[str, Any]) -> None:
        """Append a row."""
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"setting": str(self.setting)} | row) + "\n")


def clock(recorder: Recorder, read: Callable[[], tuple[int, int, float]]):
    """A callback of a transformers trainer. read: tokens, places and loss of the step that is done."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            recorder.start()

        def on_step_end(self, args, state, control, **kwargs):
            synchronize(recorder.device)
            if not recorder.step(*read()):
                control.should_training_stop = True

    return Clock()


def run(argv: list[str], providers: dict[str, Callable[[Spec, Recorder], None]]) -> None:
    """The main function of a module of peers: the spec's provider to its end, or why there is none."""
    spec = Spec(**json.loads(Path(argv[0]).read_text(encoding="utf-8")))
    recorder = Recorder(spec)
    try:
        providers[spec.provider](spec, recorder)
    except Unavailable as missing:
        recorder.write({"skipped": str(missing)})
