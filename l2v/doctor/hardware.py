"""The hardware checks of `l2v doctor`: CPU, GPUs, and their measured speed. A check returns the rows of a section.

Imports are inside the functions, so that a missing or broken package becomes a line of the report.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from l2v.doctor.report import Report, Rows, first_line

MIN_CAPABILITY = (8, 0)  # the oldest GPUs that the tests compile the kernels for
GIB = 2**30


def machine(report: Report) -> Rows:
    """System, CPU and memory."""
    import torch

    from l2v.machine import processor

    count = os.cpu_count() or 1
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else count
    flags = re.search(r"^flags\s*:(.*)$", _read("/proc/cpuinfo"), flags=re.MULTILINE)
    known = set(flags[1].split()) if flags else set()
    instructions = {"AVX2": "avx2", "AVX-512": "avx512f", "AVX-512 bf16": "avx512_bf16", "AMX bf16": "amx_bf16"}
    have = [name for name, flag in instructions.items() if flag in known]
    lack = [name for name, flag in instructions.items() if flag not in known]
    listed = ", ".join(have) + (f"; not {', '.join(lack)}" if lack else "")
    rows = {
        "system": platform.platform(),
        "processor": f"{processor()}, {f'{mine} of {count}' if mine < count else count} cores, {platform.machine()}",
        "instructions": listed if known else torch.backends.cpu.get_cpu_capability(),
    }
    memory = {key: int(value) * 1024 for key, value in re.findall(r"^(\w+):\s+(\d+) kB", _read("/proc/meminfo"), re.M)}
    if "MemTotal" in memory:
        rows["memory"] = f"{memory['MemTotal'] / GIB:.1f} GiB, {memory.get('MemAvailable', 0) / GIB:.1f} free"
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():
        rows["memory limit"] = f"{int(limit) / GIB:.1f} GiB for this container"
    if Path("/dev/shm").is_dir():
        size = shutil.disk_usage("/dev/shm").total
        rows["shared memory"] = f"{size / GIB:.1f} GiB"
        if size < GIB and torch.cuda.is_available() and torch.cuda.device_count() > 1:
            report.notes.append(
                f"/dev/shm holds {size / 2**20:.0f} MiB, and NCCL uses it between GPUs: give the container more, "
                "for example --shm-size=8g"
            )
    return rows


def devices(report: Report) -> Rows:
    """GPUs, their driver and how they are linked."""
    import torch

    from l2v.machine import gpu_trouble, has_nvidia_gpu, on_null_gpu, peak_flops

    rows: Rows = {}
    if on_null_gpu():
        rows["device"] = "null"
        report.notes.append(
            "this is the null GPU of tests/nullgpu: kernels are counted, not run, and no number is measured"
        )
    if trouble := gpu_trouble():
        report.problems.append(trouble)
    if not torch.cuda.is_available():
        if trouble:
            why = "there is a GPU, but it cannot be used"
        elif torch.version.cuda is None and has_nvidia_gpu():
            why = f"there is a GPU, but torch {torch.__version__} is built without CUDA"
            report.notes.append(f"{why}: training would run on the CPU; install a torch that is built for CUDA")
        elif has_nvidia_gpu():
            why = f"hidden by CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')}; training runs on the CPU"
        else:
            why = "training runs on the CPU"
        rows["GPU"] = (False, why)
    else:
        for at in range(torch.cuda.device_count()):
            rows[f"cuda:{at}"] = _gpu(report, at, peak_flops)
        if torch.version.cuda:
            newest = newest_cuda()
            rows["CUDA"] = (
                f"driver up to {newest}, torch {torch.version.cuda}" if newest else f"torch {torch.version.cuda}"
            )
        else:
            rows["ROCm"] = f"torch {torch.version.hip}"
        rows["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    driver = nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")
    if driver:
        rows["driver"] = driver.splitlines()[0].strip()
    if torch.cuda.is_available() and torch.cuda.device_count() > 1 and (topology := nvidia_smi("topo", "-m")):
        rows["links"] = links(topology)
    return rows


def _gpu(report: Report, at: int, peak_flops: Callable) -> str:
    import torch

    properties = torch.cuda.get_device_properties(at)
    capability = (properties.major, properties.minor)
    label = f"cuda:{at} ({properties.name}, compute capability {properties.major}.{properties.minor})"
    try:
        free, total = torch.cuda.mem_get_info(at)
        torch.ones(1, device=f"cuda:{at}").add_(1).item()
    except RuntimeError as error:
        report.problems.append(f"{label} does not work: {first_line(error)}")
        free, total = 0, properties.total_memory
    if not has_code_for(capability, torch.cuda.get_arch_list()):
        report.problems.append(f"torch {torch.__version__} has no code for {label}: install a build of torch that has")
    elif capability < MIN_CAPABILITY:
        report.notes.append(f"{label}: the kernels are tested for 8.0 and up, and this GPU has no bf16 in hardware")
    if free and free < 0.9 * total:
        report.notes.append(f"{(total - free) / GIB:.1f} of {total / GIB:.1f} GiB of cuda:{at} are already in use")
    peak = peak_flops(properties.name, torch.bfloat16)
    return (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{total / GIB:.1f} GiB, {free / GIB:.1f} free, {properties.multi_processor_count} multiprocessors"
        + (f", {peak / 1e12:.0f} TFLOP/s bf16 by its data sheet" if peak else "")
    )


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


def has_code_for(capability: tuple[int, int], architectures: list[str]) -> bool:
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


def links(topology: str) -> str:
    """The links between pairs of GPUs, counted, from `nvidia-smi topo -m`: `NV18 between all 28 pairs`."""
    rows = [line.split("\t") for line in re.sub(r"\x1b\[[\d;]*m", "", topology).splitlines()]
    rows = [[cell.strip() for cell in row] for row in rows]
    gpus = [row for row in rows if re.fullmatch(r"GPU\d+", row[0])]
    pairs = Counter(row[1 + j] for i, row in enumerate(gpus) for j in range(i + 1, len(gpus)))
    if len(pairs) == 1:
        return f"{next(iter(pairs))} between all {pairs.total()} pairs"
    return ", ".join(f"{kind} between {count} pairs" for kind, count in pairs.most_common())


def nvidia_smi(*arguments: str) -> str | None:
    """The output of nvidia-smi, or None if it is missing, fails or prints nothing."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 and done.stdout.strip() else None


def calibration(report: Report, seconds: float) -> Rows:
    """Measure the first GPU, or the CPU with the threads that training uses; 0 seconds: show the last measurement."""
    import torch

    from l2v.machine import calibration, calibration_file, on_null_gpu, peak_flops, threads
    from l2v.model.load import dtype_of

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads())
    dtype = dtype_of("auto")
    found = calibration(device, dtype, measure=seconds > 0, seconds=seconds)
    if device.type == "cuda" and on_null_gpu():
        return {"": "none: this is the null GPU, which has no speed"}
    if found is None:
        return {"": "none yet; l2v doctor measures it, and training then logs MFU"}
    report.rates = asdict(found)
    peak = peak_flops(found.device, dtype)
    share = f", {found.gemm_flops / peak:.0%} of the data sheet's {peak / 1e12:.0f}" if peak else ""
    file = calibration_file(device, dtype)
    return {
        "device": found.device,
        "measured": found.when,
        "matmul": f"{rate(found.gemm_flops, 'FLOP/s')} in {found.dtype}{share}",
        "copy": f"{rate(found.copy_bytes, 'B/s')} read and written",
        "kept in": str(file) if file.is_file() else (False, f"{file} cannot be written"),
    }


def rate(value: float, unit: str) -> str:
    """A rate as text, with three digits."""
    scale, prefix = next(((s, p) for s, p in ((1e12, "T"), (1e9, "G")) if value >= s), (1e6, "M"))
    return f"{value / scale:.3g} {prefix}{unit}"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
