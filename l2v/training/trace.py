"""Where the time of a step goes, computed from a Chrome trace of torch.profiler.

On a GPU the time is that of kernels, and the GPU is idle when none runs. On a CPU it is the self time of operators in the
training thread, and idle is when no operator runs (Python, or waiting for data).
"""

from __future__ import annotations

import functools
import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from l2v_kernels.spans import PREFIX

STEP = PREFIX + "step"
KINDS = (
    "gemm", "attention", "norm", "lora", "head", "loss", "swiglu", "rope", "pooling", "optimizer", "communication", "copy",
    "other", "idle",
)  # fmt: skip
KERNELS = {"kernel", "gpu_memcpy", "gpu_memset"}
LAUNCHES = {"cuda_runtime", "cuda_driver"}
HOST = {"cpu_op", "user_annotation"} | LAUNCHES

# These names always have this kind, in any span.
ALWAYS = (
    ("communication", r"nccl|^c10d::|^gloo:|^record_param_comms"),
    ("copy", r"^Mem(cpy|set)"),
)
# Operators and autograd functions that count as a span.
FRAMES = (
    ("optimizer", r"^Optimizer\.|AccumulateGrad$"),
    ("attention", r"scaled_dot_product|_flash_attention|_efficient_attention|^FusedAttention"),
    ("norm", r"^RmsNorm|^aten::(_fused_)?rms_norm$|layer_norm$"),
    ("lora", r"^LoraLinear|^PhiloxDropout"),
    ("rope", r"^Rotary(Backward)?$"),
    ("swiglu", r"^SwiGlu"),
    ("head", r"^LinearCrossEntropy"),
    ("loss", r"^InfoNce|cross_entropy"),
)
# The kind by name alone, outside any span: kernels of CUDA libraries and our own, and operators of torch. The first match
# counts.
NAMES = (
    ("attention", r"flash|fmha|attention|^(query|key)_gradient_kernel$"),
    ("lora", r"^lora_\w+_kernel$|^dropout_kernel$"),
    ("head", r"^softmax_stats_kernel$"),
    ("loss", r"^(fused_)?(statistics|coefficients)_kernel$|^(norms|finish)_kernel$|softmax|nll_loss"),
    ("optimizer", r"multi_tensor_apply|[Aa]dam|_foreach_"),
    ("rope", r"^rope_kernel$"),
    ("swiglu", r"silu|swiglu"),
    ("norm", r"rms_?norm|layer_?norm|RMSNorm|LayerNorm"),
    ("pooling", r"^(pool|combine)_kernel$|segment_reduce"),
    (
        "gemm",
        r"gemm|gemv|nvjet|cutlass|cublas|xmma|splitK|^aten::(mm|addmm|bmm|baddbmm|addbmm|linear|_scaled_mm|_addmm_activation)_?$"
        r"|mkldnn_linear|mkl_linear",
    ),
    ("copy", r"^aten::(copy_|_to_copy|clone)$"),
)


@dataclass
class Use:
    """One kind of work in a step: milliseconds, share of the step, launches (on a CPU: operator calls)."""

    kind: str
    ms: float = 0.0
    share: float = 0.0
    launches: float = 0.0


@dataclass
class Table:
    """A step's time by kind (all of KINDS; shares add up to 1), and the longest kernels or operators (see `counted`)."""

    counted: str
    steps: int
    step_ms: float
    uses: list[Use]
    longest: list[dict[str, Any]] = field(default_factory=list)


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a trace, .json or .json.gz."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as stream:
        return json.load(stream)["traceEvents"]


def tabulate(events: Iterable[dict[str, Any]], *, longest: int = 15) -> Table:
    """The table of a trace whose steps are spans named STEP.

    Raises:
        ValueError: the trace has no such span.
    """
    events = list(events)
    host = _Host(events)
    if not host.steps:
        raise ValueError(f"no span '{STEP}' in the trace")
    kernels = [e for e in events if e.get("ph") == "X" and e.get("cat") in KERNELS]
    pieces = list(_kernels(kernels, host) if kernels else host.operators())
    wall = sum(end - start for start, end in host.steps)
    spent = _share_out(pieces) if kernels else _add_up(pieces)
    launches = Counter(piece.kind for piece in pieces if piece.outer)
    spent["idle"] = max(0.0, wall - sum(spent.values()))
    n = len(host.steps)
    uses = [Use(kind, spent[kind] / 1e3 / n, spent[kind] / wall, launches[kind] / n) for kind in KINDS]
    return Table("kernels" if kernels else "operators", n, wall / 1e3 / n, uses, _longest(pieces, n, longest))


def kind_of_name(name: str) -> str | None:
    """The kind of a kernel or an operator by its name alone."""
    return _first(ALWAYS, name) or _first(NAMES, name)


@dataclass
class _Piece:
    """A kernel or operator, with times in microseconds of the trace."""

    name: str
    kind: str
    start: float
    time: float
    outer: bool = True
    """Not called by another operator."""


@dataclass
class _Open:
    """A span, operator or launch that is still running in its thread."""

    event: dict[str, Any]
    end: float
    frame: str | None
    named: str | None
    in_step: bool
    alone: float
    outer: bool


class _Host:
    """The events of the CPU: the kind of work that each launch and each operator belongs to."""

    def __init__(self, events: list[dict[str, Any]]) -> None:
        self.steps: list[tuple[float, float]] = []
        self.launches: dict[int, str | None] = {}
        """Kind of each launch, by the correlation id that it shares with its kernel."""
        self.operations: dict[int, str | None] = {}
        """Kind of each operator, by the external id that kernels carry; for kernels whose launch is not in the trace."""
        self.done: list[_Open] = []
        of_forward: dict[Any, str | None] = {}
        """Kind of each forward operator that has a backward, by the id of the flow between them."""
        starts, ends = _flows(events)
        threads: dict[Any, list[_Open]] = defaultdict(list)
        found = [e for e in events if e.get("ph") == "X" and e.get("cat") in HOST]
        # In order of time over all threads, so a forward comes before its backward, which may run in another thread.
        for event in sorted(found, key=lambda e: (e["ts"], -e["dur"])):
            place, stack = (event["tid"], event["ts"]), threads[event["tid"]]
            while stack and stack[-1].end <= event["ts"]:
                self.done.append(stack.pop())
            above = stack[-1] if stack else None
            name, end = event["name"], event["ts"] + event["dur"]
            is_step = name == STEP and event["cat"] == "user_annotation"
            if is_step:
                self.steps.append((event["ts"], end))
            frame = self._own(event)
            if frame is None and place in ends:
                frame = of_forward.get(ends[place])
            if frame is None and above:
                frame = above.frame
            named = kind_of_name(name) or (above.named if above else None)
            for flow in starts.get(place, ()):
                of_forward[flow] = frame
            if event["cat"] in LAUNCHES:
                self.launches[event.get("args", {}).get("correlation")] = frame
                continue
            self.operations[event.get("args", {}).get("External id")] = frame
            if above:
                above.alone -= min(end, above.end) - event["ts"]
            in_step = is_step or bool(above and above.in_step)
            outer = not any(_is_operator(each.event) for each in stack)
            stack.append(_Open(event, end, frame, named, in_step, event["dur"], outer))
        for stack in threads.values():
            self.done += stack

    def _own(self, event: dict[str, Any]) -> str | None:
        name = event["name"]
        if name.startswith(PREFIX):
            kind = name.removeprefix(PREFIX)
            return kind if kind in KINDS else None
        return _first(FRAMES, name)

    def frame_of(self, kernel: dict[str, Any]) -> str | None:
        """The kind of the span that a kernel was launched from, or None."""
        args = kernel.get("args", {})
        if args.get("correlation") in self.launches:
            return self.launches[args["correlation"]]
        return self.operations.get(args.get("External id"))

    def operators(self) -> Iterable[_Piece]:
        """The operators that ran within a step, each with its self time."""
        for op in self.done:
            if op.in_step and _is_operator(op.event) and op.alone > 0:
                name = op.event["name"]
                kind = _first(ALWAYS, name) or op.frame or op.named or "other"
                yield _Piece(name, kind, op.event["ts"], op.alone, outer=op.outer)


def _is_operator(event: dict[str, Any]) -> bool:
    """Whether an event does work itself: `aten::mm` does; spans and autograd functions only contain operators."""
    return event["cat"] == "cpu_op" and "::" in event["name"] and "autograd::" not in event["name"]


def _flows(events: list[dict[str, Any]]) -> tuple[dict[Any, list], dict[Any, Any]]:
    """The profiler's flows from forward to backward: (thread, time) of the start -> ids, (thread, time) of the end -> id."""
    starts: dict[Any, list] = defaultdict(list)
    ends: dict[Any, Any] = {}
    for event in events:
        if event.get("cat") == "fwdbwd":
            place = (event["tid"], event["ts"])
            if event["ph"] == "s":
                starts[place].append(event["id"])
            elif event["ph"] == "f":
                ends[place] = event["id"]
    return starts, ends


def _kernels(kernels: list[dict[str, Any]], host: _Host) -> Iterable[_Piece]:
    """The kernels within the steps, clipped to them."""
    for event in kernels:
        start, end = event["ts"], event["ts"] + event["dur"]
        name = event["name"]
        kind = _first(ALWAYS, name) or host.frame_of(event) or _first(NAMES, name) or "other"
        for first, last in host.steps:
            if first < end and start < last:
                yield _Piece(name, kind, max(start, first), min(end, last) - max(start, first))


def _share_out(pieces: list[_Piece]) -> dict[str, float]:
    """Microseconds by kind. While several kernels run at once, each gets an equal part of the time."""
    edges = [(piece.start, 1, piece.kind) for piece in pieces]
    edges += [(piece.start + piece.time, -1, piece.kind) for piece in pieces]
    spent: dict[str, float] = defaultdict(float)
    running: Counter = Counter()
    before, total = 0.0, 0
    for at, change, kind in sorted(edges, key=lambda edge: edge[:2]):
        if total:
            for other, count in running.items():
                spent[other] += (at - before) * count / total
        running[kind] += change
        total += change
        if not running[kind]:
            del running[kind]
        before = at
    return spent


def _add_up(pieces: list[_Piece]) -> dict[str, float]:
    spent: dict[str, float] = defaultdict(float)
    for piece in pieces:
        spent[piece.kind] += piece.time
    return spent


def _longest(pieces: list[_Piece], steps: int, limit: int) -> list[dict[str, Any]]:
    time: dict[tuple[str, str], float] = defaultdict(float)
    count: Counter = Counter()
    for piece in pieces:
        time[piece.name, piece.kind] += piece.time
        count[piece.name, piece.kind] += 1
    return [
        {"name": name, "kind": kind, "ms": spent / 1e3 / steps, "launches": count[name, kind] / steps}
        for (name, kind), spent in sorted(time.items(), key=lambda item: item[1], reverse=True)[:limit]
    ]


@functools.cache
def _first(rules: tuple[tuple[str, str], ...], name: str) -> str | None:
    return next((kind for kind, pattern in rules if re.search(pattern, name)), None)
