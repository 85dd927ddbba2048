"""Profile mode: trace a few steps and write where their time went, as a trace, a table and a plot."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from l2v.machine import device_name
from l2v.training.trace import STEP, Table, read, tabulate
from l2v_kernels.spans import PREFIX, recording

FIRST_TRACED, LAST_TRACED = 3, 5  # counted from 1: the first two steps compile kernels and fill caches
COLORS = {
    "gemm": "#3b6ea8", "attention": "#c2703d", "norm": "#3f8f5b", "lora": "#8a5aa8", "head": "#a83b3b", "loss": "#c9a227",
    "swiglu": "#4aa3a2", "rope": "#7a8f3f", "pooling": "#5f7f9f", "optimizer": "#6b4f3f", "communication": "#d17fa5",
    "copy": "#9a9a9a", "other": "#555555", "idle": "#d9d9d9",
}  # fmt: skip
MODULES = (
    (("RMSNorm", "LayerNorm"), "norm"),
    (("Attention",), "attention"),
    (("MLP",), "swiglu"),
    (("RotaryEmbedding",), "rope"),
)
"""Endings of class names in an unfused layer, and the kind of their own operations; linear layers are handled separately."""


def which_steps(start: int, steps: int) -> range:
    """The steps to trace, counted from 1, in a run that starts after step `start`: its third to fifth, or its last ones."""
    remaining = steps - start
    return range(start + max(1, min(FIRST_TRACED, remaining)), start + min(LAST_TRACED, remaining) + 1)


class Profile:
    """Traces some steps on one rank. Tracing slows those steps down and changes no result."""

    def __init__(
        self,
        model: nn.Module,
        folder: Path,
        *,
        active: bool = True,
        start: int,
        steps: int,
        device: torch.device,
        aside: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
        log: Callable[[str], None] = print,
    ) -> None:
        """model: a PackedDecoder. start: finished steps, of `steps`. aside: a context to enter while tables are written."""
        self.model, self.folder, self.device, self.aside, self.log = model, folder, device, aside, log
        self.steps = which_steps(start, steps) if active else range(0)
        # One step of warm-up for the profiler, if there is a step before the first traced one.
        self.warm_up = self.steps.start - 1 if self.steps and self.steps.start > start + 1 else None
        self.running = contextlib.ExitStack()
        self.tracer: torch.profiler.profile | None = None

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Wraps the work of a step, counted from 1."""
        if number not in self.steps and number != self.warm_up:  # always so if the profile is not active
            yield
            return
        tracer = self.tracer or self._begin()
        with torch.profiler.record_function(STEP):
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # count all kernels that this step launched
        if number == self.steps[-1]:
            with self.aside():
                self._end(tracer)
        else:
            tracer.step()

    def close(self) -> None:
        """Stop tracing; called however training ends."""
        self.running.close()

    def _begin(self) -> torch.profiler.profile:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its start and stop messages would break the progress bar
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.running.enter_context(recording())
        self.running.enter_context(spans_of_modules(self.model))
        warm_up = 0 if self.warm_up is None else 1
        with warnings.catch_warnings():
            # torch warns if there is no warm-up step; short runs have none to spare.
            warnings.simplefilter("ignore", UserWarning)
            plan = torch.profiler.schedule(wait=0, warmup=warm_up, active=len(self.steps), repeat=1)
            self.tracer = self.running.enter_context(torch.profiler.profile(activities=activities, schedule=plan))
        return self.tracer

    def _end(self, tracer: torch.profiler.profile) -> None:
        self.running.close()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            trace = self.folder / "trace.json.gz"
            tracer.export_chrome_trace(str(trace))
            table = tabulate(read(trace))
            if self.device.type == "cuda" and table.counted != "kernels":
                self.log(
                    f"{trace}: the trace has no kernels, so no table is written: the driver allows profiling only for "
                    "administrators (its option NVreg_RestrictProfilingToAdminUsers=0 allows everybody)"
                )
                return
            write(table, self.folder, steps=list(self.steps), device=device_name(self.device))
        except OSError as error:  # a profile that cannot be written must not end training
            self.log(f"{self.folder}: the profile cannot be written: {error.strerror or error}")
            return
        first = sorted(table.uses, key=lambda use: -use.ms)[:4]
        parts = ", ".join(f"{use.kind} {use.share:.0%}" for use in first)
        self.log(f"profile of steps {_range(self.steps)}: {table.step_ms:.1f} ms a step: {parts} ({self.folder})")


@contextlib.contextmanager
def spans_of_modules(model: nn.Module) -> Iterator[None]:
    """Inside, each call of a module with a known kind of work is a span; done with hooks that are removed at the end."""
    handles = []
    for name, module in model.named_modules():
        if kind := kind_of_module(name, module):
            handles += _span_hooks(module, kind)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def kind_of_module(name: str, module: nn.Module) -> str | None:
    """The kind of a PackedDecoder module's own work, without its submodules; None if it has no known kind."""
    if name.split(".")[0] in ("head", "with_head"):
        return "head"
    if "lora_" in name or isinstance(module, LoraLayer):
        return "lora"
    if isinstance(module, nn.Linear):
        return "gemm"
    called = type(module).__name__
    return next((kind for ends, kind in MODULES if called.endswith(ends)), None)


def _span_hooks(module: nn.Module, kind: str) -> list:
    open_spans: list = []

    def before(*_) -> None:
        open_spans.append(torch.profiler.record_function(PREFIX + kind))
        open_spans[-1].__enter__()

    def after(*_) -> None:
        open_spans.pop().__exit__(None, None, None)

    # always_call, because recomputing a layer ends with an exception once all needed tensors are recomputed.
    return [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]


def write(table: Table, folder: Path, *, steps: list[int], device: str) -> None:
    """Write table.json, table.md and time.png."""
    facts = {"traced": steps, "device": device, "torch": torch.__version__}
    text = json.dumps(facts | asdict(table), indent=1)
    (folder / "table.json").write_text(text + "\n", encoding="utf-8")
    (folder / "table.md").write_text(markdown(table, steps, device), encoding="utf-8")
    picture(table, folder / "time.png", f"{device}: {table.step_ms:.1f} ms a step")


def markdown(table: Table, steps: list[int], device: str) -> str:
    """The table as Markdown: kinds by their time, idle last, then the longest kernels or operators."""
    idle = {"kernels": "no kernel runs", "operators": "no operator runs: Python, or waiting for data"}[table.counted]
    lines = [
        f"{device}, torch {torch.__version__}, steps {_range(steps)}: {table.step_ms:.2f} ms a step while traced (faster "
        f"without tracing). Idle: {idle}.",
        "",
        f"| kind | ms a step | share | {table.counted} a step |",
        "|-|-:|-:|-:|",
    ]
    lines += [f"| {u.kind} | {u.ms:.2f} | {u.share:.1%} | {u.launches:.0f} |" for u in _ordered(table)]
    lines += ["", f"| {table.counted} that take longest | kind | ms a step | a step |", "|-|-|-:|-:|"]
    for row in table.longest:
        name = row["name"].replace("|", "\\|")
        name = name if len(name) <= 90 else name[:87] + "..."
        lines.append(f"| `{name}` | {row['kind']} | {row['ms']:.2f} | {row['launches']:.0f} |")
    return "\n".join(lines) + "\n"


def picture(table: Table, file: Path, title: str) -> None:
    """A plot of horizontal bars, the longest on top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    uses = _ordered(table)
    figure, axis = pyplot.subplots(figsize=(8, 0.6 + 0.34 * len(uses)), layout="constrained")
    bars = axis.barh([u.kind for u in uses], [u.ms for u in uses], color=[COLORS[u.kind] for u in uses])
    axis.bar_label(bars, [f"{u.ms:.1f} ms, {u.share:.0%}" for u in uses], padding=4, fontsize=8)
    axis.set(title=title, xlabel="ms a step")
    axis.set_xlim(right=1.2 * max(u.ms for u in uses))
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _ordered(table: Table) -> list:
    """Kinds that take time, the longest first, idle last."""
    return sorted((u for u in table.uses if u.ms), key=lambda u: (u.kind == "idle", -u.ms))


def _range(steps) -> str:
    return f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else str(steps[0])
