"""GPUs that cannot be used, or not as the user thinks: one sentence, the same from doctor, plan and train."""

from dataclasses import replace

import pytest

from l2v.commands import plan
from l2v.doctor import hardware
from l2v.doctor.report import Report
from l2v.errors import UserError
from l2v.machine import gpus
from l2v.machine.gpus import (
    GIB,
    Facts,
    Gpu,
    check,
    has_code_for,
    has_nvidia_gpu,
    in_wsl,
    inspect,
    notes,
    problems,
    too_little_memory,
)

H200 = Gpu("NVIDIA H200", (9, 0), 140 * GIB, 139 * GIB)
A100 = Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 80 * GIB, 79 * GIB)
L4 = Gpu("NVIDIA L4", (8, 9), 24 * GIB, 23 * GIB)
T4 = Gpu("Tesla T4", (7, 5), 15 * GIB, 14 * GIB)
P4 = Gpu("Tesla P4", (6, 1), 8 * GIB, 7 * GIB)
SLICE = Gpu("NVIDIA H200 MIG 3g.71gb", (9, 0), 70 * GIB, 69 * GIB)
BUILD = Facts(torch="2.11.0", cuda="13.0", architectures=("sm_75", "sm_80", "sm_90", "compute_90"), device=True)
BROKEN = replace(BUILD, error="No CUDA GPUs are available\nmore")
TOO_OLD = replace(
    BUILD,
    error="The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by downloading "
    "and installing a new version.\nAlternatively, install a PyTorch version that has been compiled with your driver.",
)
CPU = "or train on the CPU with CUDA_VISIBLE_DEVICES= (empty)"

PROBLEMS = {
    "below sm_80": (
        replace(BUILD, gpus=(H200, T4)),
        "cuda:1 (Tesla T4, compute capability 7.5) is too old: bf16 and the kernels need 8.0 or newer; name another with "
        f"CUDA_VISIBLE_DEVICES, {CPU}",
    ),
    "no code": (
        replace(BUILD, gpus=(P4,)),
        "torch 2.11.0 has no code for cuda:0 (Tesla P4, compute capability 6.1): install a build of torch that has, " + CPU,
    ),
    "an old driver": (
        TOO_OLD,
        "the NVIDIA driver supports CUDA 12.2 at most and torch 2.11.0 is built for CUDA 13.0: update the driver, install a "
        f"torch that is built for CUDA 12, {CPU}",
    ),
    "an old driver, whatever is visible": (replace(TOO_OLD, visible="0,1", wsl=True), "the NVIDIA driver supports CUDA 12.2"),
    "a wrong number": (
        replace(BROKEN, visible="7", listed=4),
        f"CUDA_VISIBLE_DEVICES=7 names no GPU of this machine, which has 4 (0 to 3): correct it, unset it for all GPUs, {CPU}",
    ),
    "a wrong number, no nvidia-smi": (
        replace(BROKEN, visible="first"),
        f"CUDA_VISIBLE_DEVICES=first names no GPU of this machine: correct it, unset it for all GPUs, {CPU}",
    ),
    "one of two wrong": (
        replace(BUILD, gpus=(H200,), visible="0,9", listed=8),
        "CUDA_VISIBLE_DEVICES=0,9 names 2 GPUs and CUDA shows 1 of this machine's 8, because it stops at the first that it "
        "does not know: correct it, or unset it for all GPUs",
    ),
    "several slices": (
        replace(BUILD, gpus=(SLICE,), visible="MIG-1f,MIG-2a,MIG-3c"),
        "CUDA shows a process one MIG slice and CUDA_VISIBLE_DEVICES names 3: name one, and train on it alone, or have MIG "
        "switched off (nvidia-smi shows it)",
    ),
    "WSL 2": (
        replace(BROKEN, wsl=True),
        "torch 2.11.0 cannot use the GPU under WSL 2: No CUDA GPUs are available; update NVIDIA's driver on Windows, install "
        f"none inside Linux, and run wsl --update, {CPU}",
    ),
    "anything else": (
        BROKEN,
        "torch 2.11.0 cannot use the GPU of this machine: No CUDA GPUs are available; check nvidia-smi and "
        f"CUDA_VISIBLE_DEVICES, {CPU}",
    ),
    "a contradiction": (
        replace(BUILD, gpus=(H200,), accelerator="cpu"),
        f"DS_ACCELERATOR=cpu contradicts the GPU that torch finds: set DS_ACCELERATOR=cuda, {CPU}",
    ),
}  # fmt: skip

NOTES = {
    "hidden": (
        replace(BUILD, visible=""),
        "CUDA_VISIBLE_DEVICES= hides the GPU: training runs on the CPU; unset it to train on the GPU",
    ),
    "hidden by -1": (replace(BUILD, visible="-1"), "CUDA_VISIBLE_DEVICES=-1 hides the GPU"),
    "no CUDA in torch": (
        replace(BUILD, cuda=None),
        "there is a GPU, but torch 2.11.0 is built without CUDA: training would run on the CPU; install a torch that is "
        "built for CUDA",
    ),
    "mixed": (
        replace(BUILD, gpus=(A100, A100, L4)),
        "the GPUs differ (2 x NVIDIA A100-SXM4-80GB with 80 GiB, 1 x NVIDIA L4 with 24 GiB): every step waits for the slowest, "
        "and micro-batches have to fit the smallest; name equal ones with CUDA_VISIBLE_DEVICES",
    ),
    "a slice": (
        replace(BUILD, gpus=(SLICE,), visible="MIG-1f"),
        "cuda:0 is a slice of a GPU (NVIDIA H200 MIG 3g.71gb): a process sees one slice and NCCL connects none, so training "
        "runs in one process with the slice's memory",
    ),
    "in use": (
        replace(BUILD, gpus=(H200, replace(H200, free=100 * GIB))),
        "40.0 of 140.0 GiB of cuda:1 are already in use",
    ),
    "small": (
        replace(BUILD, gpus=(replace(L4, memory=16 * GIB, free=None),)),
        "16.0 GiB are too little for Llama-3-8B in bf16, whose weights alone take 15.0: take a smaller base, "
        "base.base_precision=nf4 (a quarter), or zero.stage=3 on several GPUs; l2v plan RECIPE says what fits",
    ),
    "WSL 2": (
        replace(BUILD, gpus=(H200,), wsl=True),
        "WSL 2 gives Linux only the memory that .wslconfig names, and little of it pinned: raise `memory` there if loading a "
        "base or zero.offload_optimizer fails",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("facts", "says"), PROBLEMS.values(), ids=PROBLEMS)
def test_what_keeps_training_from_running(facts, says):
    (found,) = problems(facts)
    assert found.startswith(says) and "\n" not in found


@pytest.mark.parametrize(("facts", "says"), NOTES.values(), ids=NOTES)
def test_what_may_surprise(facts, says):
    (found,) = notes(facts)
    assert found.startswith(says) and not problems(facts)


@pytest.mark.parametrize(
    "facts",
    [
        replace(BUILD, gpus=(H200,) * 8),
        replace(BUILD, gpus=(H200, H200), visible="5,3"),
        replace(BUILD, gpus=(H200,), visible="0,0"),  # CUDA takes a repeated one once, or none
        replace(BUILD, gpus=(H200,), visible="2,-1,3"),  # what follows a negative number does not count
        replace(BUILD, gpus=(H200,), visible="GPU-3f1c", accelerator="cuda"),
        replace(BUILD, gpus=(Gpu("AMD Instinct MI300X", (9, 4), 192 * GIB),), cuda=None, architectures=("gfx942",)),
        Facts(),
        Facts(visible=""),
        Facts(cuda="13.0"),
        Facts(wsl=True),
    ],
    ids=str,
)
def test_what_is_as_it_should_be(facts):
    assert problems(facts) == [] and notes(facts) == []


def test_only_the_gpus_that_are_used_count():
    facts = replace(BUILD, gpus=(A100, A100, T4))
    assert len(problems(facts)) == 1 and problems(facts, 2) == [] and notes(facts, 2) == []
    (found,) = problems(replace(BUILD, gpus=(A100,)), 4)
    assert found.startswith("--gpus 4 asks for more GPUs than CUDA shows, which is 1: ask for at most as many")
    assert problems(Facts(), 4) == [], "processes on a CPU"


@pytest.mark.parametrize("name", ["below sm_80", "an old driver", "a wrong number", "several slices", "WSL 2"])
def test_doctor_plan_and_train_say_the_same(name, capfd, monkeypatch, run_here, tiny_recipe, tmp_path):
    facts, says = PROBLEMS[name]
    monkeypatch.setattr(gpus, "inspect", lambda memory=False: facts)
    recipe = tiny_recipe(tmp_path)
    said = run_here(recipe, expect=1)
    assert said.startswith(f"l2v: {says}") and "Traceback" not in said and not (tmp_path / "run").exists()
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable)  # as the user starts it, before any launcher
    assert run_here(recipe, expect=1) == said
    assert plan.main([str(recipe)]) == 1
    assert capfd.readouterr().err == said
    assert plan.main([str(recipe), "--gpu", "h200"]) == 0, "another machine's GPU"
    capfd.readouterr()
    report = Report()
    report.add("devices", hardware.devices)
    assert report.problems[0] == said.removeprefix("l2v: ").strip()


def test_train_and_plan_pass_notes_on(capsys, monkeypatch, tiny_recipe, tmp_path):
    facts, says = NOTES["mixed"]
    monkeypatch.setattr(gpus, "inspect", lambda memory=False: facts)
    assert check()[0].startswith(says) and check(1) == []
    monkeypatch.setattr("l2v.train.launch", lambda *_, **__: 0)
    from l2v.train import main

    monkeypatch.delenv("RANK", raising=False)
    assert main([str(tiny_recipe(tmp_path)), "--gpus", "3"]) == 0
    assert f"l2v: {says}" in capsys.readouterr().err
    assert main([str(tiny_recipe(tmp_path)), "--gpus", "4"]) == 1
    assert "--gpus 4 asks for more GPUs than CUDA shows, which is 3" in capsys.readouterr().err
    with pytest.raises(UserError, match="asks for more"):
        check(4)


def test_the_smallest_micro_batch():
    what, given = "one example of 512 tokens and its gradients", {"zero": 1, "precision": "same", "shorter": True}
    assert too_little_memory(what, 10 * GIB, 10 * GIB, **given) == ""
    assert too_little_memory(what, 10.5 * GIB, 10 * GIB, **given) == (
        f"{what} need 10.5 GiB and 10.0 GiB of this GPU are free: use a shorter length; or base.base_precision=nf4, a quarter of "
        "the frozen weights; or zero.stage=3, which shards them over the GPUs; or a GPU with more memory, or with less of it "
        "in use (l2v plan RECIPE shows what fits)"
    )
    left = too_little_memory("the base's weights", 10 * GIB, 0, zero=3, precision="same")
    assert "nf4" not in left and "zero.stage" not in left and "shorter" not in left and "a GPU with more memory" in left


def test_this_machine_is_inspected():
    facts = inspect()
    assert facts.torch and facts.gpus == () and facts.visible == "", "tests hide the GPU"
    assert problems(facts) == []


def test_a_gpu_of_windows_has_no_device_file(tmp_path):
    for name in ("dev", "usr/lib/wsl/lib"):
        (tmp_path / name).mkdir(parents=True)
    assert not has_nvidia_gpu(tmp_path)
    (tmp_path / "dev/dxg").touch()
    assert not has_nvidia_gpu(tmp_path), "one of another maker"
    (tmp_path / "usr/lib/wsl/lib/libcuda.so.1").touch()
    assert has_nvidia_gpu(tmp_path)
    (tmp_path / "dev/dxg").unlink()
    (tmp_path / "dev/nvidiactl").touch()
    assert not has_nvidia_gpu(tmp_path)
    (tmp_path / "dev/nvidia3").touch()
    assert has_nvidia_gpu(tmp_path)
    assert in_wsl("5.15.153.1-microsoft-standard-WSL2") and not in_wsl("6.8.0-45-generic")


@pytest.mark.parametrize(
    ("capability", "builds", "runs"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 9), ["sm_75", "sm_80", "sm_86", "sm_90"], True),
        ((6, 1), ["sm_75", "sm_80"], False),
        ((12, 0), ["sm_90", "sm_100"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((12, 0), ["sm_90a", "sm_120"], True),
        ((9, 0), [], True),
    ],
)
def test_which_gpus_a_build_of_torch_runs_on(capability, builds, runs):
    assert has_code_for(capability, builds) is runs
