"""What a device reaches, where it is kept, and which tests may see a GPU."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from support.processes import hide_gpus, training_environment

from benchmarks import harness, pages
from benchmarks.command import Benchmark
from l2v import machine
from l2v.commands import main
from l2v.commands.main import may_have_gpu
from l2v.doctor import hardware
from l2v.doctor.report import Report
from l2v.errors import UserError
from l2v.machine import Calibration, calibration, calibration_file, peak_flops
from l2v.machine.gpus import inspect, problems
from l2v.tuning.apply import place

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("L2V_CACHE", str(tmp_path / "cache"))


def test_a_calibration_is_measured_and_kept():
    assert calibration(CPU, torch.float32) is None
    found = calibration(CPU, torch.float32, measure=True, seconds=0.3)
    assert calibration(CPU, torch.float32) == found
    assert found.gemm_flops > 1e9 and found.copy_bytes > 1e8
    assert (found.torch, found.dtype) == (torch.__version__, "float32")
    assert calibration(CPU, torch.float64) is None, "another precision has another rate"


@pytest.mark.parametrize(("seconds", "size"), [(0.05, 256), (0.5, 512), (300, 2048)])
def test_the_rate_is_that_of_the_matmul(monkeypatch, seconds, size):
    """On a clock that only matmuls move, at 10 GFLOP/s: exactly that rate, of the size that the seconds allow."""
    now, sizes = 0.0, []

    def mm(a, b, *, out):
        nonlocal now
        assert a.shape == b.shape == out.shape and a.dtype == torch.float32 and a[0].std() > 0.8
        sizes.append(len(a))
        now += 2 * len(a) ** 3 / 1e10

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=lambda: now))
    assert machine.gemm_flops(CPU, torch.float32, seconds) == pytest.approx(1e10)
    one = 2 * size**3 / 1e10
    assert max(sizes) == size and sizes.count(size) > machine.ROUNDS, "the last size is measured in rounds"
    assert 0.5 * seconds < one * sizes.count(size) < 1.5 * seconds + 6 * one, "in about the seconds that were given"


def test_a_calibration_belongs_to_a_device_a_torch_and_its_threads(monkeypatch):
    found = calibration(CPU, torch.float32, measure=True, seconds=0.05)
    threads = torch.get_num_threads()
    assert found.device == f"{machine.processor()}, {threads} thread{'s' * (threads > 1)}"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 97)
    assert calibration(CPU, torch.float32) is None
    monkeypatch.undo()


def test_a_damaged_or_older_file_counts_as_none():
    file = calibration_file(CPU, torch.float32)
    file.parent.mkdir(parents=True)
    for content in ("{", "[]", json.dumps({"gemm": 1})):
        file.write_text(content)
        assert calibration(CPU, torch.float32) is None


def test_a_cache_that_cannot_be_written_keeps_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("L2V_CACHE", str(tmp_path / "file"))
    assert isinstance(calibration(CPU, torch.float32, measure=True, seconds=0.02), Calibration)
    assert calibration(CPU, torch.float32) is None


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA H20", 148),
        ("NVIDIA H20-3e", None),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("AMD EPYC, 2 threads", None),
    ],
)
def test_peaks_are_of_whole_names(name, tera):
    assert peak_flops(name, torch.bfloat16) == (tera and tera * 1e12)
    assert peak_flops(name, torch.float32) is None


@pytest.mark.parametrize(
    ("files", "visible", "may"),
    [
        ((), None, False),
        (("null", "dri"), None, False),
        (("nvidia0", "nvidiactl"), None, True),
        (("nvidiactl",), "1", True),
        (("dxg",), None, True),
        (("kfd", "dri"), None, True),
        (("nvmap",), None, True),
        (("nvidia0",), "", False),
        (("dxg",), "-1", False),
    ],
)
def test_deepspeed_is_given_the_cpu_only_where_no_gpu_can_be(tmp_path, monkeypatch, files, visible, may):
    for name in files:
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert may_have_gpu(tmp_path) == may
    for expected in (may_have_gpu, lambda: may):  # of this machine, and of that one
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)
        monkeypatch.setattr(main, "may_have_gpu", expected)
        main.quiet_libraries()
        assert os.environ.get("DS_ACCELERATOR") == (None if expected() else "cpu")


@pytest.mark.parametrize(
    ("arguments", "hidden"),
    [
        ([], True),
        (["tests"], True),
        (["tests/kernels/test_fp8_gpu.py"], False),
        (["tests/kernels/test_fp8_gpu.py::test_a", "/x/tests/kernels/test_rope_gpu.py"], False),
        (["tests/kernels/test_fp8_gpu.py", "tests/kernels/test_fp8.py"], True),
        (["tests/launch/test_scaling.py::test_one_gpu"], True),
    ],
)
def test_only_the_tests_of_compiled_kernels_see_a_gpu(monkeypatch, arguments, hidden):
    """With a stand-in for torch's question, which a process asks once, and which its children ask again."""
    assert not torch.cuda.is_available(), "this process, and what it starts, is one of the CPU"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: os.environ["CUDA_VISIBLE_DEVICES"] != "")
    hide_gpus(arguments)
    assert torch.cuda.is_available() != hidden
    assert training_environment()["CUDA_VISIBLE_DEVICES"] == "", "training in tests is on the CPU"


@pytest.fixture
def null_gpu(monkeypatch):
    """A machine that shows the GPU of tests/nullgpu, which computes nothing, with caches of its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "null GPU sm_90")
    monkeypatch.setenv("TRITON_CACHE_DIR", "triton")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")  # nobody hid it


def test_the_null_gpu_has_no_speed(null_gpu, tmp_path):
    assert calibration(torch.device("cuda"), torch.bfloat16, measure=True, seconds=0.01) is None
    assert not (tmp_path / "cache").exists()


def test_the_null_gpu_needs_caches_of_its_own(null_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert not problems(inspect())
    monkeypatch.delenv("TRITON_CACHE_DIR")
    assert problems(inspect()) == [
        "the null GPU needs caches of its own, L2V_CACHE and TRITON_CACHE_DIR: start with python -m tests.nullgpu run"
    ]


def test_results_of_the_null_gpu_stay_apart(null_gpu, monkeypatch, tmp_path):
    machine.check_results_folder(tmp_path / "nullgpu")
    machine.check_results_folder(tmp_path / "nullgpu" / "sm_90")
    with pytest.raises(UserError, match=r"this is the null GPU, .* give a folder named nullgpu"):
        machine.check_results_folder(tmp_path / "results")
    monkeypatch.undo()
    machine.check_results_folder(tmp_path / "results")


def test_what_is_written_on_the_null_gpu_says_so(null_gpu, monkeypatch, tiny_recipe, tmp_path, capsys):
    assert place(1)["device"] == "null"
    recipe = tiny_recipe(tmp_path)
    assert main.main(["tune", str(recipe)]) == 1
    assert "this is the null GPU" in capsys.readouterr().err and not recipe.with_suffix(".tuned.json").exists()
    properties = {"name": "null GPU sm_90", "major": 9, "minor": 0, "multi_processor_count": 132, "total_memory": 1}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**properties, L2_cache_size=1))
    facts = harness.device_facts(torch.device("cuda"))
    assert facts["device"] == "null" and not facts["smoke"]
    assert pages.headline(facts).startswith("NULL GPU: kernels were counted and not run")


def test_a_benchmark_on_the_null_gpu_refuses_other_folders(null_gpu, tmp_path, capsys):
    ran = []
    benchmark = Benchmark(
        name="x", doc="X.", quick="less", any_device=False, run=lambda options: ran.append(options) or 0
    )
    assert benchmark.main(["--out", str(tmp_path / "results")]) == 1
    assert "x: this is the null GPU" in capsys.readouterr().err
    assert benchmark.main(["--out", str(tmp_path / "nullgpu")]) == 0 and len(ran) == 1


def test_doctor_says_that_it_is_the_null_gpu(null_gpu, monkeypatch):
    report = Report()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28))
    assert hardware.devices(report)["device"] == "null" and not report.problems
    assert report.notes == [
        "this is the null GPU of tests/nullgpu: kernels are counted, not run, and no number is measured"
    ]
    assert hardware.calibration(report, 1.0) == {"": "none: this is the null GPU, which has no speed"}
