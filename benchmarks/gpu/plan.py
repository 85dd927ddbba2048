"""What a short stay on a GPU runs, in order of importance: steps with their time limits, and the files they are kept in.

Nothing here needs torch: the plan is made, and the rest of it runs, also where torch does not even load.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SECONDS = 530.0
"""For everything: nine minutes, less what it takes to end the last step and to write its files."""
MAX_FILES = 8
LOG = "log.txt"
TESTED = ("attention", "step_ops", "lora_linear", "linear_cross_entropy", "info_nce", "fp8")
"""Ops with a file of GPU tests, in the order in which their results are wanted."""


@dataclass(frozen=True)
class Step:
    """One process.

    name: of the step, and of its folder. part: the file that keeps its result. arguments: behind the Python interpreter;
    {out} is the step's own folder, {work} one that all share and that stays. limit: seconds, after which it is killed.
    result: the JSON that it writes to {out}, also while it runs; read as soon as it changes.
    """

    name: str
    part: str
    arguments: tuple[str, ...]
    limit: float
    result: str = ""
    beside: str = ""
    """Steps of one group, which follow each other in the plan, run side by side: tests and whatever else is not timed."""
    ops: tuple[str, ...] = ()
    """Whose numbers it gives: if their tests fail, it runs after all others."""
    continues: tuple[str, ...] = ()
    """Steps (the newest first) one of whose results is put into its folder; it measures what that one has not."""
    least: float = 15.0
    """Seconds without which it is not started."""


LAYER = ("attention", "step_ops", "lora_linear", "linear_cross_entropy")
"""The ops of a training step of MNTP."""


def _benchmark(name: str, part: str, module: str, *options: str, limit: float, result: str = "", **settings) -> Step:
    arguments = ("-m", f"benchmarks.{module}", "--out", "{out}", *options)
    return Step(name, part, arguments, limit, f"{result or name}.json", **settings)


def _tests(op: str, workers: int) -> Step:
    parallel = ("-n", str(workers)) if workers > 1 else ()
    plugin = ("-p", "no:cacheprovider", "-p", "benchmarks.gpu.record_tests")
    arguments = ("-m", "pytest", "-q", *plugin, *parallel, f"tests/kernels/test_{op}_gpu.py")
    return Step(f"tests-{op}", "tests", arguments, 150, "tests.json", beside="tests")


def steps(cores: int = 1, *, gpu: bool = True, xdist: bool = False, peers: Sequence[str] = ()) -> list[Step]:
    """The plan.

    cores: of the CPU, shared by what is compiled side by side. gpu: whether torch finds one; without, the plan is a rehearsal
    on tiny sizes. xdist: whether pytest-xdist is installed. peers: options of `l2v bench train_step` that name environments.
    """
    workers = max(1, round(cores / len(TESTED))) if xdist else 1
    mntp = ("--workloads", "mntp", "--providers", "l2v")
    # Two layers of the model, trained beside the tests: every kernel of the step of all layers is compiled by then.
    shallow = _benchmark(
        "shallow_step", "tests", "train_step.bench", *mntp, "--ladder", "", "--model", "shallow", "--work", "{work}/shallow",
        limit=150, result="train_step", beside="tests",
    )  # fmt: skip
    versions = ("-m", "benchmarks.gpu.versions", "--out", "{out}")
    return [
        Step("versions", "versions", versions, 40, "versions.json"),
        *(_tests(op, workers) for op in TESTED),
        *([shallow] if gpu else []),
        _benchmark(
            "attention", "attention", "kernels.attention", "--quick", "--packs", "sentences,512", limit=70, ops=("attention",)
        ),
        _benchmark(
            "mntp", "train_step", "train_step.bench", *mntp, "--ladder", "", "--work", "{work}/train_step", limit=140,
            result="train_step" if gpu else "train_step_mini", ops=LAYER,
        ),
        _benchmark("contrastive", "info_nce", "kernels.contrastive", "--quick", limit=80, ops=("info_nce",)),
        *_rest(mntp, gpu, peers),
    ]  # fmt: skip


def _rest(mntp: Sequence[str], gpu: bool, peers: Sequence[str]) -> list[Step]:
    """What the time allows, and what the next call continues with."""
    trained = "train_step" if gpu else "train_step_mini"
    step = ("train_step.bench", "--work", "{work}/train_step", "--minutes")
    checked = ("tests/kernels/test_attention_gpu.py", "-k", "bit_for_bit or nan_and_no_fault")
    return [
        _benchmark(
            "mntp_plain", "rest", *step, "2", *mntp, "--ladder", "mntp", limit=130, least=45, result=trained, ops=LAYER,
            continues=("mntp_plain", "mntp"),
        ),
        _benchmark(
            "attention_more", "rest", "kernels.attention", "--quick", "--packs", "128,2048,window", limit=60, result="attention",
            ops=("attention",),
        ),
        *(
            _benchmark(name, "rest", f"kernels.{name}", "--quick", limit=60, ops=ops)
            for name, ops in (
                ("linear_cross_entropy", ("linear_cross_entropy",)), ("fused_layer", LAYER), ("step_ops", ("step_ops",))
            )
        ),
        _benchmark("fp8", "rest", "fp8.kernels", "--quick", limit=60, ops=("fp8",)),
        _benchmark("fused_model", "rest", "kernels.fused_model", *(() if gpu else ("--quick",)), limit=60, ops=LAYER),
        _benchmark("gradient_cache", "rest", "gradient_cache.bench", "--quick", limit=90, ops=LAYER),
        _benchmark(
            "train_step", "rest", *step, "5", *peers, limit=310, least=90, result=trained, ops=LAYER,
            continues=("train_step", "mntp_plain", "mntp"),
        ),
        _benchmark(
            "encode", "rest", "encode", "--work", "{work}/encode", limit=180, least=60, ops=LAYER,
            result="encode" if gpu else "encode_mini",
        ),
        # Last: on a machine where it is slow, or refused, nothing waits for it.
        Step("sanitizer", "rest", ("-m", "benchmarks.gpu.sanitizer", *checked), 120, least=40),
    ]  # fmt: skip


def parts(plan: list[Step]) -> list[str]:
    """The names of the files, without .json, in the order in which they are begun."""
    return list(dict.fromkeys(step.part for step in plan))


def groups(plan: list[Step]) -> list[list[Step]]:
    """The steps in order, those that run side by side together."""
    out: list[list[Step]] = []
    for step in plan:
        if out and step.beside and out[-1][-1].beside == step.beside:
            out[-1].append(step)
        else:
            out.append([step])
    return out


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def work_folder() -> Path:
    """Where weights and compiled kernels stay between two calls: in memory where 40 GB of it are free, as 16 GB of weights
    are written once and read by every run."""
    memory = Path("/dev/shm")
    if memory.is_dir():
        found = os.statvfs(memory)
        if found.f_bavail * found.f_frsize > 40e9:
            return memory / "l2v-benchmarks"
    return Path(os.environ.get("TMPDIR", "/tmp")) / "l2v-benchmarks"
