"""Speed of a device: its calibration, measured by `l2v doctor` and cached, and the vendor's peak. Problems of GPUs: `gpus`.

Throughput is reported as a share of these. Nothing is assumed about a device that was not measured and is not in the table.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import platform
import re
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from l2v.errors import UserError
from l2v.files import replace_text
from l2v.model.embedded import cache_folder

NULL_GPU = "null GPU"
"""Begins the name of a device that counts kernels and runs none (tests/nullgpu): no number of it may pass for a GPU's."""
SECONDS = 10.0
ROUNDS = 9
GEMM_SHARE = 0.6  # of the seconds; a GPU needs some time to drop to the clock that its power limit allows

# Dense bf16 with fp32 accumulation, FLOP/s, by CUDA's full device name: a variant with another clock, or a slice of a device
# (MIG), is another device. From NVIDIA's data sheets (A10, A100, H100, H200, L4, L40S, HGX B200, GB200 NVL72: half of the figure
# "with sparsity" if only that is printed), the architecture papers of GA102, Ada and RTX Blackwell (GeForce), resellers' sheets
# of the H20, for which NVIDIA publishes none, and AMD's data sheet (MI300X).
PEAK_BF16 = {
    r"(NVIDIA )?A100-SXM4-[48]0GB|(NVIDIA )?A100-PCIE-40GB|(NVIDIA )?A100 80GB PCIe": 312e12,
    r"NVIDIA H100 80GB HBM3": 989e12,
    r"NVIDIA H200": 989e12,
    r"NVIDIA H20": 148e12,
    r"NVIDIA B200": 2250e12,
    r"NVIDIA GB200": 2500e12,
    r"NVIDIA L40S": 362e12,
    r"NVIDIA L4": 121e12,
    r"NVIDIA A10": 125e12,
    r"NVIDIA GeForce RTX 3090": 71e12,
    r"NVIDIA GeForce RTX 4090": 165e12,
    r"NVIDIA GeForce RTX 5090": 209.5e12,
    r"AMD Instinct MI300X": 1307.4e12,
}


@dataclass(frozen=True)
class Calibration:
    """Measured medians of one device: FLOP/s of a large matmul of random numbers, bytes/s (read and written) of a large
    copy. dtype: of the matmul. when: ISO 8601."""

    device: str
    torch: str
    dtype: str
    gemm_flops: float
    copy_bytes: float
    when: str


def calibration(
    device: torch.device, dtype: torch.dtype | None = None, *, measure: bool = False, seconds: float = SECONDS
) -> Calibration | None:
    """The cached calibration of this device under this version of torch, or None.

    dtype: of the matmul; default: that of `base.precision: auto`. On a CPU the number of threads is part of the device.
    measure: measure now, for about `seconds`, and cache the result. If the cache cannot be written, nothing is cached. The null
        GPU has no speed, so nothing is measured.

    Raises:
        UserError: the device has no free memory for the measurement.
    """
    if dtype is None:
        from l2v.model.load import dtype_of  # loads transformers, which callers with a dtype do not need

        dtype = dtype_of("auto")
    file = calibration_file(device, dtype)
    if not measure or (device.type == "cuda" and on_null_gpu()):
        try:
            return Calibration(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # missing, or written by another version
            return None
    try:
        gemm = gemm_flops(device, dtype, seconds * GEMM_SHARE)
        copy = copy_bytes(device, seconds * (1 - GEMM_SHARE))
    except torch.OutOfMemoryError:
        raise UserError(f"{device_name(device)}: no memory is free to calibrate; stop what runs there first") from None
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    found = Calibration(device_name(device), torch.__version__, _short(dtype), gemm, copy, when)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, json.dumps(asdict(found), indent=1))
    return found


def calibration_file(device: torch.device, dtype: torch.dtype) -> Path:
    """The cache file for a device, a version of torch and a dtype."""
    key = f"{device_name(device)} torch {torch.__version__} {_short(dtype)}"
    return cache_folder() / "calibration" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', key).strip('-').lower()}.json"


def device_name(device: torch.device) -> str:
    """A GPU's name from CUDA; a CPU's with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    return f"{processor()}, {count} thread{'s' if count > 1 else ''}"


def on_null_gpu() -> bool:
    """Whether CUDA's device is the null GPU of tests/nullgpu, which computes nothing."""
    return torch.cuda.is_available() and torch.cuda.get_device_name().startswith(NULL_GPU)


def check_results_folder(folder: Path) -> None:
    """Keep numbers of the null GPU apart from those of hardware.

    Raises:
        UserError: this is the null GPU, and neither the folder nor one above it is called `nullgpu`.
    """
    if on_null_gpu() and "nullgpu" not in folder.resolve().parts:
        raise UserError(
            f"this is the null GPU, whose times mean nothing, and "
            f"{folder} may hold those of hardware: give a folder named nullgpu"
        )


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """The vendor's dense FLOP/s of a device, in bf16 only; None for a device that is not in the table."""
    if dtype != torch.bfloat16:
        return None
    return next((peak for names, peak in PEAK_BF16.items() if re.fullmatch(names, name)), None)


def gemm_flops(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """Median FLOP/s of an n x n x n matmul of random numbers, n as large as the time allows (at most 8192, on a CPU 2048).

    Random numbers, because a GPU runs at a higher clock on zeros than on weights.
    """
    gpu = device.type == "cuda"
    n, largest = (2048, 8192) if gpu else (256, 2048)
    while True:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        took = _median(functools.partial(torch.mm, a, b, out=out), device, seconds / 50)
        if n == largest or took * 8 > seconds / ROUNDS:
            break
        n *= 2
    return 2 * n**3 / _median(lambda: torch.mm(a, b, out=out), device, seconds)


def copy_bytes(device: torch.device, seconds: float) -> float:
    """Median bytes/s, read and written, of a copy larger than any cache: 1 GiB, on a CPU 256 MiB."""
    source = torch.ones(1 << (28 if device.type == "cuda" else 26), device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / _median(lambda: target.copy_(source), device, seconds)


def _median(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds per call: the median over rounds that take about `seconds` together, after one warm-up call."""

    def run(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - began) / times

    run(1)
    times = max(1, round(seconds / ROUNDS / max(run(1), 1e-7)))
    began, found = time.perf_counter(), [run(times)]
    while len(found) < ROUNDS and time.perf_counter() - began < seconds:
        found.append(run(times))
    return statistics.median(found)


def free_port() -> int:
    """A TCP port that nothing on this machine listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
