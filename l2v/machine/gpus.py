"""What is wrong with the GPUs of a machine, in one sentence with the way out: the same from doctor, plan and train.

`inspect` collects what CUDA, the driver and the environment say. `problems` and `notes` are functions of these facts alone.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from l2v.errors import UserError

MIN_CAPABILITY = (8, 0)
"""The oldest GPUs that multiply bf16, and that the tests compile the kernels for."""
ON_CPU = "train on the CPU with CUDA_VISIBLE_DEVICES= (empty)"
GIB = 2**30
LLAMA_8B = 2 * 8_030_261_248
"""Bytes of the weights of Llama-3-8B in bf16."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as CUDA shows it to this process. memory, free: bytes; free is None where nobody asked."""

    name: str
    capability: tuple[int, int]
    memory: int
    free: int | None = None

    @property
    def is_slice(self) -> bool:
        """Whether it is a slice of a GPU (MIG); its name says so."""
        return " MIG " in self.name


@dataclass(frozen=True)
class Facts:
    """All that the sentences depend on.

    torch: its version. cuda: what it is built for; None for the CPU and ROCm. architectures: those that it has code for.
    gpus: visible to this process. error: why CUDA does not start. listed: GPUs of the machine by nvidia-smi, hidden ones too;
    None where nobody asked or it does not answer. device: whether the system has an NVIDIA GPU, also one that torch cannot
    use. visible: CUDA_VISIBLE_DEVICES. accelerator: DS_ACCELERATOR. wsl: Linux inside Windows. null: the null GPU of
    tests/nullgpu, without caches of its own.
    """

    torch: str = "2.11.0"
    cuda: str | None = None
    architectures: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    error: str = ""
    listed: int | None = None
    device: bool = False
    visible: str | None = None
    accelerator: str | None = None
    wsl: bool = False
    null: bool = False

    @property
    def hidden(self) -> bool:
        """Whether the user hid all GPUs."""
        return self.visible is not None and self.visible.strip() in ("", "-1")


def inspect(memory: bool = False) -> Facts:
    """The facts of this machine and process.

    memory: also the free memory of each GPU, which takes some of it for as long as the process runs.
    """
    import torch

    from l2v.machine import on_null_gpu

    facts = Facts(visible=os.environ.get("CUDA_VISIBLE_DEVICES"))
    device, gpus, error = has_nvidia_gpu(), [], ""
    if torch.cuda.is_available():
        for at in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(at)
            free = _free(at) if memory else None
            gpus.append(Gpu(found.name, (found.major, found.minor), found.total_memory, free))
    elif torch.version.cuda is not None and device and not facts.hidden:
        try:
            torch.cuda.init()  # is_available() swallows the reason
            error = "no GPU is visible"
        except (RuntimeError, AssertionError) as failed:
            error = str(failed).strip() or "no reason was given"
    return Facts(
        torch=torch.__version__, cuda=torch.version.cuda, gpus=tuple(gpus), error=error, device=device, visible=facts.visible,
        architectures=tuple(torch.cuda.get_arch_list()) if gpus else (), accelerator=os.environ.get("DS_ACCELERATOR"),
        listed=_listed() if len(gpus) < len(_named(facts.visible)) else None, wsl=in_wsl(),
        null=on_null_gpu() and not {"L2V_CACHE", "TRITON_CACHE_DIR"} <= os.environ.keys(),
    )  # fmt: skip


def check(processes: int = 0) -> list[str]:
    """Notes for whoever trains on this machine in so many processes (0: one on each GPU).

    Raises:
        UserError: training cannot run here; the first of `problems`.
    """
    facts = inspect()
    if found := problems(facts, processes):
        raise UserError(found[0])
    return notes(facts, processes)


def problems(facts: Facts, processes: int = 0) -> list[str]:
    """Why training cannot run, each in one sentence with the way out.

    No GPU, a torch without CUDA, and GPUs that the user hid are none: training runs on the CPU.
    """
    if facts.gpus and facts.accelerator == "cpu":
        # That alone hides no GPU from torch: DeepSpeed would wait on the CPU for work that runs on the GPU.
        return [
            f"DS_ACCELERATOR=cpu contradicts the GPU that torch finds: set DS_ACCELERATOR=cuda, or {ON_CPU}",
        ]
    if facts.null:
        return [
            "the null GPU needs caches of its own, L2V_CACHE and TRITON_CACHE_DIR: start with python -m tests.nullgpu run"
        ]
    if facts.error:
        return [_not_started(facts)]
    if facts.cuda is None:
        return []
    found = [_missing(facts)] if facts.gpus and len(_named(facts.visible)) > len(facts.gpus) else []
    for at, gpu in enumerate(_used(facts, processes)):
        label = f"cuda:{at} ({gpu.name}, compute capability {gpu.capability[0]}.{gpu.capability[1]})"
        if not has_code_for(gpu.capability, facts.architectures):
            found.append(f"torch {facts.torch} has no code for {label}: install a build of torch that has, or {ON_CPU}")
        elif gpu.capability < MIN_CAPABILITY:
            found.append(
                f"{label} is too old: bf16 and the kernels need 8.0 or newer; name another with CUDA_VISIBLE_DEVICES, or "
                f"{ON_CPU}"
            )
    if facts.gpus and processes > len(facts.gpus):
        found.append(
            f"--gpus {processes} asks for more GPUs than CUDA shows, which is {len(facts.gpus)}: ask for at most as many, or "
            "look at CUDA_VISIBLE_DEVICES and l2v doctor"
        )
    return found


def notes(facts: Facts, processes: int = 0) -> list[str]:
    """What is slower or smaller than it need be, or may surprise."""
    found, used = [], _used(facts, processes)
    if facts.hidden and facts.device:
        found.append(
            f"CUDA_VISIBLE_DEVICES={facts.visible} hides the GPU: training runs on the CPU; unset it to train on the GPU"
        )
    elif facts.device and not facts.gpus and facts.cuda is None:
        found.append(
            f"there is a GPU, but torch {facts.torch} is built without CUDA: training would run on the CPU; install a torch "
            "that is built for CUDA"
        )
    kinds = Counter((gpu.name, gpu.memory // GIB) for gpu in used)
    if len(kinds) > 1:
        listed = ", ".join(f"{count} x {name} with {size} GiB" for (name, size), count in kinds.most_common())
        found.append(
            f"the GPUs differ ({listed}): every step waits for the slowest, and micro-batches have to fit the smallest; name "
            "equal ones with CUDA_VISIBLE_DEVICES"
        )
    if any(gpu.is_slice for gpu in used):
        found.append(
            f"cuda:0 is a slice of a GPU ({used[0].name}): a process sees one slice and NCCL connects none, so training runs in "
            "one process with the slice's memory"
        )
    for at, gpu in enumerate(used):
        if gpu.free is not None and 0 < gpu.free < 0.9 * gpu.memory:
            taken = f"{(gpu.memory - gpu.free) / GIB:.1f} of {gpu.memory / GIB:.1f} GiB"
            found.append(f"{taken} of cuda:{at} are already in use")
    if used and (least := min(gpu.memory for gpu in used)) < 1.25 * LLAMA_8B:
        found.append(
            f"{least / GIB:.1f} GiB are too little for Llama-3-8B in bf16, whose weights alone take {LLAMA_8B / GIB:.1f}: take a "
            "smaller base, base.base_precision=nf4 (a quarter), or zero.stage=3 on several GPUs; l2v plan RECIPE says what fits"
        )
    if facts.wsl and used:
        found.append(
            "WSL 2 gives Linux only the memory that .wslconfig names, and little of it pinned: raise `memory` there if loading "
            "a base or zero.offload_optimizer fails"
        )
    return found


def too_little_memory(what: str, needs: float, free: int, *, zero: int, precision: str, shorter: bool = False) -> str:
    """One sentence where something that cannot be split does not fit on a GPU; empty where it does.

    what: with its stage, in the plural. needs, free: bytes on one rank. zero, precision: zero.stage and base.base_precision.
    shorter: whether a shorter length would help.
    """
    if needs <= free:
        return ""
    ways = ["a shorter length"] if shorter else []
    if precision == "same" and zero < 3:
        ways += [
            "base.base_precision=nf4, a quarter of the frozen weights",
            "zero.stage=3, which shards them over the GPUs",
        ]
    ways += ["a GPU with more memory, or with less of it in use"]
    return (
        f"{what} need {needs / GIB:.1f} GiB and {free / GIB:.1f} GiB of this GPU are free: use {'; or '.join(ways)} (l2v plan "
        "RECIPE shows what fits)"
    )


def _used(facts: Facts, processes: int) -> tuple[Gpu, ...]:
    return facts.gpus[: processes or None]


def _named(visible: str | None) -> list[str]:
    """The GPUs that CUDA_VISIBLE_DEVICES names, up to a negative number, which ends the list."""
    named = []
    for entry in (visible or "").split(","):
        if not entry.strip() or entry.strip().startswith("-"):
            break
        named.append(entry.strip())
    return list(dict.fromkeys(named))


def _missing(facts: Facts) -> str:
    """CUDA_VISIBLE_DEVICES names more GPUs than there are."""
    named = _named(facts.visible)
    if sum(entry.startswith("MIG-") for entry in named) > 1:
        return (
            f"CUDA shows a process one MIG slice and CUDA_VISIBLE_DEVICES names {len(named)}: name one, and train on it alone, "
            "or have MIG switched off (nvidia-smi shows it)"
        )
    has = "" if facts.listed is None else f" of this machine's {facts.listed}"
    return (
        f"CUDA_VISIBLE_DEVICES={facts.visible} names {len(named)} GPUs and CUDA shows {len(facts.gpus)}{has}, because it stops "
        "at the first that it does not know: correct it, or unset it for all GPUs"
    )


def _not_started(facts: Facts) -> str:
    """There is a GPU, and CUDA does not start."""
    old = re.search(r"driver on your system is too old \(found version (\d+)\)", facts.error)
    if old:
        major, minor = divmod(int(old[1]) // 10, 100)
        return (
            f"the NVIDIA driver supports CUDA {major}.{minor} at most and torch {facts.torch} is built for CUDA {facts.cuda}: "
            f"update the driver, install a torch that is built for CUDA {major}, or {ON_CPU}"
        )
    if _named(facts.visible):
        has = "" if not facts.listed else f", which has {facts.listed} (0 to {facts.listed - 1})"
        return (
            f"CUDA_VISIBLE_DEVICES={facts.visible} names no GPU of this machine{has}: correct it, unset it for all GPUs, or "
            f"{ON_CPU}"
        )
    first = facts.error.splitlines()[0].rstrip(".")
    if facts.wsl:
        return (
            f"torch {facts.torch} cannot use the GPU under WSL 2: {first}; update NVIDIA's driver on Windows, install none "
            f"inside Linux, and run wsl --update, or {ON_CPU}"
        )
    return (
        f"torch {facts.torch} cannot use the GPU of this machine: {first}; check nvidia-smi and CUDA_VISIBLE_DEVICES, or "
        f"{ON_CPU}"
    )


def _free(at: int) -> int:
    """Bytes that are free on a GPU; 0 where it does not answer."""
    import torch

    try:
        return torch.cuda.mem_get_info(at)[0]
    except RuntimeError:
        return 0


def has_nvidia_gpu(root: Path = Path("/")) -> bool:
    """Whether the system has an NVIDIA GPU, even if torch cannot use it. WSL 2 has a library in place of a device file."""
    if any((root / "dev").glob("nvidia[0-9]*")):
        return True
    return (root / "dev/dxg").exists() and (root / "usr/lib/wsl/lib/libcuda.so.1").exists()


def in_wsl(release: str | None = None) -> bool:
    """Whether this is Linux inside Windows (WSL 2), by the name of its kernel."""
    return "microsoft" in (platform.release() if release is None else release).lower()


def _listed() -> int | None:
    """GPUs of the machine, whatever CUDA_VISIBLE_DEVICES says."""
    output = nvidia_smi("-L")
    return None if output is None else len(re.findall(r"^GPU \d+:", output, re.M))


def nvidia_smi(*arguments: str) -> str | None:
    """The output of nvidia-smi, or None if it is missing, fails or prints nothing."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 and done.stdout.strip() else None


def newest_cuda() -> str | None:
    """The newest version of CUDA that the installed NVIDIA driver supports, as `13.0`; None without a driver.

    From the driver itself (cuDriverGetVersion, 1000 * major + 10 * minor): torch has no public name for it.
    """
    version = ctypes.c_int()
    try:
        status = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1").cuDriverGetVersion(
            ctypes.byref(version)
        )
    except (OSError, AttributeError):  # no such library; a library without such a function
        return None
    return None if status or not version.value else f"{version.value // 1000}.{version.value % 1000 // 10}"


def has_code_for(capability: tuple[int, int], architectures: tuple[str, ...] | list[str]) -> bool:
    """Whether one of torch's architectures (`sm_90`, `compute_120`, ...) runs on a GPU.

    Binaries (sm) run on the same major version with the same or a newer minor one, PTX (compute) on anything newer. An
    empty list counts as True.
    """
    for name in architectures:
        kind, _, digits = name.partition("_")
        number = re.match(r"\d+", digits)
        if not number:
            continue
        built = (int(number[0][:-1]), int(number[0][-1]))
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return not architectures
