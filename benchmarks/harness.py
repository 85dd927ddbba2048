"""Timing several providers of one operation against each other, and the files that come out of it."""

import importlib.metadata
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch


@dataclass
class Result:
    """One provider on one workload. Times in seconds; `skipped` says why there are none."""

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
    skipped: str = ""
    facts: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches: FLOP/s of a large bf16 product of random numbers, bytes/s of a large copy."""

    flops: float
    bandwidth: float


def device_facts(device: torch.device) -> dict:
    """Device, driver-facing versions and libraries: what a number means nothing without."""
    facts = {"torch": torch.__version__, "python": platform.python_version(), "device": platform.processor() or "cpu"}
    for name in ("triton", "flash-attn", "transformers"):
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
    facts["smoke"] = device.type != "cuda"
    return facts


def time_interleaved(
    calls: dict[str, Sequence[Callable[[], object]]], device: torch.device, seconds: float = 0.2, rounds: int = 7
) -> dict[str, list[float]]:
    """Seconds a call, one number a provider and round, taken in turns so that a clock that drifts hits all alike.

    Each provider gives one callable per set of inputs; they are used in rotation, so that together they are larger
    than the cache. Launches are queued behind a pause on the device, so that a short kernel does not wait for Python.
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
            times[name].append(_run(calls[name], batch[name], device))
    return times


def _run(variants, n, device):
    """Seconds a call over n calls."""
    rotation = itertools.islice(itertools.cycle(variants), n)
    if device.type != "cuda":
        start = time.perf_counter()
        for call in rotation:
            call()
        return (time.perf_counter() - start) / n
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
    """A minute is not spent: one product and one copy, or toy ones on a CPU."""
    n, megabytes = (8192, 4096) if device.type == "cuda" else (256, 8)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(megabytes << 18, device=device)
    target = torch.empty_like(source)
    calls = {"product": [lambda: torch.mm(a, b)], "copy": [lambda: target.copy_(source)]}
    times = {name: statistics.median(x) for name, x in time_interleaved(calls, device).items()}
    return Ceilings(2 * n**3 / times["product"], 2 * source.numel() * 4 / times["copy"])


def fill(result: Result, times: list[float], ceilings: Ceilings) -> Result:
    """Medians, spread and rates."""
    result.median, result.low, result.high = statistics.median(times), min(times), max(times)
    result.tflops = result.flops / result.median / 1e12
    floor = max(result.flops / ceilings.flops, result.bytes / ceilings.bandwidth)
    result.roofline = floor / result.median
    return result


def table(results: list[Result]) -> str:
    """Markdown: a row a provider and workload."""
    lines = [
        "| workload | direction | provider | median us | spread | TFLOP/s | of roofline |",
        "|---|---|---|---|---|---|---|",
    ]
    for x in results:
        if x.median is None:
            lines.append(f"| {x.workload} | {x.direction} | {x.provider} | {x.skipped} | | | |")
            continue
        spread = (x.high - x.low) / x.median
        lines.append(
            f"| {x.workload} | {x.direction} | {x.provider} | {x.median * 1e6:.1f} | {spread:.1%} "
            f"| {x.tflops:.1f} | {x.roofline:.0%} |"
        )
    return "\n".join(lines)


def write(folder: Path, name: str, results: list[Result], facts: dict, ceilings: Ceilings) -> None:
    """NAME.json and NAME.md, and NAME.png where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"facts": facts, "ceilings": asdict(ceilings), "results": [asdict(x) for x in results]}
    (folder / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
    head = f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}"
    if facts["smoke"]:
        head = f"SMOKE TEST on a CPU: these times say nothing about a GPU. {head}"
    (folder / f"{name}.md").write_text(f"{head}\n\n{table(results)}\n")
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({(x.direction, x.facts.get("dropout", 0.0)) for x in results})
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(10, 3.5 * len(panels)), squeeze=False)
    for axis, (direction, dropout) in zip(axes[:, 0], panels, strict=True):
        part = [x for x in results if (x.direction, x.facts.get("dropout", 0.0)) == (direction, dropout)]
        workloads = list(dict.fromkeys(x.workload for x in part))
        providers = list(dict.fromkeys(x.provider for x in part))
        for i, provider in enumerate(providers):
            found = {x.workload: x.tflops or 0.0 for x in part if x.provider == provider}
            places = [j + (i - len(providers) / 2) * 0.8 / len(providers) for j in range(len(workloads))]
            axis.bar(places, [found.get(w, 0.0) for w in workloads], 0.8 / len(providers), label=provider)
        axis.set_xticks(range(len(workloads)), workloads, fontsize=7)
        axis.set_ylabel("TFLOP/s")
        axis.set_title(f"{direction}, dropout {dropout}" + (" (CPU smoke test)" if facts["smoke"] else ""))
        axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(folder / f"{name}.png", dpi=120)
    pyplot.close(figure)
