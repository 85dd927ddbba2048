"""The table of `l2v plan`: launches of a layer, of what surrounds the layers and of the update, and the host's time for them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .cases import Case
from .place import CHECKOUT, Home, NullGpuError
from .report import last_step, phases_of
from .run import Run, run_case

TABLE = CHECKOUT / "l2v" / "plan" / "counts.json"
LAYERS = 32
FEW, MORE = 2, 4
"""Models of so many layers differ by the launches of MORE - FEW layers."""
STEPS = 8
SETTLED = 3
"""The first steps also compile."""
KINDS = {"fused": ("none", "cheap", "layer"), "plain": ("none", "layer")}
ZERO = (0, 1, 2, 3)
PASSES = ("forward", "backward")
UPDATE = ("agreement", "update")
"""Phases that a step has once, whatever the number of its micro-batches."""


def case(kind: str, recompute: str, layers: int, zero: int = 1) -> Case:
    """Steps of MNTP, one micro-batch each, without lines: the host's time is that of a real run."""
    overrides = [f"base.layers={kind}", f"stages.mntp.recompute={recompute}", f"zero.stage={zero}"]
    if layers != LAYERS:
        overrides.append(f"base.overrides={{num_hidden_layers: {layers}}}")
    name = f"plan-{kind}-{recompute}-{layers}-layers-zero{zero}"
    return Case(name, "mntp", tuple(overrides), steps=STEPS, lines=False)


def cases() -> list[Case]:
    """What the table is made of."""
    found = [case(kind, way, few) for kind, ways in KINDS.items() for way in ways for few in (FEW, MORE)]
    return found + [case("fused", "none", LAYERS, zero) for zero in ZERO]


def write_table(home: Home, path: Path = TABLE) -> str:
    """Run all of them and write the table; returns a line to print.

    Raises:
        NullGpuError: a run failed, or launches do not grow evenly with the layers.
    """
    runs, load = {}, 0.0
    for each in cases():
        load = max(load, os.getloadavg()[0])
        run = run_case(home, each)
        if any(run.codes) or not run.recordings:
            raise NullGpuError(f"{each.name} ended with exit code {run.codes[0]}:\n{run.outputs[0][-2000:]}")
        runs[each.name] = run
        print(each.name, launches(run, (*PASSES, *UPDATE)), flush=True)
    tree = table(runs, json.loads(path.read_text())["launch_seconds"], load)
    path.write_text(rendered(tree))
    return f"wrote {path}"


def table(runs: dict[str, Run], launch_seconds: float, load: float) -> dict[str, Any]:
    """The tree of `l2v.plan.counts.Counts`.

    launch_seconds: of the driver for a launch, which is not counted here. load: how many processes wanted a processor at
    most; above the number of its cores they lengthened the seconds.

    Raises:
        NullGpuError: launches do not grow evenly with the layers.
    """

    def of(kind: str, way: str, layers: int, zero: int = 1) -> Run:
        return runs[case(kind, way, layers, zero).name]

    few, whole = of("fused", "none", FEW), of("fused", "none", LAYERS)
    per_layer = {
        kind: {way: _slopes(of(kind, way, FEW), of(kind, way, MORE)) for way in ways} for kind, ways in KINDS.items()
    }
    slopes = per_layer["fused"]["none"]
    other = [count - FEW * slope for count, slope in zip(launches(few, PASSES), slopes, strict=True)]
    expected = [LAYERS * slope + rest for slope, rest in zip(slopes, other, strict=True)]
    if launches(whole, PASSES) != expected:
        raise NullGpuError(
            f"{LAYERS} layers launch {launches(whole, PASSES)} in forward and backward, not the {expected} that models of "
            f"{FEW} and {MORE} layers give: see whether the step has more than one micro-batch"
        )
    times = [
        [round((seconds(whole, phase) - seconds(few, phase)) / (LAYERS - FEW), 6) for phase in PASSES],
        {str(zero): round(sum(seconds(of("fused", "none", LAYERS, zero), p) for p in UPDATE), 5) for zero in ZERO},
    ]
    return {
        "source": _source(whole.recordings[0]["versions"], load),
        "model": {"layers": LAYERS},
        "layer_launches": per_layer,
        "other_launches": other,
        "update_launches": {str(z): sum(launches(of("fused", "none", LAYERS, z), UPDATE)) for z in ZERO},
        "layer_seconds": times[0],
        "update_seconds": times[1],
        "launch_seconds": launch_seconds,
    }


def launches(run: Run, phases: Sequence[str]) -> list[int]:
    """Of the last step, a number for each phase."""
    recording = run.recordings[0]
    found = phases_of(recording, "mntp", last_step(recording, "mntp"))
    return [found[phase]["launches"] for phase in phases]


def seconds(run: Run, phase: str) -> float:
    """Processor time of a phase, the least of the settled steps: other processes can only add to it."""
    recording = run.recordings[0]
    steps: Iterable[int] = range(SETTLED + 1, last_step(recording, "mntp") + 1)
    return min(phases_of(recording, "mntp", step)[phase]["cpu"] for step in steps)


def rendered(tree: dict[str, Any]) -> str:
    """JSON with a line for each entry, and for each kind of layer."""
    lines = []
    for key, value in tree.items():
        text = json.dumps(value)
        if key == "layer_launches":
            text = "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n }"
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _slopes(few: Run, more: Run) -> list[int]:
    found = []
    for less, greater, phase in zip(launches(few, PASSES), launches(more, PASSES), PASSES, strict=True):
        slope, rest = divmod(greater - less, MORE - FEW)
        if rest:
            raise NullGpuError(
                f"{more.case.name} launches {greater} in its {phase} and {few.case.name} {less}: not the same number a layer"
            )
        found.append(slope)
    return found


def _source(versions: dict[str, str], load: float) -> str:
    build = f"CUDA build of torch {versions['torch']}, Triton {versions['triton']}, DeepSpeed {versions['deepspeed']}"
    return (
        "counted by python -m tests.nullgpu plan-counts in steps of Llama-3-8B at full size on a stand-in for a GPU that "
        f"computes nothing ({build}); seconds are processor time of a core of the machine that counted, which had a load of at "
        f"most {load:.1f} on {os.cpu_count()} cores"
    )
