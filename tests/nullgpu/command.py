"""`python -m tests.nullgpu`: the command line."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .benches import BENCHMARKS
from .build import build
from .cases import RECIPE, STEADY, SUITE, Case
from .check import findings, read_budgets, write_budgets
from .place import CAPABILITIES, CHECKOUT, VARIABLE, Home, NullGpuError, Plan
from .plan_counts import TABLE, write_table
from .report import render, stages_of
from .run import run_case

# Imported, not run with -m, which would give the module another name than the one that ignore.py waits for.
STARTED = "import importlib, sys; sys.exit(importlib.import_module(sys.argv[1]).main(sys.argv[2:]))"
ABOUT = f"""\
Counts what l2v's CUDA path does, on a machine without a GPU.

The real CUDA build of torch, Triton and DeepSpeed run on a GPU that does nothing: kernels are compiled for the
architecture that you choose and counted, memory is address space, and every value that is read back is zero. It shows
errors of Python and of compilation, launches by phase and line, waits for the device, copies from pageable memory,
spills, specialisations, the host's time, allocated and reserved memory, collectives. It cannot show values, the
device's time, races, or anything of cuDNN and CUPTI.

Start here (the folder is yours, outside the checkout; {VARIABLE} names it for good):
  python -m tests.nullgpu build --home ~/nullgpu             says how much has to be fetched
  python -m tests.nullgpu build --home ~/nullgpu --download  fetches it, compiles the stub
  python -m tests.nullgpu train mntp                         three steps of Llama-3-8B, counted by line
  python -m tests.nullgpu check                              every case of the suite against the committed budgets
From nothing to the whole suite by one command: python -m tests.nullgpu check --home ~/nullgpu --download
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        return args.run(args)
    except NullGpuError as error:
        print(f"nullgpu: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    p = argparse.ArgumentParser(
        prog="python -m tests.nullgpu", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run, text: str, **more) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=text, description=text, **more)
        found.set_defaults(run=run)
        found.add_argument("--home", metavar="FOLDER", help=f"the null GPU's folder (default: {VARIABLE})")
        return found

    one = add("build", _build, "Fetch torch's CUDA wheels, if allowed, and compile the stub.")
    one.add_argument("--download", action="store_true", help="fetch the wheels; without it their size is said")
    one = add("train", _train, f"Train {RECIPE} at full size and report the last step by phase and line.")
    one.add_argument("stage", choices=["mntp", "simcse", "supervised", "all"], help="the stage, or all in order")
    one.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="further keys of the recipe, as for l2v train")
    one.add_argument("--steps", type=int, default=STEADY, help=f"optimizer steps (default: {STEADY})")
    one.add_argument("--ranks", type=int, default=1, help="ranks, each with a null GPU (default: 1)")
    one.add_argument("--no-lines", action="store_true", help="no lines, for the host's time as it is")
    _capability(one)
    one = add("report", _report, "Print a recording again.")
    one.add_argument("file", type=Path, help="a recording, HOME/runs/CASE/recording.rank0.json")
    one.add_argument("--step", type=int, help="which step (default: the last)")
    one.add_argument("--limit", type=int, default=40, help="lines of a phase that are shown (default: 40)")
    one = add(
        "check", _check, "Run cases of the suite and compare with the committed budgets; exit code 1 if one fails."
    )
    one.add_argument("cases", nargs="*", metavar="CASE", help=f"default: all of {', '.join(SUITE)}")
    one.add_argument("--write", action="store_true", help="write what was counted as the new budgets of these cases")
    one.add_argument("--download", action="store_true", help="first fetch what the build needs, if it is missing")
    add("plan-counts", _plan_counts, f"Count what l2v plan needs, and write {TABLE.relative_to(CHECKOUT)}.")
    one = add(
        "test", _test, "Run the default tests on a machine that shows a GPU; those that compute on it are skipped."
    )
    one.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="after --: for pytest, for example -- -n 2 tests/model"
    )
    _capability(one)
    one = add("gpu-tests", _gpu_tests, "Run the flow of tests/kernels/test_*_gpu.py; values are not compared.")
    one.add_argument("files", nargs="*", type=Path, help="default: all of them")
    _capability(one)
    one = add(
        "benchmarks", _benchmarks, "Run the flow of the GPU benchmarks; errors are not compared, times mean nothing."
    )
    one.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(BENCHMARKS)}")
    _capability(one)
    one = add("run", _run, "Run any command on the null GPU, for example: run -- l2v doctor --seconds 0.")
    one.add_argument(
        "--ignore-values", action="store_true", help="comparisons of values succeed, for benchmarks/gpu.sh"
    )
    one.add_argument("command", nargs=argparse.REMAINDER, help="after --; python is that of the null GPU's environment")
    _capability(one)
    return p


def _capability(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "--capability", type=int, default=90, choices=CAPABILITIES, help="90 is compute capability 9.0 (default: 90)"
    )


def _build(args: argparse.Namespace) -> int:
    print(build(Home.find(args.home), download=args.download))
    return 0


def _train(args: argparse.Namespace) -> int:
    stage = None if args.stage == "all" else args.stage
    case = Case(
        f"train-{args.stage}", stage, tuple(args.overrides), args.ranks, args.capability, args.steps, not args.no_lines
    )
    home = Home.find(args.home).need()
    run = run_case(home, case)
    for recording in run.recordings:
        print(render(recording), end="\n\n")
    for rank, (code, output) in enumerate(zip(run.codes, run.outputs, strict=True)):
        if code:
            print(f"rank {rank} ended with exit code {code}:\n{output[-3000:]}", file=sys.stderr)
    print(f"recordings: {home.folder / 'runs' / case.name}")
    return max(map(abs, run.codes))


def _report(args: argparse.Namespace) -> int:
    try:
        recording = json.loads(args.file.read_text())
        stages_of(recording)
    except (OSError, ValueError, KeyError, TypeError):
        raise NullGpuError(f"{args.file} is no recording: give a file that train or check wrote") from None
    print(render(recording, args.step, limit=args.limit))
    return 0


def _check(args: argparse.Namespace) -> int:
    if unknown := sorted(set(args.cases) - SUITE.keys()):
        raise NullGpuError(f"no case {unknown[0]}; there are {', '.join(SUITE)}")
    home = Home.find(args.home)
    print(build(home, download=args.download), flush=True)
    budgets, wrong = read_budgets(), 0
    for name in args.cases or SUITE:
        run = run_case(home, SUITE[name])
        if args.write and not any(run.codes) and len(run.recordings) == run.case.world:
            write_budgets([run])  # after each: a run that is cut short keeps what it has
            budgets = read_budgets()
        found = findings(run, budgets.get(name))
        print(f"{name}: {'holds' if not found else ''}", *(f"\n  - {text}" for text in found), sep="", flush=True)
        wrong += bool(found)
    return int(wrong > 0)


def _plan_counts(args: argparse.Namespace) -> int:
    print(write_table(Home.find(args.home).need()))
    return 0


def _test(args: argparse.Namespace) -> int:
    home = Home.find(args.home).need()
    arguments = args.arguments[1:] if args.arguments[:1] == ["--"] else args.arguments
    command = [str(home.python), "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, env=home.environment(capability=args.capability), cwd=CHECKOUT).returncode


def _gpu_tests(args: argparse.Namespace) -> int:
    home = Home.find(args.home).need()
    files = [str(file) for file in args.files or sorted((CHECKOUT / "tests" / "kernels").glob("test_*_gpu.py"))]
    environment = home.environment(Plan(ignore_values=True), capability=args.capability)
    command = [str(home.python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    return subprocess.run(command, env=environment, cwd=CHECKOUT).returncode


def _benchmarks(args: argparse.Namespace) -> int:
    if unknown := sorted(set(args.names) - BENCHMARKS.keys()):
        raise NullGpuError(f"no benchmark {unknown[0]}; there are {', '.join(BENCHMARKS)}")
    home = Home.find(args.home).need()
    environment = home.environment(Plan(ignore_values=True), capability=args.capability)
    out = home.folder / "results" / "nullgpu"
    wrong = 0
    for name in args.names or BENCHMARKS:
        command = [str(home.python), "-c", STARTED, f"benchmarks.{name}", *BENCHMARKS[name], "--out", str(out)]
        code = subprocess.run(command, env=environment, cwd=CHECKOUT).returncode
        print(f"{name}: exit code {code}", flush=True)
        wrong += code != 0
    return int(wrong > 0)


def _run(args: argparse.Namespace) -> int:
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise NullGpuError("no command: write it after --, for example run -- l2v doctor --seconds 0")
    home = Home.find(args.home).need()
    if command[0] == "l2v":  # of this checkout, whatever the environment has installed
        command = [str(home.python), "-m", "l2v", *command[1:]]
    if command[0] in ("python", "python3"):
        command[0] = str(home.python)
    try:
        plan = Plan(ignore_values=args.ignore_values)
        return subprocess.run(command, env=home.environment(plan, capability=args.capability)).returncode
    except OSError as error:
        raise NullGpuError(f"{command[0]} cannot be started: {error.strerror}") from None
