"""A recording as text: launches by phase, and by the line that asked for them."""

from __future__ import annotations

import collections
import functools
import re
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

LAUNCHES = ("kernel", "triton", "gemm", "set", "copy", "collective")
STEP_PHASES = ("forward", "backward", "agreement", "update")


def stages_of(recording: dict[str, Any]) -> list[str]:
    """The stages that were trained, in order."""
    return list(dict.fromkeys(each["stage"] for each in recording["intervals"] if each["step"]))


def last_step(recording: dict[str, Any], stage: str) -> int:
    """The last step of a stage."""
    return max(each["step"] for each in recording["intervals"] if each["stage"] == stage)


def phases_of(recording: dict[str, Any], stage: str, step: int) -> dict[str, dict[str, Any]]:
    """Phase -> its interval, for the phases of a step that train."""
    found = {each["phase"]: each for each in recording["intervals"] if (each["stage"], each["step"]) == (stage, step)}
    return {phase: found[phase] for phase in STEP_PHASES if phase in found}


def rows_of(
    recording: dict[str, Any], stage: str, step: int, phases: Sequence[str], kinds: Sequence[str]
) -> Iterator[tuple[str, str, str, str, str, int]]:
    """(phase, kind, name, detail, line, count) of what happened in a step."""
    for at_stage, at_step, phase, kind, name, detail, line, count in recording["rows"]:
        if (at_stage, at_step) == (stage, step) and phase in phases and kind in kinds:
            yield phase, kind, name, detail, line, count


def render(recording: dict[str, Any], step: int | None = None, *, limit: int = 40) -> str:
    """Every stage's last step, or the one given: a table of phases, then a phase's lines, most launches first."""
    head = f"{recording['gpu']}, rank {recording['rank']} of {recording['world']}, device: null (kernels are counted, not run)"
    parts = [head, ", ".join(f"{name} {version}" for name, version in recording["versions"].items())]
    for stage in stages_of(recording):
        at = step or last_step(recording, stage)
        phases = phases_of(recording, stage, at)
        if not phases:
            continue
        parts += ["", f"== {stage}, step {at}", _table(phases)]
        for phase in phases:
            parts += _lines(recording, stage, at, phase, limit)
    parts += ["", _specialisations(recording)]
    if memory := recording["memory"]:
        peak = max(each["allocated"] for each in memory), max(each["reserved"] for each in memory)
        parts.append(f"memory: {peak[0] / 2**30:.1f} GiB allocated at most, {peak[1] / 2**30:.1f} reserved")
    return "\n".join(parts)


def _table(phases: dict[str, dict[str, Any]]) -> str:
    columns = ("launches", *LAUNCHES, "wait", "allocate", "free")
    lines = [f"{'':10s}" + "".join(f"{column:>11s}" for column in columns) + f"{'host ms':>11s}"]
    for phase, found in phases.items():
        cells = "".join(f"{found[column]:11d}" for column in columns)
        lines.append(f"{phase:10s}{cells}{1e3 * found['cpu']:11.1f}")
    cells = "".join(f"{sum(found[column] for found in phases.values()):11d}" for column in columns)
    lines.append(f"{'together':10s}{cells}{1e3 * sum(found['cpu'] for found in phases.values()):11.1f}")
    return "\n".join(lines)


def _lines(recording: dict[str, Any], stage: str, step: int, phase: str, limit: int) -> list[str]:
    counted: collections.Counter[tuple[str, str, str]] = collections.Counter()
    notes = []
    for _, kind, name, detail, line, count in rows_of(recording, stage, step, [phase], (*LAUNCHES, "wait", "bad")):
        if kind in LAUNCHES:
            counted[kind, short(name), line] += count
        if kind in ("wait", "bad") or detail.endswith("pageable"):
            notes.append(f"  {kind} {count} x {short(name)} {detail}  {line}")
    if not counted and not notes:
        return []
    found = [f"\n{phase}, by line:"]
    for (kind, name, line), count in counted.most_common(limit):
        found.append(f"{count:6d} {kind:10s} {name:40s} {line}")
    if len(counted) > limit:
        rest = sum(count for _, count in counted.most_common()[limit:])
        found.append(f"{rest:6d} from {len(counted) - limit} other lines")
    return found + notes


def _specialisations(recording: dict[str, Any]) -> str:
    by_kernel: dict[str, list[dict[str, Any]]] = {}
    for each in recording["specialisations"]:
        by_kernel.setdefault(each["kernel"], []).append(each)
    lines = [f"{len(recording['specialisations'])} specialisations of Triton kernels"]
    for kernel, found in sorted(by_kernel.items()):
        registers = max(each["registers"] for each in found)
        spilled = max(each["spilled_bytes"] for each in found)
        lines.append(f"{len(found):6d} {kernel:40s} registers {registers:3d}, spilled bytes {spilled}")
    return "\n".join(lines)


@functools.cache
def short(name: str) -> str:
    """A kernel's name as a reader knows it: of a C++ name what it does, without its template arguments."""
    if not name.startswith("_Z"):
        return name
    try:
        full = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip()
    except OSError:  # no binutils
        return name[:60]
    inner = re.findall(r"(?:native|detail)::(\w*(?:Functor|functor|kernel_cuda|_kernel|Op)\w*)", full)
    if inner:
        return "/".join(dict.fromkeys(inner))[:60]
    plain = re.sub(r"^void ", "", full).replace("(anonymous namespace)::", "")
    return re.split(r"[<(]", plain)[0].rpartition("::")[2][:60]
