"""What all benchmarks share: the command line, and a comparison's printing, writing and exit code."""

import json

import pytest
import torch

from benchmarks.command import Benchmark, Comparison
from benchmarks.harness import Result, Target, Unavailable, attempt
from l2v.commands.bench import BENCHMARKS, main


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_command_finds_every_benchmark(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and f"l2v bench {name}" in shown and "--quick" in shown and "--out" in shown


def test_options_reach_the_run_function():
    seen = []
    options = {"overrides": {"nargs": "*"}, "--rounds": {"type": int, "default": 3}}
    benchmark = Benchmark(
        name="x", doc="First.\n\nMore.", quick="less", options=options, run=lambda o: seen.append(o) or 0
    )
    assert benchmark.main(["a=1", "--rounds", "2", "--device", "cpu", "b=2"]) == 0
    (given,) = seen
    assert (given.overrides, given.rounds, given.quick, given.out) == (["a=1", "b=2"], 2, False, None)
    assert given.device == torch.device("cpu")


def test_what_cannot_run_here_says_why(capsys):
    def run(options):
        raise Unavailable("needs a package")

    assert Benchmark(name="x", doc="", quick="", any_device=False, run=run).main([]) == 1
    assert capsys.readouterr().err == "x: needs a package\n"


def comparison(results, **more):
    """Results one after another, a part each."""

    def parts(setup):
        assert setup.smoke and setup.seconds(quick=1, full=2) == 0.02
        for x in results:
            yield lambda x=x: [x]

    return Comparison(name="x", doc="", quick="", parts=parts, **more)


def result(name, provider, **more):
    return Result(name, provider, "step", flops=1.0, **more)


def test_a_comparison_keeps_what_it_measured(tmp_path, capsys):
    def fails():
        yield result("one", "l2v", median=1.0, low=1.0, high=1.0, tflops=2.0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        comparison(fails()).main(["--device", "cpu", "--out", str(tmp_path)])
    data = json.loads((tmp_path / "x.json").read_text())
    assert list(data) == ["facts", "ceilings", "results"] and [x["workload"] for x in data["results"]] == ["one"]
    assert data["ceilings"]["flops"] > 0 and data["ceilings"]["bandwidth"] > 0
    page = (tmp_path / "x.md").read_text()
    assert page.startswith("SMOKE TEST on a CPU") and "| one | step | l2v |" in page
    assert (tmp_path / "x.png").stat().st_size > 1000 and "| one | step | l2v |" in capsys.readouterr().out


def test_the_exit_code_is_that_of_our_own_providers(capsys):
    timed = result("one", "l2v", median=1.0, low=1.0, high=1.0)
    absent, wrong = result("one", "l2v_fused"), result("one", "l2v_other")
    with attempt(absent):
        raise Unavailable("CUDA only")
    with attempt(wrong):
        raise ValueError("wrong result")
    assert absent.skipped == "Unavailable: CUDA only" and wrong.skipped == "ValueError: wrong result"
    arguments = ["--device", "cpu"]
    assert comparison([timed, absent, result("one", "peer", skipped="out of memory")]).main(arguments) == 0
    assert comparison([timed, wrong]).main(arguments) == 1
    assert comparison([timed, wrong], ours=("other",)).main(arguments) == 0


def test_targets_are_written_and_printed(tmp_path, capsys):
    def targets(results, smoke):
        assert smoke
        return [Target("fast", 1.0)]

    assert comparison([result("one", "peer")], targets=targets).main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "x.json").read_text())
    assert [x["verdict"] for x in data["targets"]] == ["not measured"]
    assert "| fast | <= 1 x |  | not measured |" in (tmp_path / "x.md").read_text()
    assert "| fast | <= 1 x |  | not measured |" in capsys.readouterr().out
