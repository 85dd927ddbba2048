"""What a run on the null GPU has to hold, and the committed budgets: launches, waits of DeepSpeed's own, the host's time."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from .cases import SUITE, Case
from .place import CHECKOUT
from .report import last_step, phases_of, rows_of, short, stages_of
from .run import Run

BUDGETS = CHECKOUT / "benchmarks" / "results" / "nullgpu" / "budgets.json"
MOST_SPECIALISATIONS = 30
SETTLED = 5
"""Steps after which a long run compiles nothing more and returns no memory to the device."""
WATCHED_FROM = 20
MOST_RESERVED = 1.15
MOST_HOST_TIME = 1.25
"""Of the committed one: processor time of a step's phases, as a multiple of `recorder.calibrate`."""
LEAST_WORK = 0.8
"""Work of a rank, in FLOPs of its GEMMs, as a share of the busiest rank's."""
PHASES = ("forward", "backward", "update")


def read_budgets(path: Path = BUDGETS) -> dict[str, Any]:
    """Case -> what was counted when the budgets were written; empty before the first time."""
    return json.loads(path.read_text())["cases"] if path.is_file() else {}


def findings(run: Run, budget: dict[str, Any] | None) -> list[str]:
    """A sentence for everything that is wrong with a run; none if all holds. budget: of this case, None if it has none."""
    case = run.case
    found = [
        f"rank {rank} ended with exit code {code}: {output.strip().splitlines()[-1] if output.strip() else 'no output'}"
        for rank, (code, output) in enumerate(zip(run.codes, run.outputs, strict=True))
        if code
    ]
    if len(run.recordings) < case.world:
        return [*found, f"{case.world - len(run.recordings)} of {case.world} ranks wrote no recording"]
    for recording in run.recordings:
        of_rank = _launches_that_fail(recording) + _kernels(recording)
        for stage in stages_of(recording):
            if case.long:
                of_rank += _growth(recording, stage) + _memory(recording, stage)
            else:
                of_rank += _waits(case, recording, stage)
        found += [f"rank {recording['rank']}: {text}" for text in of_rank]
    found += _balance(run.recordings)
    if budget is None:
        return [*found, f"{case.name} has no budget: run python -m tests.nullgpu check {case.name} --write"]
    return found + _against(measured(run), budget)


def _launches_that_fail(recording: dict[str, Any]) -> list[str]:
    count = sum(each["bad"] for each in recording["intervals"])
    rows = [row for row in recording["rows"] if row[3] == "bad"]
    where = "".join(f"; {short(row[4])} with {row[5]} at {row[6]}" for row in rows[:3])
    return [f"{count} launches that a GPU would refuse{where}"] if count else []


def _kernels(recording: dict[str, Any]) -> list[str]:
    found = []
    for each in recording["specialisations"]:
        if each["spilled_bytes"]:
            found.append(
                f"{each['kernel']} spills {each['spilled_bytes']} bytes with {each['registers']} registers, constants "
                f"{each['constants']}, launched at {each['line']}"
            )
    for stage in stages_of(recording):
        of_stage = [each for each in recording["specialisations"] if each["stage"] == stage]
        if len(of_stage) > MOST_SPECIALISATIONS:
            names = [each["kernel"] for each in of_stage]
            most = max(names, key=names.count)
            found.append(
                f"{stage} compiles {len(of_stage)} specialisations, more than {MOST_SPECIALISATIONS}; {names.count(most)} of "
                f"them are {most}"
            )
    return found


def _growth(recording: dict[str, Any], stage: str) -> list[str]:
    late: dict[str, list[str]] = {}
    for each in recording["specialisations"]:
        if each["stage"] == stage and each["step"] > SETTLED:
            late.setdefault(each["kernel"], []).append(each["line"])
    return [
        f"{stage} compiles {kernel} again after step {SETTLED}, {len(lines)} x at {lines[0]}: it is specialised on something "
        "that changes with the batch"
        for kernel, lines in sorted(late.items())
    ]


def _waits(case: Case, recording: dict[str, Any], stage: str) -> list[str]:
    """Waits and pageable copies inside the phases of the last step, without those of DeepSpeed that have a budget."""
    found = []
    step = last_step(recording, stage)
    for phase, kind, name, detail, line, count in rows_of(recording, stage, step, PHASES, ("wait", "copy")):
        if _of_deepspeed(case, phase, line):
            continue
        if kind == "wait":
            found.append(f"{stage} waits for the device in its {phase}, {count} x {name} at {line}")
        elif detail.endswith("pageable"):
            found.append(f"{stage} copies {detail.replace(',', ' with')} memory in its {phase}, {count} x at {line}")
    return found


def _of_deepspeed(case: Case, phase: str, line: str) -> bool:
    return phase in case.deepspeeds_phases and line.startswith("deepspeed/")


def _memory(recording: dict[str, Any], stage: str) -> list[str]:
    found = []
    steps = [each for each in recording["memory"] if each["stage"] == stage and each["step"] >= WATCHED_FROM]
    if steps:
        last = steps[-1]
        share = last["reserved"] / last["allocated"]
        if share > MOST_RESERVED:
            found.append(
                f"{stage} reserves {last['reserved'] / 2**30:.1f} GiB for {last['allocated'] / 2**30:.1f} GiB allocated after "
                f"step {last['step']}, {share:.2f} times as much; at most {MOST_RESERVED} is allowed"
            )
    frees = sum(
        each["free"]
        for each in recording["intervals"]
        if each["stage"] == stage and each["step"] > SETTLED and each["phase"] in (*PHASES, "agreement", "log")
    )
    if frees:
        found.append(
            f"{stage} returns memory to the device {frees} times after step {SETTLED}, and a GPU waits for each"
        )
    return found


def _work(recording: dict[str, Any], stage: str) -> int:
    step = last_step(recording, stage)
    return sum(each["gemm_flops"] for each in phases_of(recording, stage, step).values())


def _balance(recordings: list[dict[str, Any]]) -> list[str]:
    if len(recordings) < 2 or not recordings[0]["lines"]:
        return []
    found = []
    for stage in stages_of(recordings[0]):
        work = [_work(recording, stage) for recording in recordings]
        for recording, own in zip(recordings, work, strict=True):
            if own < LEAST_WORK * max(work):
                found.append(
                    f"rank {recording['rank']} is without its share of the work in {stage}: {own / max(work):.0%} of the "
                    "busiest rank's GEMMs"
                )
    return found


def measured(run: Run) -> dict[str, Any]:
    """What a budget is made of: of each stage the largest of all ranks."""
    found: dict[str, Any] = {}
    for recording in run.recordings:
        for stage in stages_of(recording):
            into = found.setdefault(stage, {})
            for key, value in _of_stage(run.case, recording, stage).items():
                into[key] = max(into.get(key, 0), value)
    return found


def _of_stage(case: Case, recording: dict[str, Any], stage: str) -> dict[str, float]:
    if case.long:
        return {"host": _host_time(recording, stage)} | _memory_of(recording, stage)
    step = last_step(recording, stage)
    found: dict[str, float] = {
        f"launches {phase}": each["launches"] for phase, each in phases_of(recording, stage, step).items()
    }
    found["specialisations"] = sum(each["stage"] == stage for each in recording["specialisations"])
    waits = [row for row in rows_of(recording, stage, step, PHASES, ("wait",)) if _of_deepspeed(case, row[0], row[4])]
    for phase in case.deepspeeds_phases:
        found[f"waits of DeepSpeed in the {phase}"] = sum(row[5] for row in waits if row[0] == phase)
    return found


def _memory_of(recording: dict[str, Any], stage: str) -> dict[str, float]:
    last = [each for each in recording["memory"] if each["stage"] == stage][-1]
    return {"GiB allocated": round(last["allocated"] / 2**30, 2), "GiB reserved": round(last["reserved"] / 2**30, 2)}


def _host_time(recording: dict[str, Any], stage: str) -> float:
    """Median over the settled steps of the processor time of a step's phases, as a multiple of the calibration."""
    steps = range(SETTLED + 1, last_step(recording, stage) + 1)
    times = [sum(each["cpu"] for each in phases_of(recording, stage, step).values()) for step in steps]
    return round(statistics.median(times) / recording["calibration"], 3)


def _against(now: dict[str, Any], budget: dict[str, Any]) -> list[str]:
    found = []
    for stage, counts in now.items():
        for key, value in counts.items():
            if key.startswith("GiB"):  # for the reader; the rule is a share
                continue
            limit = budget.get(stage, {}).get(key)
            if limit is None:
                found.append(f"{stage}: no budget for {key}")
            elif key == "host":
                if value > MOST_HOST_TIME * limit:
                    found.append(
                        f"{stage}: the host takes {value / limit:.2f} times its committed time for a step; at most "
                        f"{MOST_HOST_TIME} is allowed"
                    )
            elif value > limit:
                found.append(f"{stage}: {key} {value:g}, more than the committed {limit:g}")
    return found


def per_layer(cases: dict[str, Any], layers: int = 32) -> dict[str, dict[str, float]]:
    """Stage -> phase -> launches of one layer, from the runs with all layers and with two."""
    found = {}
    for stage in (name for name in cases if f"{name}-2-layers" in cases):
        whole, two = cases[stage][stage], cases[f"{stage}-2-layers"][stage]
        keys = [key for key in whole if key.startswith("launches ")]
        found[stage] = {key.removeprefix("launches "): round((whole[key] - two[key]) / (layers - 2), 2) for key in keys}
    return found


def write_budgets(runs: list[Run], path: Path = BUDGETS) -> None:
    """Put what these runs counted in place of the committed budgets of their cases."""
    cases = read_budgets(path) | {run.case.name: measured(run) for run in runs}
    cases = {name: cases[name] for name in SUITE if name in cases}
    facts = {"device": "null", "written by": "python -m tests.nullgpu check --write"} | runs[-1].recordings[0][
        "versions"
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    tree = {"facts": facts, "launches per layer": per_layer(cases), "cases": cases}
    path.write_text(json.dumps(tree, indent=1) + "\n")
