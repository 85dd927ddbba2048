"""A short stay on a GPU: the plan (order, limits, files), and its execution with steps that crash, hang, and are resumed."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import plan as planned
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.keep import Results, logged
from benchmarks.gpu.plan import LOG, MAX_FILES, SECONDS, TESTED, Step, groups, parts, steps
from benchmarks.gpu.publish import publish
from benchmarks.gpu.run import GRACE, order, run
from l2v.commands.bench import BENCHMARKS

ROOT = Path(__file__).resolve().parents[2]
WRITES = "import json, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(json.dumps({'value': 7}));"


def step(name, code, part="one", limit=20.0, **more):
    """A process of this Python that runs `code`; its first argument is the file of its result."""
    return Step(name, part, ("-S", "-c", code, "{out}/found.json"), limit, "found.json", least=0.0, **more)


def go(plan, folder, seconds=60.0, earlier=None):
    """The exit code, and what each step gave as its file has it."""
    environment = dict(os.environ) | {"PYTHON": sys.executable}
    code = run(plan, Results(folder / "out", earlier), folder / "work", seconds, environment)
    files = [json.loads(file.read_text()) for file in sorted((folder / "out").glob("*.json"))]
    return code, {name: found for file in files for name, found in file["steps"].items()}


def test_the_order_of_the_plan():
    for plan in (steps(), steps(16, xdist=True, peers=("--llm2vec", "/some/packages")), steps(2, gpu=False)):
        assert parts(plan) == ["versions", "tests", "attention", "train_step", "info_nce", "rest"]
        assert plan[-1].name == "sanitizer", "nothing waits for it"
        assert len({x.name for x in plan}) == len(plan)
        (tests,) = [group for group in groups(plan) if len(group) > 1]
        assert [x.name for x in tests][: len(TESTED)] == [f"tests-{op}" for op in TESTED]
    assert "-n" not in steps()[1].arguments
    assert steps(16, xdist=True)[1].arguments[-3:-1] == ("-n", "3")
    assert "shallow_step" not in [x.name for x in steps(gpu=False)], "sizes of a GPU"
    (full,) = [x for x in steps(peers=("--llm2vec", "/some/packages")) if x.name == "train_step"]
    assert full.arguments[-2:] == ("--llm2vec", "/some/packages")


def test_what_matters_most_has_its_time_whatever_happens_before():
    first = [group for group in groups(steps()) if group[0].part != "rest"]
    assert sum(max(x.limit for x in group) for group in first) <= SECONDS - 2 * GRACE
    assert SECONDS < 9 * 60
    for x in steps():
        assert x.least <= x.limit
        minutes = dict(zip(x.arguments, x.arguments[1:], strict=False)).get("--minutes")
        assert minutes is None or 60 * float(minutes) < x.limit


def test_few_flat_files():
    names = [f"{part}.json" for part in parts(steps())] + [LOG]
    assert len(names) <= MAX_FILES and all("/" not in name for name in names)


def test_every_command_of_the_plan_exists():
    for x in steps(4, xdist=True):
        module = x.arguments[1]
        if module != "pytest":
            path = ROOT / Path(*module.split("."))
            assert path.with_suffix(".py").is_file(), module
            options = {a for a in x.arguments if a.startswith("--") and a != "--out"}
            text = path.with_suffix(".py").read_text() + (ROOT / "benchmarks/command.py").read_text()
            assert all(f'"{option}"' in text for option in options), (module, options)
        for file in (a for a in x.arguments if a.startswith("tests/")):
            assert (ROOT / file).is_file()
    gpu_tests = {f"test_{op}_gpu.py" for op in TESTED}
    assert {file.name for file in (ROOT / "tests" / "kernels").glob("test_*_gpu.py")} == gpu_tests
    run_here = {x.arguments[1].removeprefix("benchmarks.") for x in steps()}
    assert run_here >= set(BENCHMARKS.values()) - {"fp8.parity", "data.build", "faults.kills", "serve"}


def test_a_crash_or_a_hang_costs_only_its_own_step(tmp_path, capsys):
    hangs = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    plan = [
        step("whole", WRITES),
        step("crashes", WRITES + "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        step("hangs", WRITES + "print('begun', flush=True);" + hangs, limit=0.6),
        step("absent", "raise SystemExit('no such device')", part="two"),
        step("last", WRITES, part="two"),
    ]
    began = time.monotonic()
    code, found = go(plan, tmp_path)
    assert code == 1 and time.monotonic() - began < 20
    assert {name: x["state"] for name, x in found.items()} == {
        "whole": "done", "crashes": "failed", "hangs": "stopped", "absent": "failed", "last": "done",
    }  # fmt: skip
    assert found["crashes"]["exit_code"] == -signal.SIGSEGV and found["absent"]["exit_code"] == 1
    assert [name for name, x in found.items() if x.get("result") == {"value": 7}] == [
        "whole",
        "crashes",
        "hangs",
        "last",
    ]
    assert sorted(x.name for x in (tmp_path / "out").iterdir()) == [LOG, "one.json", "two.json"]
    log = (tmp_path / "out" / LOG).read_text()
    assert "begun" in log and "no such device" in log and log.index("== crashes: failed") < log.index("== last: done")
    shown = capsys.readouterr().out
    assert "== hangs: stopped at its limit of 1 s" in shown and "== crashes: failed, exit code -11" in shown


def test_what_a_step_starts_ends_with_it(tmp_path):
    child = "import time; time.sleep(60)"
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-S', '-c', {child!r}]);"
    code += "open(sys.argv[1], 'w').write(str(p.pid));"
    for name, end, limit in (("leaves", "", 20), ("hangs", "import time; time.sleep(60)", 0.6)):
        _, found = go([step(name, code + end, limit=limit)], tmp_path)
        pid = found[name]["result"]
        for _ in range(100):
            stat = Path(f"/proc/{pid}/stat")
            if not stat.exists() or stat.read_text().rsplit(") ", 1)[1].startswith("Z"):
                break
            time.sleep(0.05)
        else:
            pytest.fail("the child outlived its step")


def test_a_result_is_kept_while_the_step_runs(tmp_path):
    """A machine that is taken back ends everything at once: what was measured by then is on the disk."""
    once = tmp_path / "out" / "one.json"
    waits = f"""
import json, pathlib, sys, time
pathlib.Path(sys.argv[1]).write_text(json.dumps({{"value": 1}}))
for _ in range(200):
    time.sleep(0.05)
    if '"value": 1' in pathlib.Path({str(once)!r}).read_text():
        break
else:
    sys.exit("nothing is kept before the end")
"""
    code, _ = go([step("slow", waits)], tmp_path)
    assert code == 0


def test_the_next_call_continues(tmp_path):
    """What was stopped or never ran comes first, then what failed; what is done is not repeated."""
    mark = tmp_path / "ran"
    noted = WRITES + f"open({str(mark)!r}, 'a').write(sys.argv[2] + ' ');"
    first = f"open({str(mark)!r}).read().split().count(sys.argv[2]) < 2"

    def named(name, code, **more):
        made = step(name, code, **more)
        return Step(**vars(made) | {"arguments": (*made.arguments, name)})

    plan = [
        named("good", noted),
        named("fails-once", noted + f"sys.exit({first})"),
        named("too-slow", noted + f"import time; time.sleep(60 * ({first}))", limit=0.6),
        named("no-time", noted),
    ]
    plan[3] = Step(**vars(plan[3]) | {"least": 1000.0})
    code, found = go(plan, tmp_path)
    assert code == 1 and found["no-time"]["state"] == "not run"
    assert [[x.name for x in group] for group in order(plan, Results(tmp_path / "out"))] == [
        ["too-slow"], ["no-time"], ["fails-once"],
    ]  # fmt: skip
    plan[2], plan[3] = Step(**vars(plan[2]) | {"limit": 20}), Step(**vars(plan[3]) | {"least": 0.0})
    # On another machine: the files of the first call are in a folder of their own.
    (tmp_path / "out").rename(tmp_path / "first")
    code, found = go(plan, tmp_path, earlier=tmp_path / "first")
    assert code == 0 and all(x["state"] == "done" for x in found.values())
    assert mark.read_text().split() == ["good", "fails-once", "too-slow", "too-slow", "no-time", "fails-once"]
    assert go(plan, tmp_path)[0] == 0
    assert len(mark.read_text().split()) == 6, "all was done"


def test_a_step_finds_the_result_that_it_continues(tmp_path):
    adds = (
        "import json, pathlib, sys; p = pathlib.Path(sys.argv[1]);"
        "before = json.loads(p.read_text())['runs'] if p.exists() else []; p.write_text(json.dumps({'runs': [*before, 1]}))"
    )
    plan = [step("first", adds), step("alone", adds), step("second", adds, continues=("second", "first"))]
    _, found = go(plan, tmp_path)
    assert {name: len(x["result"]["runs"]) for name, x in found.items()} == {"first": 1, "alone": 1, "second": 2}


def test_numbers_of_ops_whose_tests_fail_come_last_and_say_so(tmp_path):
    mark = tmp_path / "ran"

    def tests(op, failed, end=""):
        code = f"import json, sys; open(sys.argv[1], 'w').write(json.dumps({{'failed': {failed}}})); {end}"
        return step(f"tests-{op}", code, beside="tests")

    noted = WRITES + f"open({str(mark)!r}, 'a').write('%s ');"
    plan = [
        tests("a", 1, "sys.exit(1)"),
        tests("b", 0),
        tests("c", 0, "import time; time.sleep(60)"),
        *(step(name, noted % name, ops=tuple(name)) for name in ("ab", "b", "c")),
    ]
    plan[2] = Step(**vars(plan[2]) | {"limit": 0.6})
    _, found = go(plan, tmp_path)
    assert mark.read_text().split() == ["b", "c", "ab"]
    assert {n: found[n].get("warning") for n in ("ab", "b", "c")} == {"ab": "tests fail: a", "b": None, "c": None}


def test_steps_of_a_group_run_side_by_side(tmp_path):
    meets = """
import pathlib, sys, time
here = pathlib.Path(sys.argv[1]).parents[1]
pathlib.Path(sys.argv[1]).write_text("1")
for _ in range(200):
    if len(list(here.glob("*/found.json"))) == 2:
        break
    time.sleep(0.05)
else:
    sys.exit("alone")
"""
    assert go([step("left", meets, beside="x"), step("right", meets, beside="x")], tmp_path)[0] == 0


def test_an_interrupt_ends_the_step_and_keeps_what_it_has(tmp_path):
    """SIGTERM, as `timeout` sends it, to the script itself; with a plan of its own."""
    program = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}]
from benchmarks.gpu import __main__ as command
from benchmarks.gpu.plan import Step
code = {WRITES + "print('begun', flush=True); import time; time.sleep(60)"!r}
command.steps = lambda *_, **__: [Step("slow", "one", ("-S", "-c", code, "{{out}}/found.json"), 50, "found.json")]
command._probe = lambda environment: {{"gpu": True, "xdist": False}}
sys.exit(command.main([{str(tmp_path / "out")!r}, "--work", {str(tmp_path / "work")!r}]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    file = tmp_path / "out" / "one.json"
    for _ in range(400):
        if file.is_file() and '"value"' in file.read_text():
            break
        time.sleep(0.05)
    process.terminate()
    said = process.communicate(timeout=30)[0]
    assert process.returncode == 130 and "stopped; the same command continues" in said, said
    found = json.loads(file.read_text())["steps"]["slow"]
    assert found["state"] == "stopped" and found["result"] == {"value": 7}
    assert "begun" in (tmp_path / "out" / LOG).read_text()


def test_a_long_output_loses_its_middle(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.keep.LOG_BYTES", 5)
    (tmp_path / "o").write_text("0123456789abcde")
    assert logged(tmp_path / "o") == "01234\n[5 bytes are not logged]\nabcde"
    (tmp_path / "o").write_text("0123456789")
    assert logged(tmp_path / "o") == "0123456789" and logged(tmp_path / "absent") == ""


def test_results_are_published_unless_they_are_a_rehearsal_or_red(tmp_path):
    results = Results(tmp_path / "out")
    gpu, cpu = {"facts": {"smoke": False, "cuda": "13.0"}}, {"facts": {"smoke": True}}
    plan = {x.name: x for x in steps()}
    results.keep(plan["attention"], state="done", result=gpu, page="A page.")
    results.keep(plan["mntp"], state="done", result=gpu)
    results.keep(plan["mntp_plain"], state="stopped", result=gpu)
    results.keep(plan["contrastive"], state="done", result=gpu, warning="tests fail: info_nce")
    results.keep(plan["fp8"], state="done", result=cpu)
    results.keep(plan["encode"], state="not run", reason="no time was left")
    missing = publish(results, tmp_path / "target")
    assert sorted(x.name for x in (tmp_path / "target").iterdir()) == [
        "attention.json",
        "attention.md",
        "mntp_plain.json",
    ]
    assert json.loads((tmp_path / "target/attention.json").read_text()) == gpu
    said = dict(line.split(": not published: ") for line in missing)
    assert said["contrastive"] == "tests fail: info_nce" and said["fp8"] == "a rehearsal without a GPU"
    assert said["encode"] == "no time was left" and "mntp" not in said and said["step_ops"] == "not run"


def test_an_unknown_part_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.__main__._probe", lambda environment: {"gpu": False, "xdist": False})
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main([str(tmp_path), "atention"]) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "no part atention; choose of versions, tests, attention" in capsys.readouterr().err


def test_nothing_of_the_plan_needs_torch():
    """It is made, and its first results are kept, also where torch cannot be loaded."""
    for name in ("plan", "keep", "run", "__main__", "record_tests"):
        tree = ast.parse((Path(planned.__file__).parent / f"{name}.py").read_text())
        names = {a.name for node in tree.body if isinstance(node, ast.Import) for a in node.names}
        names |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert all(x.split(".")[0] in sys.stdlib_module_names or x in ("l2v.files", *_own()) for x in names), names


def _own():
    return [f"benchmarks.gpu.{name}" for name in ("plan", "keep", "run")]


def test_tests_are_recorded_one_by_one(tmp_path):
    """Outcomes, the end of a failure, and that a run was cut short."""
    (tmp_path / "test_it.py").write_text(
        "import os, pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'one is not two'\n"
        "@pytest.mark.skip(reason='needs a GPU')\ndef test_skipped(): pass\n"
        "def test_ends_the_process():\n    if os.environ.get('END'): os._exit(7)\n"
    )
    record = tmp_path / "record.json"
    environment = dict(os.environ) | {"L2V_TESTS_JSON": str(record), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.record_tests"]
    command += ["-p", "no:xdist", "-p", "no:hypothesispytest", "-p", "no:anyio", "test_it.py"]
    for end, code, finished, passed in (("", 1, True, 2), ("1", 7, False, 1)):
        done = subprocess.run(command, cwd=tmp_path, env=environment | {"END": end}, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        found = json.loads(record.read_text())
        assert (found["finished"], found["passed"], found["failed"], found["skipped"]) == (finished, passed, 1, 1)
        assert found["skipped_because"] == {"needs a GPU": 1}
        (failure,) = found["failures"].items()
        assert failure[0].endswith("::test_bad") and "one is not two" in failure[1]
