"""Records what a process does on the null GPU, by stage, step, phase and line of Python.

A phase is what the training loop does: forward, backward, agreement (the ranks agree on the outcome of a step, the only wait that
is allowed), update, log, save; anything else is `outside`.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

from .events import DIRECTIONS, HOOK, LAUNCHES, Kind, Stub
from .place import CHECKOUT

PHASES = ("forward", "backward", "agreement", "update", "log", "save", "outside")
SHOWN = ("l2v", "l2v_kernels", "deepspeed", "transformers", "peft", "benchmarks", "tests")
"""Packages whose lines are shown; torch's own would hide who called."""
PASS_THROUGH = ("l2v_kernels/launching.py", "l2v_kernels/spans.py")
"""Decorators around launches."""
CALLERS = 3


class Recorder:
    """What happens from `start()` on, in this process and all its threads."""

    def __init__(self, *, lines: bool) -> None:
        self.lines, self.stub = lines, Stub()
        self.rows: collections.Counter[tuple] = collections.Counter()
        self.flops: collections.Counter[tuple] = collections.Counter()
        self.intervals: dict[tuple, dict[str, Any]] = {}
        self.memory: list[dict[str, Any]] = []
        self.specialisations: list[dict[str, Any]] = []
        self.at: tuple[str, int, str] = ("", 0, "outside")
        self._names: dict[CodeType, str | None] = {}
        self._mark: tuple[float, list[int]] = (0.0, [])

    def start(self) -> None:
        """Begin to record."""
        self._mark = (time.process_time(), self.stub.counts())
        if self.lines:
            self._hook = HOOK(self._event)  # kept: the library calls it
            self.stub.set_hook(self._hook)

    def stop(self) -> None:
        """End recording."""
        self.stub.set_hook(None)
        self.enter(*self.at)

    def enter(self, stage: str, step: int, phase: str) -> None:
        """End the current phase and begin another. step: counted from 1; 0 is before the first."""
        now, counts = time.process_time(), self.stub.counts()
        began, before = self._mark
        found = self.intervals.setdefault(self.at, {"cpu": 0.0, "counts": [0] * len(Kind)})
        found["cpu"] += now - began
        found["counts"] = [old + new - was for old, new, was in zip(found["counts"], counts, before, strict=True)]
        self.at, self._mark = (stage, step, phase), (now, counts)

    @contextlib.contextmanager
    def phase(self, stage: str, step: int, phase: str) -> Iterator[None]:
        """Inside, this phase; after it the one before."""
        before = self.at
        self.enter(stage, step, phase)
        try:
            yield
        finally:
            self.enter(*before)

    def note_memory(self) -> None:
        """The allocator's state after a step."""
        import torch

        stats = torch.cuda.memory_stats()
        keys = {
            "allocated": "allocated_bytes.all.peak",
            "reserved": "reserved_bytes.all.peak",
            "retries": "num_alloc_retries",
        }
        stage, step, _ = self.at
        self.memory.append({"stage": stage, "step": step} | {key: stats[name] for key, name in keys.items()})

    def compiled(self, function, key, signature, constexprs, options, attrs, kernel) -> None:
        """A Triton specialisation that was asked for in this process, compiled or from the cache."""
        names = [parameter.name for parameter in function.params]
        use = resources(kernel.asm["cubin"])
        stage, step, phase = self.at
        self.specialisations.append(
            {
                "kernel": function._fn_name.rpartition(".")[2],
                "stage": stage,
                "step": step,
                "phase": phase,
                "constants": {names[at[0]]: str(value) for at, value in constexprs.items()},
                "types": {name: text for name, text in signature.items() if text != "constexpr"},
                "divisible": sorted(names[at[0]] for at, value in attrs.items() if value),
                "warps": options.num_warps,
                "stages": options.num_stages,
                "registers": use["REG"],
                "spilled_bytes": use["STACK"] + use["LOCAL"],
                "shared": kernel.metadata.shared,
                "line": self._line(),
            }
        )

    def _event(self, number: int, name: bytes, a: int, b: int, c: int, d: int) -> None:
        kind = Kind(number)
        detail = ""
        if kind is Kind.GEMM:
            detail = f"{a} x {b} x {c}" + (f" x {d}" if d > 1 else "")
            self.flops[self.at] += 2 * a * b * c * max(d, 1)
        elif kind is Kind.COPY:
            detail = DIRECTIONS[a] + ("" if c else ", pageable")
        elif kind is Kind.COLLECTIVE:
            detail = f"{a} elements"
        elif kind is Kind.BAD:
            detail = f"{a}, {b}, {c}, {d}"
        self.rows[(*self.at, kind, name.decode(), detail, self._line())] += 1

    def _line(self) -> str:
        """The innermost lines of the packages that are shown, joined by ` < `."""
        found: list[str] = []
        frame = sys._getframe().f_back  # None below a node that autograd runs in C++
        while frame is not None and len(found) < CALLERS:
            code = frame.f_code
            if code not in self._names:
                self._names[code] = shown_name(code.co_filename)
            if (name := self._names[code]) is not None:
                found.append(f"{name}:{frame.f_lineno}")
            frame = frame.f_back
        return " < ".join(found) or "autograd, in C++"

    def tree(self) -> dict[str, Any]:
        """The recording as JSON."""
        import torch

        names = ("stage", "step", "phase")
        intervals = [
            dict(zip(names, at, strict=True))
            | {
                "cpu": round(found["cpu"], 6),
                "launches": sum(found["counts"][kind] for kind in LAUNCHES),
                "gemm_flops": self.flops[at],
            }
            | {kind.name.lower(): found["counts"][kind] for kind in Kind}
            for at, found in self.intervals.items()
        ]
        rows = [
            [stage, step, phase, kind.name.lower(), name, detail, line, count]
            for (stage, step, phase, kind, name, detail, line), count in self.rows.items()
        ]
        return {
            "device": "null",
            "gpu": torch.cuda.get_device_name(),
            "rank": int(os.environ.get("RANK", 0)),
            "world": int(os.environ.get("WORLD_SIZE", 1)),
            "lines": self.lines,
            "versions": versions(),
            "calibration": calibrate(),
            "intervals": intervals,
            "memory": self.memory,
            "specialisations": self.specialisations,
            "rows": rows,
        }

    def write(self, path: Path) -> None:
        """Write the recording, whole or not at all."""
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(self.tree()))
        partial.replace(path)


def shown_name(file: str) -> str | None:
    """A source file as it is shown, from its package on; None for files that are not."""
    path = Path(file)
    if path.parent == Path(__file__).parent and path.name != "faults.py":
        return None
    for root in (CHECKOUT / "kernels", CHECKOUT):
        if path.is_relative_to(root):
            relative = path.relative_to(root)
            return str(relative) if relative.parts[0] in SHOWN and str(relative) not in PASS_THROUGH else None
    parts = path.parts
    if "site-packages" in parts:
        own = parts[len(parts) - parts[::-1].index("site-packages") :]
        return "/".join(own) if own[0] in SHOWN else None
    return None


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory of a compiled kernel, from Triton's cuobjdump; cached next to Triton's kernels."""
    import triton

    folder = Path(os.environ["TRITON_CACHE_DIR"])
    cache = folder / f"resources-{hashlib.sha256(cubin).hexdigest()[:24]}.json"
    if cache.is_file():
        return json.loads(cache.read_text())
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    environment = {key: value for key, value in os.environ.items() if key not in ("LD_PRELOAD", "NULLGPU_PLAN")}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, env=environment, check=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    partial = cache.with_name(f"{cache.name}.{os.getpid()}")
    partial.write_text(json.dumps(found))
    partial.replace(cache)
    return found


def calibrate() -> float:
    """Seconds of processor time of a fixed piece of work like a step's host side: Python calls and small torch ops.

    The host's time of a step is compared as a multiple of this, so that a baseline holds on another processor.
    """
    import torch

    one = torch.ones(4)

    def work(depth: int) -> torch.Tensor:
        return one.add(1.0) if depth == 0 else work(depth - 1)

    best = float("inf")
    for _ in range(7):
        began = time.process_time()
        for _ in range(4000):
            work(8)
        best = min(best, time.process_time() - began)
    return best


def versions() -> dict[str, str]:
    """What decides how many launches there are."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "triton", "deepspeed", "transformers", "peft")}
