"""`l2v tune RECIPE`: the fastest settings of each stage on this machine, measured by short training runs.

Every candidate is a short run of the training program in its own folder, so the real training step is timed, and a candidate
that runs out of memory affects no other. First the micro-batch is doubled or halved from the recipe's until it is slower or
does not fit. Then sizes in between, each kind of recompute, the other attention backends and, on a GPU, kernel
configurations chosen by timing are tried. The fastest run again in turn with the recipe's own settings, and win only beyond the
spread of the runs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
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
from l2v.machine import free_port
from l2v.recipe import Backend, Recipe, Stage
from l2v.runs.metrics import read_metrics
from l2v.tuning.apply import KEYS, SHARED

WARM_UP_STEPS = 2
"""Steps that are not timed."""
MIN_GAIN = 1.02
"""A micro-batch must be faster by this factor for the next size to be tried; less is measurement noise."""
MAX_TEXTS = 9
"""Texts of the longest example: a query, its positive and seven negatives."""
FINALISTS, ROUNDS = 3, 2
"""So many candidates run again so often, in turn, together with the recipe's own settings."""


@dataclass
class Candidate:
    """One way to run a stage, and its tokens/s in each run; `failed` is the reason if it did not run."""

    micro_tokens: int
    recompute: str
    backend: str = "l2v"
    kernels: str = "default"
    rates: list[float] = field(default_factory=list)
    failed: str = ""
    peak_gib: float | None = None
    work: int | None = None
    """The most tokens that a process had in a step; a larger micro-batch changes nothing."""

    @property
    def rate(self) -> float:
        """Median tokens/s, 0 if it did not run."""
        return statistics.median(self.rates) if self.rates else 0.0

    @property
    def spread(self) -> float | None:
        """Largest minus smallest rate as a share of the median; None for fewer than two runs."""
        return (max(self.rates) - min(self.rates)) / self.rate if len(self.rates) > 1 else None

    def clearly_above(self, other: Candidate) -> bool:
        """Whether each of several runs was faster than every run of the other."""
        repeated = min(len(self.rates), len(other.rates)) > 1
        return repeated and min(self.rates) > max(other.rates)

    def __str__(self) -> str:
        text = f"micro_tokens {self.micro_tokens:,}, recompute {self.recompute}, backend {self.backend}"
        return text + (", kernels timed" if self.kernels == "timed" else "")

    def settings(self) -> dict[str, Any]:
        """The settings that are written to the tuned file and applied in training."""
        return {key: getattr(self, key) for key in (*KEYS, *SHARED)}


Measure = Callable[[Candidate], None]


class Search:
    """A coarse-to-fine search over micro_tokens, then over recompute, backends and kernels.

    stage: the recipe's. measure: adds a rate to a candidate, or the reason why it failed. seconds: time for the search.
    backend: the recipe's; backends: others that run here. timed: whether kernels can be chosen by timing.
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
        self.own: Candidate | None = None
        """The recipe's own settings."""

    def time_left(self) -> float:
        """Seconds left for the search."""
        return self.ends - time.monotonic()

    def best(self) -> list[Candidate]:
        """The candidates that ran, fastest first; of two with the same rate, the one with fewer micro_tokens first."""
        return sorted((c for c in self.tried.values() if c.rates), key=lambda c: (-c.rate, c.micro_tokens))

    def run(self) -> Candidate:
        """Search; returns the fastest candidate, or the recipe's own settings if none is faster beyond the spread of the runs.

        Raises:
            UserError: no candidate ran.
        """
        start = self._try(Candidate(self.stage.micro_tokens, self.stage.recompute, self.backend))
        self.own = own = start
        while not start.rates and start.micro_tokens // 2 >= self.stage.length:  # the recipe's micro-batch does not fit
            start = self._try(replace(start, micro_tokens=start.micro_tokens // 2))
        if not start.rates:
            raise UserError(f"no micro-batch of the stage runs here; the smallest, {start}: {start.failed}")
        for factor in (2, 0.5):
            self._climb(start, factor)
        for factor in (1.5, 0.75):
            at = self.best()[0]
            self._try(replace(at, micro_tokens=int(at.micro_tokens * factor)))
        for how in ("none", "cheap", "layer"):
            if how != "cheap" or self.backend == "l2v":  # only fused layers support it, and they need this backend
                self._try(replace(self.best()[0], recompute=how))
        for backend in self.backends:
            at = self.best()[0]
            self._try(replace(at, backend=backend, recompute="none" if at.recompute == "cheap" else at.recompute))
        if self.timed and (at := self.best()[0]).backend == "l2v":
            self._try(replace(at, kernels="timed"))
        return self._decide(own)

    def _decide(self, own: Candidate) -> Candidate:
        """Run the recipe's own settings and the fastest others again, in turn, so that a machine's drift meets all of them.

        One that is not faster in each of its runs than the recipe's own in any may be so by chance, and is not chosen.
        """
        if not own.rates:  # it does not fit, so another has to be chosen
            self._again(self.best()[:FINALISTS])
            return self.best()[0]
        self._again([own, *(c for c in self.best() if c is not own)][: FINALISTS + 1])
        return next((c for c in self.best() if c is not own and c.clearly_above(own)), own)

    def _again(self, candidates: Sequence[Candidate]) -> None:
        if len(candidates) < 2:
            return
        for _ in range(ROUNDS):
            for candidate in candidates:
                if self.time_left() > 0:
                    self.measure(candidate)

    def _climb(self, at: Candidate, factor: float) -> None:
        while self.time_left() > 0:
            other = self._try(replace(at, micro_tokens=int(at.micro_tokens * factor)))
            if other.rate < at.rate * MIN_GAIN:
                return
            at = other

    def _try(self, candidate: Candidate) -> Candidate:
        candidate = Candidate(**candidate.settings() | {"micro_tokens": max(candidate.micro_tokens, self.stage.length)})
        known = next((other for other in self.tried.values() if self._same(other, candidate)), None)
        if known is not None:
            return known
        self.tried[tuple(candidate.settings().values())] = candidate
        if self.time_left() > 0 or len(self.tried) == 1:
            self.measure(candidate)
        return candidate

    def _same(self, one: Candidate, other: Candidate) -> bool:
        """Whether two candidates do the same work: all micro-batches that hold a whole step do."""
        work = max((c.work for c in self.tried.values() if c.work), default=None)
        first, second = one.settings(), other.settings()
        if work is not None:
            first["micro_tokens"], second["micro_tokens"] = min(one.micro_tokens, work), min(other.micro_tokens, work)
        return first == second


class Trainer:
    """Runs candidates with the training program for a few steps, and reads the metrics that it writes.

    longest: tokens that one example can have.
    """

    def __init__(self, args: argparse.Namespace, name: str, folder: Path, longest: int) -> None:
        self.args, self.name, self.folder, self.longest, self.runs = args, name, folder, longest, 0

    def measure(self, candidate: Candidate) -> None:
        """One run of a candidate.

        Raises:
            UserError: it failed for another reason than memory.
        """
        self.runs += 1
        out = self.folder / f"{self.name}-{self.runs}"
        steps = WARM_UP_STEPS + self.args.steps
        settings = {
            "steps": steps, "micro_tokens": candidate.micro_tokens, "recompute": candidate.recompute, "log_every": 1,
            "save_every": 0, "eval_every": 0, "eval_data": "[]", "from": "base",
        }  # fmt: skip
        overrides = [f"stages.{self.name}.{key}={value}" for key, value in settings.items()]
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
        environment["MASTER_PORT"] = str(free_port())
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
        rows = read_metrics(out / self.name)
        seen = [0, *(row["tokens"] for row in rows if "tokens" in row)]
        # Processes share a step nearly equally; the longest text may make one share larger.
        share = max(after - before for before, after in itertools.pairwise(seen)) if len(seen) > 1 else 0
        ranks = self.args.processes or max(1, torch.cuda.device_count())
        candidate.work = share if ranks == 1 else share // ranks + self.longest
        rows = [row for row in rows if row["step"] > WARM_UP_STEPS and "tokens_per_second" in row]
        # Total tokens over total time, so that each step counts by its duration.
        counts = [row["tokens"] - before["tokens"] for before, row in itertools.pairwise(rows)]
        times = [tokens / row["tokens_per_second"] for tokens, row in zip(counts, rows[1:], strict=True)]
        candidate.rates.append(sum(counts) / sum(times))
        candidate.peak_gib = max((row["peak_memory_gib"] for row in rows if "peak_memory_gib" in row), default=None)


def _last_line(output: str) -> str:
    lines = re.findall(r"l2v: (.+)", output) or output.strip().splitlines()
    return lines[-1] if lines else "it printed no message"


def alternatives(recipe: Recipe, name: str) -> tuple[list[str], bool]:
    """The other attention backends that this stage can run with on this machine, and whether kernels can be timed.

    Other backends than l2v have plain layers, so a stage that needs fused layers has none. Neither has one with attention
    dropout, which only l2v keys by text, layer and position. A deterministic run uses nothing that is chosen by timing.
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
    """Tune a stage; returns its entry of the tuned file: settings, tokens/s, and all candidates."""
    stage = recipe.stages[name]
    trainer = Trainer(args, name, folder, min(stage.micro_tokens, MAX_TEXTS * stage.length))
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
        search = Search(stage, measure, seconds, backend=recipe.base.backend, backends=backends, timed=timed)
        chosen = search.run()
    for candidate in [*search.best(), *(c for c in search.tried.values() if c.failed)]:
        spread = "" if candidate.spread is None else f", spread {candidate.spread:.0%} of {len(candidate.rates)} runs"
        result = candidate.failed or f"{candidate.rate:,.0f} tokens/s{spread}"
        print(f"{name}: {candidate}: {result}" + (f", peak {candidate.peak_gib:.1f} GiB" if candidate.peak_gib else ""))
    print(f"{name}: {verdict(chosen, search.own)}")
    return {
        "settings": chosen.settings(),
        "tokens_per_second": round(chosen.rate, 1),
        "candidates": [vars(c) | {"rate": round(c.rate, 1)} for c in search.tried.values() if c.rates or c.failed],
    }


def verdict(chosen: Candidate, own: Candidate | None) -> str:
    """What was chosen, and what it gains."""
    if chosen is own:
        runs = "" if len(chosen.rates) > 1 else "; with more --minutes candidates are run more than once"
        return f"no other setting is faster than the recipe's own beyond the spread of the runs{runs}"
    if own is None or not own.rates:
        return f"{chosen}; the recipe's own settings did not run"
    return f"{chosen}: {chosen.rate / own.rate - 1:.0%} faster than the recipe's own settings, in every run"
