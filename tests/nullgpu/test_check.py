"""The rules of the null GPU's suite on small recordings: what holds passes, and each fault is named in its sentence."""

from __future__ import annotations

import copy
import json
import re

import pytest

from . import build
from .cases import LONG, SUITE, Case
from .check import MOST_SPECIALISATIONS, findings, measured, per_layer, read_budgets, write_budgets
from .command import main
from .events import LAUNCHES, Kind
from .place import CHECKOUT, Home, NullGpuError
from .report import LAUNCHES as REPORTED
from .report import STEP_PHASES, render
from .run import Run

SHORT = SUITE["mntp"]
TWO_RANKS = SUITE["mntp-2-ranks"]
LONG_RUN = Case("mntp-long", "mntp", steps=LONG, lines=False)


def interval(step: int, phase: str, **counts: float) -> dict:
    empty = {kind.name.lower(): 0 for kind in Kind}
    found = {"stage": "mntp", "step": step, "phase": phase, "cpu": 0.1, "launches": 10, "gemm_flops": 10**12}
    return found | empty | counts


def kernel(name: str = "rope_kernel", step: int = 1, spilled: int = 0) -> dict:
    found = {
        "kernel": name,
        "stage": "mntp",
        "step": step,
        "phase": "forward",
        "constants": {"HEADS": "8"},
        "divisible": [],
    }
    return found | {
        "warps": 4,
        "stages": 3,
        "registers": 40,
        "spilled_bytes": spilled,
        "shared": 0,
        "line": "ours.py:1",
    }


def recording(rank: int = 0, steps: int = 3) -> dict:
    """A run of the stage mntp in which nothing is wrong."""
    rows = [
        ["mntp", steps, "forward", "gemm", "GemmEx", "8 x 8 x 8", "l2v/ours.py:1", 10],
        ["mntp", steps, "agreement", "wait", "cudaStreamSynchronize", "", "l2v/training/agreement.py:1", 1],
        ["mntp", steps, "update", "wait", "cudaStreamSynchronize", "", "deepspeed/runtime/utils.py:1", 2],
    ]
    memory = [
        {"stage": "mntp", "step": step + 1, "allocated": 100 << 30, "reserved": 110 << 30} for step in range(steps)
    ]
    return {
        "device": "null", "gpu": "null GPU sm_90", "rank": rank, "world": 1, "lines": True, "versions": {"torch": "2.11.0"},
        "calibration": 0.02, "rows": rows, "memory": memory, "specialisations": [kernel()],
        "intervals": [interval(step + 1, phase) for step in range(steps) for phase in STEP_PHASES],
    }  # fmt: skip


def finished(case: Case, *recordings: dict) -> Run:
    return Run(case, [0] * case.world, ["done"] * case.world, list(recordings))


def budget_of(run: Run) -> dict:
    return measured(run)


def test_a_run_without_fault_holds():
    short = finished(SHORT, recording())
    assert findings(short, budget_of(short)) == []
    long = finished(LONG_RUN, recording(steps=LONG))
    assert findings(long, budget_of(long)) == []
    two = finished(TWO_RANKS, recording(0), recording(1))
    assert findings(two, budget_of(two)) == []


ROW = ["mntp", 3, "backward"]
FAULTS = {
    "a wait in the backward": (
        lambda r: r["rows"].append([*ROW, "wait", "cudaStreamSynchronize", "", "l2v/bad.py:7", 2]),
        "rank 0: mntp waits for the device in its backward, 2 x cudaStreamSynchronize at l2v/bad.py:7",
    ),
    "a wait in the update that is not DeepSpeed's": (
        lambda r: r["rows"].append(["mntp", 3, "update", "wait", "cudaStreamSynchronize", "", "l2v/bad.py:8", 1]),
        "rank 0: mntp waits for the device in its update, 1 x cudaStreamSynchronize at l2v/bad.py:8",
    ),
    "one more of DeepSpeed's": (
        lambda r: r["rows"].append(["mntp", 3, "update", "wait", "cudaMemcpy", "", "deepspeed/x.py:1", 1]),
        "mntp: waits of DeepSpeed in the update 3, more than the committed 2",
    ),
    "a pageable copy": (
        lambda r: r["rows"].append([*ROW, "copy", "cudaMemcpyAsync", "host to device, pageable", "l2v/bad.py:9", 1]),
        "rank 0: mntp copies host to device with pageable memory in its backward, 1 x at l2v/bad.py:9",
    ),
    "a launch that fails": (
        lambda r: (
            r["intervals"][0].update(bad=1),
            r["rows"].append([*ROW, "bad", "grown", "0, 1, 1, 128", "l2v/bad.py:3", 1]),
        ),
        "rank 0: 1 launches that a GPU would refuse; grown with 0, 1, 1, 128 at l2v/bad.py:3",
    ),
    "a spill": (
        lambda r: r["specialisations"].append(kernel("fat_kernel", spilled=64)),
        "rank 0: fat_kernel spills 64 bytes with 40 registers, constants {'HEADS': '8'}, launched at ours.py:1",
    ),
    "one launch more": (
        lambda r: r["intervals"][-3].update(launches=11),
        "mntp: launches backward 11, more than the committed 10",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(name):
    plant, sentence = FAULTS[name]
    clean = finished(SHORT, recording())
    faulty = recording()
    plant(faulty)
    assert sentence in findings(finished(SHORT, faulty), budget_of(clean))


def test_too_many_specialisations():
    run = finished(SHORT, recording() | {"specialisations": [kernel() for _ in range(MOST_SPECIALISATIONS + 1)]})
    assert findings(run, budget_of(run)) == [
        "rank 0: mntp compiles 31 specialisations, more than 30; 31 of them are rope_kernel"
    ]


def test_a_long_run_judges_growth_memory_and_the_hosts_time():
    clean = finished(LONG_RUN, recording(steps=LONG))
    faulty = copy.deepcopy(recording(steps=LONG))
    faulty["specialisations"].append(kernel("grows", step=20))
    faulty["memory"][-1]["reserved"] = 120 << 30
    for each in faulty["intervals"][40:]:
        each["cpu"] = 0.2
    faulty["intervals"][-1]["free"] = 3
    assert findings(finished(LONG_RUN, faulty), budget_of(clean)) == [
        "rank 0: mntp compiles grows again after step 5, 1 x at ours.py:1: it is specialised on something that changes with "
        "the batch",
        "rank 0: mntp reserves 120.0 GiB for 100.0 GiB allocated after step 24, 1.20 times as much; at most 1.15 is allowed",
        "rank 0: mntp returns memory to the device 3 times after step 5, and a GPU waits for each",
        "mntp: the host takes 2.00 times its committed time for a step; at most 1.25 is allowed",
    ]


def test_a_rank_without_work_or_without_an_end():
    idle = recording(1)
    for each in idle["intervals"]:
        each["gemm_flops"] = 0
    run = finished(TWO_RANKS, recording(0), idle)
    assert findings(run, budget_of(run)) == [
        "rank 1 is without its share of the work in mntp: 0% of the busiest rank's GEMMs"
    ]
    run = Run(TWO_RANKS, [0, 1], ["done", "l2v: the error\n"], [recording()])
    assert findings(run, {}) == ["rank 1 ended with exit code 1: l2v: the error", "1 of 2 ranks wrote no recording"]


def test_zero_3_waits_for_its_weights_within_a_budget():
    case = SUITE["mntp-zero3"]
    waiting = recording()
    waiting["rows"].append(
        ["mntp", 3, "forward", "wait", "cudaStreamSynchronize", "", "deepspeed/runtime/zero/x.py:1", 65]
    )
    budget = budget_of(finished(case, waiting))
    assert findings(finished(case, waiting), budget) == []
    assert findings(finished(SHORT, waiting), budget_of(finished(SHORT, waiting))) == [
        "rank 0: mntp waits for the device in its forward, 65 x cudaStreamSynchronize at deepspeed/runtime/zero/x.py:1"
    ]
    waiting["rows"][-1][-1] = 66
    assert findings(finished(case, waiting), budget) == [
        "mntp: waits of DeepSpeed in the forward 66, more than the committed 65"
    ]


def test_budgets_are_written_and_read_again(tmp_path):
    path = tmp_path / "budgets.json"
    assert read_budgets(path) == {}
    assert findings(finished(SHORT, recording()), None) == [
        "mntp has no budget: run python -m tests.nullgpu check mntp --write"
    ]
    two = SUITE["mntp-2-layers"]
    whole = recording()
    for each in whole["intervals"]:
        each["launches"] = 610
    write_budgets([finished(SHORT, whole)], path)
    write_budgets([finished(two, recording())], path)
    assert read_budgets(path).keys() == {"mntp", "mntp-2-layers"}
    tree = json.loads(path.read_text())
    assert tree["facts"]["device"] == "null"
    assert tree["launches per layer"] == per_layer(tree["cases"]) == {"mntp": dict.fromkeys(STEP_PHASES, 20.0)}


def test_the_committed_budgets_are_of_the_null_gpu_and_name_cases():
    file = CHECKOUT / "benchmarks" / "results" / "nullgpu" / "budgets.json"
    assert json.loads(file.read_text())["facts"]["device"] == "null"
    assert read_budgets().keys() <= SUITE.keys()


def test_the_report_names_phases_and_lines():
    said = render(recording())
    assert "device: null" in said and "== mntp, step 3" in said
    assert re.search(r"^forward +10 ", said, re.MULTILINE) and "    10 gemm       GemmEx" in said
    assert "wait 1 x cudaStreamSynchronize   l2v/training/agreement.py:1" in said


def test_numbers_of_events_are_those_of_the_stub():
    header = (build.STUB / "nullgpu.h").read_text()
    numbers = {name: int(value) for name, value in re.findall(r"^  ([A-Z]+) = (\d+)", header, re.MULTILINE)}
    assert numbers == {kind.name: kind.value for kind in Kind} | {"KINDS": len(Kind)}
    assert [kind.name.lower() for kind in LAUNCHES] == sorted(REPORTED, key=lambda name: Kind[name.upper()])


def test_the_folder_is_the_users_and_outside_the_checkout(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("L2V_NULLGPU_HOME", raising=False)
    assert main(["check"]) == 1
    assert (
        capsys.readouterr().err == "nullgpu: no folder for the null GPU: give one with --home or in L2V_NULLGPU_HOME\n"
    )
    with pytest.raises(NullGpuError, match="inside the checkout: give a folder outside it"):
        Home.find(str(CHECKOUT / "build" / "nullgpu"))
    assert main(["train", "mntp", "--home", str(tmp_path)]) == 1
    assert f"run python -m tests.nullgpu build --home {tmp_path}" in capsys.readouterr().err
    assert main(["check", "mntp8", "--home", str(tmp_path)]) == 1
    assert "no case mntp8; there are mntp, " in capsys.readouterr().err


def test_nothing_is_fetched_without_permission(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(build, "_download_bytes", lambda: 2_500_000_000)
    monkeypatch.setattr(build, "_install", lambda home: pytest.fail("fetched"))
    assert main(["build", "--home", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "2.5 GB to download" in said and "--download" in said and not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "{}", "[1]"])
def test_a_file_that_is_no_recording_is_refused(content, tmp_path, capsys):
    file = tmp_path / "recording.json"
    file.write_text(content)
    assert main(["report", str(file)]) == 1
    assert f"{file} is no recording" in capsys.readouterr().err
