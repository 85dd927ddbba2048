"""Threads are chosen before torch is loaded, by every way in, and never against the user."""

import os
import subprocess
import sys
import textwrap

import pytest
from support.processes import ROOT

from l2v import cores
from l2v.training import launcher

NAMES = {*cores.OF_WAITING, *cores.OF_COUNT}
SEEN = """
import os, sys
class Seen:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":  # what it would read at its import
            print("SEEN", os.environ.get("OMP_WAIT_POLICY"), os.environ.get("OMP_NUM_THREADS"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Seen())
"""
CLEAN = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}


def seen(start: str, arguments: list[str], **given: str) -> list[str]:
    """Wait policy and threads that torch finds when a process of these arguments loads it."""
    environment = {
        k: v for k, v in os.environ.items() if k not in NAMES and not k.startswith(("RANK", "WORLD", "LOCAL"))
    }
    code = f"{SEEN}\nsys.argv[1:] = {arguments!r}\n{start}"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | CLEAN | given, capture_output=True, text=True, timeout=120
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("SEEN")]
    assert lines, done.stdout + done.stderr
    return lines[0].split()[1:]


ENTRIES = {
    "l2v": "from l2v.commands.main import main; main()",
    "python -m l2v": "import runpy; runpy.run_module('l2v', run_name='__main__')",
    "python -m l2v.cli": "import runpy; runpy.run_module('l2v.cli', run_name='__main__')",
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_commands_choose_before_torch_is_loaded(entry):
    count = str(cores.threads_of())
    wait, threads = seen(ENTRIES[entry], ["doctor", "--seconds", "0"])
    assert wait == "PASSIVE" and 1 <= int(threads) <= int(count)


@pytest.mark.parametrize("script", ["launch/train.py", "l2v/train.py"])
def test_a_rank_of_another_launcher_chooses_too(script):
    start = f"import runpy; sys.argv[0] = {script!r}; runpy.run_path({str(ROOT / script)!r}, run_name='__main__')"
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert seen(start, ["smollm2-135m-da"], **ranks) == ["PASSIVE", str(max(1, cores.threads_of() // 2))]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "3"}, ["ACTIVE", "3"]),
        ({"GOMP_SPINCOUNT": "100", "OMP_NUM_THREADS": "5"}, ["None", "5"]),
        ({"KMP_BLOCKTIME": "0", "MKL_NUM_THREADS": "2"}, ["None", "None"]),
    ],
)
def test_what_the_user_set_is_kept(given, found):
    assert seen(ENTRIES["l2v"], ["doctor", "--seconds", "0"], **given) == found


def test_a_launch_divides_the_cores_among_its_processes(monkeypatch):
    started = []
    monkeypatch.setattr(launcher, "_run_once", lambda command, environment: started.append(environment) or (0, False))
    monkeypatch.setattr(cores, "allowed", lambda: set(range(13)))
    monkeypatch.setattr(cores, "quota", lambda: 11)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    assert launcher.launch("module", [], 3) == 0
    assert started[0]["OMP_NUM_THREADS"] == "3" and started[0]["OMP_WAIT_POLICY"] == "PASSIVE"
    assert not NAMES & os.environ.keys(), "the launching process keeps its own"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    launcher.launch("module", [], 3)
    assert (started[1]["OMP_NUM_THREADS"], started[1]["OMP_WAIT_POLICY"]) == ("7", "ACTIVE")
    monkeypatch.setattr(cores, "_set_here", {"OMP_NUM_THREADS"})  # the number is the launching process's own choice
    launcher.launch("module", [], 2)
    assert started[2]["OMP_NUM_THREADS"] == "5" and os.environ["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    ("count", "busy", "threads"),
    [(2, 1.0, 2), (2, 2.0, 2), (3, 1.1, 2), (8, 2.0, 6), (8, 4.0, 8), (8, 7.7, 8), (1, 1, 1)],
)
def test_busy_cores_are_left_to_others_where_most_are_idle(monkeypatch, count, busy, threads):
    monkeypatch.setattr(cores, "allowed", lambda: set(range(count)))
    monkeypatch.setattr(cores, "quota", lambda: None)
    assert cores.threads_of(steady=False, busy=lambda which: busy) == threads
    assert cores.threads_of(busy=lambda which: busy) == count, "in training the number does not depend on the moment"


def test_busy_cores_are_counted_from_two_looks(tmp_path, monkeypatch):
    """Of cores 0 and 2, between the looks: 25% busy, and all of it; core 1 may not be used."""
    stat = tmp_path / "stat"
    line = "cpu{} {} 0 {} {} 5 0 0 0 9 9\n"
    stat.write_text("cpu  1 1 1\n" + "".join(line.format(core, 10, 10, 100) for core in range(3)) + "intr 5\n")
    after = [line.format(0, 15, 10, 115), line.format(1, 99, 10, 100), line.format(2, 20, 20, 100)]
    monkeypatch.setattr(cores.time, "sleep", lambda seconds: stat.write_text("cpu  2 2 2\n" + "".join(after)))
    assert cores.busy_cores({0, 2}, stat) == pytest.approx(1.25)
    assert cores.busy_cores({0, 2}, tmp_path / "none") == 0


@pytest.mark.parametrize(
    ("text", "found"), [("max 100000", None), ("150000 100000", 2), ("50000 100000", 1), ("", None), ("1 0", None)]
)
def test_a_container_limits_the_cores(tmp_path, text, found):
    file = tmp_path / "cpu.max"
    file.write_text(text)
    assert cores.quota(file) == found and cores.quota(tmp_path / "none") is None


def test_the_line_says_who_chose(monkeypatch):
    monkeypatch.setattr(cores, "busy_cores", lambda which: 1.0)
    monkeypatch.setattr(cores, "allowed", lambda: {0, 1})
    monkeypatch.setattr(cores, "quota", lambda: None)
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    assert cores.describe(2) == "2 on 2 cores, 1.0 in use now; threads that wait spin (OMP_WAIT_POLICY is not set)"
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert cores.describe(2).endswith("; threads that wait sleep (OMP_WAIT_POLICY=passive, set by you)")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert cores.describe(2).endswith("; waiting: OMP_WAIT_POLICY=ACTIVE, set by you")


STEPS = textwrap.dedent(
    """
    import os, resource, sys, time
    from l2v.cores import choose
    os.sched_setaffinity(0, {int(c) for c in sys.argv[1].split(",")})
    choose()
    import torch
    assert torch.get_num_threads() == 2
    x, w = torch.randn(256, 576), torch.randn(1536, 576)
    def step():
        for _ in range(20):  # as many regions as some layers have, of about a millisecond
            torch.nn.functional.silu(x @ w.t()).mul_(2.0)
    step()
    print("ready", flush=True)
    for line in sys.stdin:  # a number of steps
        used, slept = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
        for _ in range(int(line)):
            step()
        print(time.process_time() - used, resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - slept, flush=True)
    """
)


@pytest.mark.slow
@pytest.mark.skipif(len(cores.allowed()) < 2, reason="needs two cores")
def test_a_step_beside_a_busy_core_takes_no_more_work_than_a_quiet_one():
    """With a process that spins on one of the two cores, a step costs the processor time that it costs alone.

    What a step does not spend it cannot wait for: the thread on the shared core gets half of it or more, so with no time
    lost to spinning a step takes at most twice as long. Threads that spin (ACTIVE) show what is counted: their steps cost
    all the time in which they wait.
    """

    def costs(**given: str) -> tuple[float, float, int]:
        """Processor seconds of the steps, quiet and beside a busy core, and how often a thread slept there."""
        two = sorted(cores.allowed())[:2]
        environment = {k: v for k, v in os.environ.items() if k not in NAMES} | CLEAN | given
        steps = subprocess.Popen(
            [sys.executable, "-c", STEPS, ",".join(map(str, two))], env=environment, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        spinner = None
        try:
            assert steps.stdout.readline() == "ready\n"

            def ask() -> tuple[float, int]:
                steps.stdin.write("3\n")
                steps.stdin.flush()
                used, slept = steps.stdout.readline().split()
                return float(used), int(slept)

            quiet, busy, slept = [], [], 0
            for _ in range(3):  # in turns: other work of the machine meets both
                quiet.append(ask()[0])
                code = f"import os\nos.sched_setaffinity(0, {{{two[1]}}})\nprint(flush=True)\nwhile True: pass"
                spinner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
                spinner.stdout.readline()
                used, often = ask()
                busy.append(used)
                slept += often
                spinner.kill()
                spinner.wait()
            return min(quiet), min(busy), slept
        finally:
            for process in (steps, spinner):
                if process is not None:
                    process.kill()
                    process.wait()

    quiet, busy, slept = costs()
    assert busy < 1.4 * quiet and slept > 3 * 3 * 20, "a thread that waits gives its core away"
    _, spun, _ = costs(OMP_WAIT_POLICY="ACTIVE")
    assert spun > 1.2 * busy, "the count sees threads that spin"
