"""Timing several providers of one operation against each other. Needs torch and nothing else; l2v only for ceilings."""

import contextlib
import gc
import importlib.metadata
import importlib.util
import itertools
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch._functorch import config as functorch_config


class Unavailable(Exception):
    """This provider cannot do this work here."""


def need_cuda(device: torch.device) -> None:
    """Raises: Unavailable on any other device."""
    if device.type != "cuda":
        raise Unavailable("CUDA only")


def need_package(module: str, package: str) -> None:
    """Raises: Unavailable where a module cannot be imported; the message names its package."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of a package that holds it
        found = None
    if found is None or found.origin is None:  # a bare folder of that name, as this checkout has one called kernels
        raise Unavailable(f"{package} is not installed")


def compiled(function: Callable, device: torch.device, *, kept_graph: bool = False) -> Callable:
    """torch.compile of a function, for these shapes alone. Raises: Unavailable but on a GPU.

    kept_graph: the same forward serves several backwards (retain_graph). The compiled backward then may not write its
    results into what the forward kept for it.
    """
    if device.type != "cuda":
        raise Unavailable("compiling for a CPU takes longer than all the rest")
    # Sizes are compiled one by one, and after eight of them it would quietly stop compiling.
    torch.compiler.reset()
    # Read at the first call, which compiles; each peer is called before the next is made.
    functorch_config.donated_buffer = not kept_graph
    return torch.compile(function, dynamic=False)


@dataclass
class Result:
    """One provider on one workload. Times in seconds; `skipped` is the reason why there are none."""

    workload: str
    provider: str
    direction: str
    median: float | None = None
    low: float | None = None
    high: float | None = None
    flops: float = 0.0
    bytes: float = 0.0
    tflops: float | None = None
    roofline: float | None = None
    """Share of the time that the slower of arithmetic and memory would take at the rates measured in this run."""
    memory: int | None = None
    """Peak bytes beyond what was allocated before the call; None where the device does not report it."""
    error: float | None = None
    """Relative error against the reference, measured before the time."""
    skipped: str = ""
    facts: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """What a result has to reach. `value` is None where this run did not measure it."""

    name: str
    limit: float
    value: float | None = None
    at_least: bool = False
    unit: str = "x"

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        return "met" if (self.value >= self.limit if self.at_least else self.value <= self.limit) else "not met"

    def row(self) -> dict:
        """For the JSON."""
        return asdict(self) | {"verdict": self.verdict}


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches: FLOP/s of a large bf16 matmul of random numbers, bytes/s of a large copy."""

    flops: float
    bandwidth: float


PACKAGES = ("triton", "flash-attn", "transformers", "sentence-transformers", "inf-cl", "peft", "deepspeed")


def device_facts(device: torch.device, packages: Sequence[str] = ()) -> dict:
    """Device and versions, without which a number means nothing. packages: further ones, by the names of their wheels."""
    facts = {"torch": torch.__version__, "python": platform.python_version(), "device": platform.processor() or "cpu"}
    for name in (*PACKAGES, *packages):
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "l2": properties.L2_cache_size,
            "cuda": torch.version.cuda,
        }
        from l2v.machine import on_null_gpu

        if on_null_gpu():
            facts["device"] = "null"
    facts["smoke"] = device.type != "cuda"
    return facts


def reason(error: Exception) -> str:
    """Why a provider gave no time, in one line."""
    if "out of memory" in str(error):
        return "out of memory"
    return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}" if str(error) else repr(error)


@contextlib.contextmanager
def attempt(*results: Result) -> Iterator[None]:
    """Around the preparation of a provider: whatever another library raises is written into its results."""
    try:
        yield
    except Exception as error:
        for result in results:
            result.skipped = reason(error)
            result.facts["failed"] = not isinstance(error, Unavailable)


def sets_beyond_cache(bytes_per_set: float, device: torch.device, least: int = 1) -> int:
    """How many sets of inputs to rotate so that together they are larger than the cache, at most 8."""
    if device.type != "cuda":
        return least
    return max(least, min(8, round(2 * torch.cuda.get_device_properties(device).L2_cache_size / bytes_per_set) + 1))


@contextlib.contextmanager
def busy_cores(count: int) -> Iterator[None]:
    """Inside, so many processes do nothing but compute, as other work of a machine would."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; a CPU has nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Return to the device what an attempt that ran out of memory left cached."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that a call allocates at its peak, beyond what is allocated already; None on a CPU."""
    if device.type != "cuda":
        call()
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def time_interleaved(
    calls: dict[str, Sequence[Callable[[], object]]],
    device: torch.device,
    seconds: float = 0.2,
    rounds: int = 7,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds a call, one number a provider and round, taken in turns so that a clock that drifts hits all alike.

    Each provider gives one callable per set of inputs; they are used in rotation, so that together they are larger
    than the cache. Launches are queued behind a pause on the device, so that a short kernel does not wait for Python.
    clock: of a CPU; `time.process_time` counts what the process used itself, whatever else runs.
    """
    batch = {}
    for name, variants in calls.items():
        for call in variants:
            call()
        took = _run(variants, len(variants), device)
        batch[name] = min(200, max(len(variants), round(seconds / rounds / max(took, 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds):
        # Another order each time: who runs after whom matters too.
        names = list(calls)
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            times[name].append(_run(calls[name], batch[name], device, clock))
    return times


def _run(variants, n, device, clock=time.perf_counter):
    """Seconds a call over n calls."""
    rotation = itertools.islice(itertools.cycle(variants), n)
    if device.type != "cuda":
        start = clock()
        for call in rotation:
            call()
        return (clock() - start) / n
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    # About 2 ms during which launches pile up.
    torch.cuda._sleep(4_000_000)
    start.record()
    for call in rotation:
        call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3 / n


def measure_ceilings(device: torch.device) -> Ceilings:
    """Measured as `l2v doctor` calibrates, in less time."""
    from l2v.machine import copy_bytes, gemm_flops

    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    return Ceilings(gemm_flops(device, dtype, 1.0 if gpu else 0.05), copy_bytes(device, 0.5 if gpu else 0.05))


def time_results(
    results: Sequence[Result],
    calls: dict[str, Sequence[Callable[[], object]]],
    device: torch.device,
    ceilings: Ceilings,
    seconds: float = 0.2,
    rounds: int = 7,
) -> None:
    """Time calls in turns, and fill in the results of their providers. The others keep the reason why they were skipped."""
    times = time_interleaved(calls, device, seconds, rounds) if calls else {}
    for result in results:
        if result.provider in times:
            fill(result, times[result.provider], ceilings)


def fill(result: Result, times: list[float], ceilings: Ceilings) -> Result:
    """Medians, spread and rates."""
    result.median, result.low, result.high = statistics.median(times), min(times), max(times)
    if result.flops:
        result.tflops = result.flops / result.median / 1e12
        floor = max(result.flops / ceilings.flops, result.bytes / ceilings.bandwidth)
        result.roofline = floor / result.median
    return result


def free_port() -> int:
    """A TCP port of this machine that nothing uses at the moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
