"""The hardware checks of `l2v doctor`: CPU, GPUs, and their measured speed. A check returns the rows of a section.

Imports are inside the functions, so that a missing or broken package becomes a line of the report.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from l2v.cores import THREADS, allowed, describe, threads_of
from l2v.doctor.report import Report, Rows, first_line

if TYPE_CHECKING:
    from l2v.machine.gpus import Gpu

GIB = 2**30


def machine(report: Report) -> Rows:
    """System, CPU and memory."""
    import torch

    from l2v.machine import processor

    count, mine = os.cpu_count() or 1, len(allowed())
    flags = re.search(r"^flags\s*:(.*)$", _read("/proc/cpuinfo"), flags=re.MULTILINE)
    known = set(flags[1].split()) if flags else set()
    instructions = {"AVX2": "avx2", "AVX-512": "avx512f", "AVX-512 bf16": "avx512_bf16", "AMX bf16": "amx_bf16"}
    have = [name for name, flag in instructions.items() if flag in known]
    lack = [name for name, flag in instructions.items() if flag not in known]
    listed = ", ".join(have) + (f"; not {', '.join(lack)}" if lack else "")
    rows = {
        "system": platform.platform(),
        "processor": f"{processor()}, {f'{mine} of {count}' if mine < count else count} cores, {platform.machine()}",
        "threads": describe(torch.get_num_threads()),
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

    from l2v.machine import on_null_gpu
    from l2v.machine.gpus import inspect, newest_cuda, notes, nvidia_smi, problems

    rows: Rows = {}
    if on_null_gpu():
        rows["device"] = "null"
        report.notes.append(
            "this is the null GPU of tests/nullgpu: kernels are counted, not run, and no number is measured"
        )
    facts = inspect(memory=True)
    found = problems(facts)
    report.problems += found
    report.notes += notes(facts)
    if not facts.gpus:
        if found:
            why = "there is a GPU, but it cannot be used"
        elif facts.hidden and facts.device:
            why = f"hidden by CUDA_VISIBLE_DEVICES={facts.visible}; training runs on the CPU"
        elif facts.device:
            why = f"there is a GPU, but torch {facts.torch} is built without CUDA"
        else:
            why = "training runs on the CPU"
        rows["GPU"] = (False, why)
    else:
        for at, gpu in enumerate(facts.gpus):
            rows[f"cuda:{at}"] = _gpu(report, at, gpu)
        if facts.cuda:
            newest = newest_cuda()
            rows["CUDA"] = f"driver up to {newest}, torch {facts.cuda}" if newest else f"torch {facts.cuda}"
        else:
            rows["ROCm"] = f"torch {torch.version.hip}"
        rows["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    driver = nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")
    if driver:
        rows["driver"] = driver.splitlines()[0].strip()
    if len(facts.gpus) > 1 and (topology := nvidia_smi("topo", "-m")):
        rows["links"] = links(topology)
    return rows


def _gpu(report: Report, at: int, gpu: Gpu) -> str:
    import torch

    from l2v.machine import peak_flops

    capability = f"compute capability {gpu.capability[0]}.{gpu.capability[1]}"
    try:
        torch.ones(1, device=f"cuda:{at}").add_(1).item()
    except RuntimeError as error:
        report.problems.append(f"cuda:{at} ({gpu.name}, {capability}) does not work: {first_line(error)}")
    peak = peak_flops(gpu.name, torch.bfloat16)
    return (
        f"{gpu.name}, {capability}, {gpu.memory / GIB:.1f} GiB, {(gpu.free or 0) / GIB:.1f} free, "
        f"{torch.cuda.get_device_properties(at).multi_processor_count} multiprocessors"
        + (f", {peak / 1e12:.0f} TFLOP/s bf16 by its data sheet" if peak else "")
    )


def links(topology: str) -> str:
    """The links between pairs of GPUs, counted, from `nvidia-smi topo -m`: `NV18 between all 28 pairs`."""
    rows = [line.split("\t") for line in re.sub(r"\x1b\[[\d;]*m", "", topology).splitlines()]
    rows = [[cell.strip() for cell in row] for row in rows]
    gpus = [row for row in rows if re.fullmatch(r"GPU\d+", row[0])]
    pairs = Counter(row[1 + j] for i, row in enumerate(gpus) for j in range(i + 1, len(gpus)))
    if len(pairs) == 1:
        return f"{next(iter(pairs))} between all {pairs.total()} pairs"
    return ", ".join(f"{kind} between {count} pairs" for kind, count in pairs.most_common())


def calibration(report: Report, seconds: float) -> Rows:
    """Measure the first GPU, or the CPU with the threads that training uses; 0 seconds: show the last measurement."""
    import torch

    from l2v.machine import calibration, calibration_file, on_null_gpu, peak_flops
    from l2v.model.load import dtype_of

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu" and THREADS not in os.environ:
        torch.set_num_threads(threads_of())
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
