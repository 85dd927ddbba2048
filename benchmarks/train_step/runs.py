"""Runs of the train-step benchmark: the training program, or a peer, each in its own process."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import free_port
from benchmarks.train_step.record import Setting, Spec
from benchmarks.train_step.report import Run
from benchmarks.train_step.work import Model, Work, linear_parameters
from l2v.cores import choose

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = {"llm2vec": "llm2vec", "nemo": "nemo_automodel"}
"""Peers that need other versions than ours, and their packages."""
RUN_SECONDS_LIMIT = 900.0
"""Seconds that a run may take."""


class Runner:
    """Starts processes and reads what they leave."""

    def __init__(
        self,
        work: Work,
        device: torch.device,
        rungs: Mapping[str, Sequence[str]],
        environments: Mapping[str, str | None],
    ) -> None:
        """environments: a Python, or a folder of packages, of each peer of `ELSEWHERE`."""
        self.work, self.device, self.rungs, self.environments = work, device, rungs, environments
        self.model: Model = work.model
        self.steps = self.model.warmup + self.model.steps
        self.gpu = device.type == "cuda"
        self.dtype = "float32"
        one = self._environment().get("OMP_NUM_THREADS") == "1"
        self.clock = "processor" if one and not self.gpu else "wall"

    def prepare(self) -> dict[str, Any]:
        """Write the weights, calibrate a GPU, and say what the numbers will be measured against."""
        self.work.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.train_step.work", str(self.work.base), self.model.name]
        done = subprocess.run(command, env=self._environment(), cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"no weights: {done.stderr[-2000:]}")
        prepared = json.loads(done.stdout.splitlines()[-1])
        self.dtype = prepared["dtype"]
        names = list(self.model.workloads)
        weights = linear_parameters(self.work.recipe(names[0], self.steps), self.model.workloads[names[0]].stage)
        content = [self.work.batches(name, self.steps).read_bytes() for name in names]
        return prepared | {
            "linear_parameters": weights,
            "quickstart_steps": self._own_steps(),
            "work": hashlib.sha256(b"".join(content)).hexdigest()[:12],
            "threads": int(self._environment().get("OMP_NUM_THREADS", 0)) or None,
            "clock": self.clock,
        }

    def _own_steps(self) -> dict[str, int] | None:
        """Of the recipe, where it is trained as it is."""
        if self.model.shape:
            return None
        from l2v.recipe.load import load_recipe

        return {name: stage.steps for name, stage in load_recipe(self.model.recipe).stages.items()}

    def run(self, workload: str, provider: str, number: int, left: float | None) -> list[Run]:
        """One run, or several where a peer has several settings. left: seconds."""
        blank = Run(workload, provider, number, load=os.getloadavg()[0])
        limit = min(RUN_SECONDS_LIMIT, left or RUN_SECONDS_LIMIT)
        if provider == "l2v" or provider in self.rungs:
            return [self._train(blank, limit)]
        return self._peer(blank, limit)

    def _train(self, run: Run, limit: float) -> Run:
        """The training program, as a launcher starts its one rank."""
        stage = self.model.workloads[run.workload].stage
        keys = [key.replace("STAGE", stage) for key in self.rungs.get(run.provider, ())]
        out = self.work.folder / f"{run.workload}-{run.provider}-{run.round}"
        overrides = self.work.overrides(run.workload, self.steps, [*keys, f"out={out}"])
        command = [sys.executable, "-m", "l2v.train", self.model.recipe, *overrides, "--stage", stage, "--fresh"]
        rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        rank["MASTER_PORT"] = str(free_port())
        shutil.rmtree(out, ignore_errors=True)
        file = out / stage / "metrics.jsonl"
        watch = ProcessorTime(file)
        output, trouble = _finish(command, self._environment() | rank, limit, watch)
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        rows = [row for row in map(json.loads, lines) if "tokens_per_second" in row]
        run.rows = [self._row(row, before) for row, before in zip(rows, [{"tokens": 0}, *rows], strict=False)]
        for row, used in zip(run.rows, watch.differences(), strict=False):
            row["processor"] = used
        run = self._clocked(run)
        found = re.search(r"fused layers, recompute \w+", output)
        asked = [key.split("=")[1] for key in keys if key.endswith(("=layer", "=none"))]
        run.setting = found[0] if found else ", recompute ".join(["plain layers", *asked])
        if trouble and not run.timed:
            run.skipped = trouble
        return run

    def _row(self, row: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
        """A row of metrics.jsonl as a peer's is. There is no pad: as many places as tokens."""
        tokens = row["tokens"] - before["tokens"]
        return {
            "seconds": tokens / row["tokens_per_second"],
            "tokens": tokens,
            "places": tokens,
            "loss": row["loss"],
            "peak": int(row["peak_memory_gib"] * 2**30),
            "warmup": row["step"] <= self.model.warmup,
            "mfu": row.get("mfu"),
        }

    def _peer(self, run: Run, limit: float) -> list[Run]:
        python, path = sys.executable, None
        module = "benchmarks.train_step.peers"
        if package := ELSEWHERE.get(run.provider):
            module, named = f"benchmarks.train_step.peer_{run.provider}", self.environments.get(run.provider)
            if named is None and importlib.util.find_spec(package) is None:
                why = f"no environment with {package} was named (--{run.provider})"
                return [dataclasses.replace(run, skipped=why)]
            if named is not None:
                python, path = (python, named) if Path(named).is_dir() else (named, "")
        out = self.work.folder / f"{run.workload}-{run.provider}-{run.round}.jsonl"
        out.unlink(missing_ok=True)
        file = out.with_suffix(".spec.json")
        file.write_text(json.dumps(dataclasses.asdict(self._spec(run, out))), encoding="utf-8")
        _, trouble = _finish([python, "-m", module, str(file)], self._environment(path), limit)
        lines = out.read_text(encoding="utf-8").splitlines() if out.is_file() else []
        runs: dict[str, Run] = {}
        for row in map(json.loads, lines):
            setting = row.pop("setting")
            at = runs.setdefault(setting, dataclasses.replace(run, setting=setting, rows=[]))
            if "skipped" in row:
                at.skipped = row["skipped"]
            else:
                at.rows.append(row)
        if trouble and not any(x.timed or x.skipped for x in runs.values()):
            return [dataclasses.replace(run, skipped=trouble)]
        return [self._clocked(x) for x in runs.values()]

    def _clocked(self, run: Run) -> Run:
        """With one thread on a CPU, time is the processor's, which other programs do not change."""
        if self.clock == "processor" and all(row.get("processor") for row in run.timed):
            run.rows = [row | {"seconds": row.get("processor"), "wall": row["seconds"]} for row in run.rows]
        return run

    def _spec(self, run: Run, out: Path) -> Spec:
        from l2v.model.embedded import resolve
        from l2v.recipe.load import to_dict

        workload = self.model.workloads[run.workload]
        recipe = self.work.recipe(run.workload, self.steps)
        stage = recipe.stages[workload.stage]
        return Spec(
            provider=run.provider, stage=workload.stage, base=resolve(recipe.base.model), dtype=self.dtype,
            device=self.device.type, batches=str(self.work.batches(run.workload, self.steps)), batch=stage.batch,
            length=stage.length, lora=to_dict(stage.lora), lr=stage.lr, betas=list(stage.betas),
            weight_decay=stage.weight_decay, clip=stage.clip, warmup=self.model.warmup, steps=self.model.steps,
            seconds=15.0 if self.gpu else 1e9, out=str(out),
            settings=[dataclasses.asdict(x) for x in settings(self.model, run.provider, workload.stage)],
            scale=getattr(stage, "scale", 0.0), attention_dropout=getattr(stage, "attention_dropout", 0.0),
            mask_probability=getattr(stage, "mask_probability", 0.0),
        )  # fmt: skip

    def _environment(self, path: str | None = None) -> dict[str, str]:
        """For a process of ours; with `path`, for one whose packages come from there and from its own Python alone."""
        gone = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONHOME")
        environment = {key: value for key, value in os.environ.items() if key not in gone}
        own = os.environ.get("PYTHONPATH", "") if path is None else path
        folders = [own, str(ROOT), str(ROOT / "kernels")] if path else [str(ROOT), str(ROOT / "kernels"), own]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
        environment |= {
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(self.work.folder / "datasets"),
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        }
        if not self.gpu:
            # As `l2v train` itself sets them for its ranks; peers are given the same.
            environment |= {f"MALLOC_{name}_THRESHOLD_": str(1 << 33) for name in ("MMAP", "TRIM")}
            environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
            choose(environment, steady=True)
        return environment


def settings(model: Model, provider: str, stage: str) -> list[Setting]:
    """What a peer tries; the fastest of them counts. llm2vec runs as it was published."""
    if provider == "llm2vec":
        return [Setting(checkpointing=True)]
    out = [Setting()]
    if model.rows and stage == "mntp":
        # Accumulation changes nothing there; in-batch negatives need the batch whole.
        out.append(Setting(rows=model.rows))
    return out + ([Setting(checkpointing=True)] if model.checkpointing else [])


class ProcessorTime:
    """Processor seconds that a process had used by each line that it wrote to a file; Linux only, nothing elsewhere."""

    def __init__(self, file: Path) -> None:
        self.file, self.used = file, []

    def start(self, pid: int) -> None:
        """Look every 20 ms until the process is gone."""
        self.used = []
        threading.Thread(target=self._look, args=(pid,), daemon=True).start()

    def _look(self, pid: int) -> None:
        while True:
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            except (OSError, IndexError):
                return
            lines = self.file.read_bytes().count(b"\n") if self.file.is_file() else 0
            seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            self.used += [seconds] * (lines - len(self.used))
            time.sleep(0.02)

    def differences(self) -> list[float | None]:
        """From line to line; None for the first, before which there was the start."""
        return [None, *(b - a for a, b in itertools.pairwise(self.used))] if self.used else []


def _finish(
    command: list[str], environment: dict[str, str], limit: float, watch: ProcessorTime | None = None
) -> tuple[str, str]:
    """Run to the end, or to the limit: its output, and why it failed in one line (empty if it did not)."""
    with subprocess.Popen(
        command, env=environment, cwd=ROOT, text=True, start_new_session=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        began = time.monotonic()
        if watch is not None:
            watch.start(process.pid)
        try:
            output, _ = process.communicate(timeout=limit)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as stopped:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            if isinstance(stopped, KeyboardInterrupt):
                raise
            return output, f"stopped after {time.monotonic() - began:.0f} s"
    if not process.returncode:
        return output, ""
    lines = [line for line in output.splitlines() if line.strip()]
    own = [line.removeprefix("l2v: ") for line in lines if line.startswith("l2v: ")]
    if "out of memory" in output:
        return output, "out of memory"
    return output, (own or lines or [f"exit code {process.returncode}"])[-1][:200]
