"""`l2v tune RECIPE`: what makes each stage fastest on this machine, measured by training itself.

Every candidate is a short run of the training program in a folder of its own, so it is the product's own step that is timed,
and one that runs out of memory takes nothing with it. First the micro-batch doubles or halves from the recipe's until it is
slower or does not fit, then its neighbours are tried, then each way to recompute, the other attention backends, and on a GPU
configurations of the kernels that are chosen by timing; the best two run again, in turns.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm

from l2v.doctor import software
from l2v.doctor.report import Report
from l2v.errors import UserError
from l2v.recipe import Backend, Recipe, Stage
from l2v.runs.metrics import read_metrics
from l2v.tuning.apply import KEYS, SHARED

WARM = 2
"""Steps before the clock counts."""
GAIN = 1.02
"""A candidate must be so much faster to be worth another micro-batch; less is noise."""


@dataclass
class Candidate:
    """One way to run a stage, and its real tokens/s in each run; `failed` says why there are none."""

    micro_tokens: int
    recompute: str
    backend: str = "l2v"
    kernels: str = "default"
    rates: list[float] = field(default_factory=list)
    failed: str = ""
    peak_gib: float | None = None

    @property
    def rate(self) -> float:
        """Median real tokens/s, 0 where it does not run."""
        return statistics.median(self.rates) if self.rates else 0.0

    def __str__(self) -> str:
        text = f"micro_tokens {self.micro_tokens:,}, recompute {self.recompute}, backend {self.backend}"
        return text + (", kernels timed" if self.kernels == "timed" else "")

    def settings(self) -> dict[str, Any]:
        """What the file says of it and training takes up."""
        return {key: getattr(self, key) for key in (*KEYS, *SHARED)}


Measure = Callable[[Candidate], None]


class Search:
    """Coarse to fine over micro_tokens, then over recompute, backends and kernels.

    base: what the recipe has. measure: adds a rate to a candidate, or says why it failed. backends: the others that run here.
    timed: whether kernels can be chosen by timing.
    """

    def __init__(
        self,
        stage: Stage,
        measure: Measure,
        seconds: float,
        *,
        backend: str = "l2v",
        backends: Sequence[str] = (),
        timed: bool = False,
    ) -> None:
        self.stage, self.measure = stage, measure
        self.backend, self.backends, self.timed = backend, backends, timed
        self.ends = time.monotonic() + seconds
        self.tried: dict[tuple[Any, ...], Candidate] = {}

    def time_left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()

    def best(self) -> list[Candidate]:
        """Those that ran, fastest first; of two that are alike, the one that needs fewer tokens at once."""
        return sorted((c for c in self.tried.values() if c.rates), key=lambda c: (-c.rate, c.micro_tokens))

    def run(self) -> Candidate:
        """The fastest candidate. Errors: UserError if none ran."""
        start = self._try(Candidate(self.stage.micro_tokens, self.stage.recompute, self.backend))
        while not start.rates and start.micro_tokens // 2 >= self.stage.length:  # the recipe's own does not fit
            start = self._try(replace(start, micro_tokens=start.micro_tokens // 2))
        if not start.rates:
            raise UserError(f"no micro-batch of the stage runs here; the smallest, {start}: {start.failed}")
        for factor in (2, 0.5):
            self._climb(start, factor)
        for factor in (1.5, 0.75):
            at = self.best()[0]
            self._try(replace(at, micro_tokens=int(at.micro_tokens * factor)))
        for how in ("none", "cheap", "layer"):
            if how != "cheap" or self.backend == "l2v":  # fused layers alone have it, and they need that backend
                self._try(replace(self.best()[0], recompute=how))
        for backend in self.backends:
            at = self.best()[0]
            self._try(replace(at, backend=backend, recompute="none" if at.recompute == "cheap" else at.recompute))
        if self.timed and (at := self.best()[0]).backend == "l2v":
            self._try(replace(at, kernels="timed"))
        for candidate in self.best()[:2] * 2:
            if self.time_left() > 0:
                self.measure(candidate)
        return self.best()[0]

    def _climb(self, at: Candidate, factor: float) -> None:
        while self.time_left() > 0:
            other = self._try(replace(at, micro_tokens=int(at.micro_tokens * factor)))
            if other.rate < at.rate * GAIN:
                return
            at = other

    def _try(self, candidate: Candidate) -> Candidate:
        candidate = Candidate(**candidate.settings() | {"micro_tokens": max(candidate.micro_tokens, self.stage.length)})
        known = self.tried.setdefault(tuple(candidate.settings().values()), candidate)
        if known is candidate and (self.time_left() > 0 or len(self.tried) == 1):
            self.measure(known)
        return known


class Trainer:
    """Runs candidates as `l2v train` does, for a few steps, and reads what it writes."""

    def __init__(self, args: argparse.Namespace, name: str, folder: Path) -> None:
        self.args, self.name, self.folder, self.runs = args, name, folder, 0

    def measure(self, candidate: Candidate) -> None:
        """One run of a candidate. Errors: UserError if it fails for another reason than memory."""
        self.runs += 1
        out = self.folder / f"{self.name}-{self.runs}"
        steps = WARM + self.args.steps
        own = {
            "steps": steps, "micro_tokens": candidate.micro_tokens, "recompute": candidate.recompute, "log_every": 1,
            "save_every": 0, "eval_every": 0, "eval_data": "[]", "from": "base",
        }  # fmt: skip
        overrides = [f"stages.{self.name}.{key}={value}" for key, value in own.items()]
        overrides += [
            f"base.backend={candidate.backend}",
            f"out={out}",
            "tracking.tensorboard=false",
            "tracking.wandb=null",
        ]
        command = [sys.executable, "-m", "l2v.train", self.args.recipe, *self.args.overrides, *overrides]
        command += ["--stage", self.name, "--fresh"]
        if self.args.processes:
            command += ["--processes", str(self.args.processes)]
        launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
        environment = {k: v for k, v in os.environ.items() if k not in launched} | {"L2V_TUNED": "0"}
        if candidate.kernels == "timed":
            environment["L2V_AUTOTUNE"] = "1"
        environment["MASTER_PORT"] = str(_free_port())  # the launcher's own may be taken by a training that runs
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode:
            memory = any(
                sign in done.stdout for sign in ("out of memory", "OutOfMemory", "DefaultCPUAllocator", "Killed")
            )
            if not (memory or done.returncode in (-9, 137)):
                raise UserError(f"stage '{self.name}' does not train: {_last_line(done.stdout)}")
            candidate.failed = "out of memory"
            return
        rows = [row for row in read_metrics(out / self.name) if row["step"] > WARM and "tokens_per_second" in row]
        # Tokens over time, so that a long step counts as much as it lasts.
        lasted = [row["tokens"] - before["tokens"] for before, row in itertools.pairwise(rows)]
        times = [tokens / row["tokens_per_second"] for tokens, row in zip(lasted, rows[1:], strict=True)]
        candidate.rates.append(sum(lasted) / sum(times))
        candidate.peak_gib = max((row["peak_memory_gib"] for row in rows if "peak_memory_gib" in row), default=None)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _last_line(output: str) -> str:
    said = re.findall(r"l2v: (.+)", output) or output.strip().splitlines()
    return said[-1] if said else "it said nothing"


def alternatives(recipe: Recipe, name: str) -> tuple[list[str], bool]:
    """The attention backends that this stage could run with here, beside the recipe's, and whether kernels can be timed.

    Plain layers come with any backend but l2v, so what needs fused ones has no other; neither has attention dropout, whose
    noise only l2v addresses. A deterministic run takes nothing that is chosen by timing.
    """
    base, stage = recipe.base, recipe.stages[name]
    timed = torch.cuda.is_available() and not recipe.deterministic and base.backend == "l2v"
    if base.layers == "fused" or base.base_precision == "fp8" or stage.recompute == "cheap":
        return [], timed
    if getattr(stage, "attention_dropout", 0):
        return [], timed
    runs = [row.removeprefix("backend: ") for row, (works, _) in software.backends(Report()).items() if works]
    return [backend for backend in get_args(Backend) if backend in runs and backend != base.backend], timed


def tune_stage(recipe: Recipe, name: str, args: argparse.Namespace, folder: Path, seconds: float) -> dict[str, Any]:
    """The stage's entry of the file: settings, tokens/s, and all candidates."""
    trainer = Trainer(args, name, folder)
    with tqdm(desc=f"tune {name}", unit="run", dynamic_ncols=True) as bar:
        best: list[Candidate] = []

        def measure(candidate: Candidate) -> None:
            left = f", {search.time_left() / 60:.0f} min left"
            bar.set_postfix_str(
                f"{candidate}; best {best[0].rate:,.0f} tokens/s{left}" if best else f"{candidate}{left}"
            )
            trainer.measure(candidate)
            best[:] = search.best()
            bar.update()

        backends, timed = alternatives(recipe, name)
        search = Search(
            recipe.stages[name], measure, seconds, backend=recipe.base.backend, backends=backends, timed=timed
        )
        chosen = search.run()
    for candidate in [*search.best(), *(c for c in search.tried.values() if c.failed)]:
        told = candidate.failed or f"{candidate.rate:,.0f} tokens/s"
        print(f"{name}: {candidate}: {told}" + (f", peak {candidate.peak_gib:.1f} GiB" if candidate.peak_gib else ""))
    return {
        "settings": chosen.settings(),
        "tokens_per_second": round(chosen.rate, 1),
        "candidates": [vars(c) | {"rate": round(c.rate, 1)} for c in search.tried.values() if c.rates or c.failed],
    }
