"""Timing several providers of one operation against each other, and the files that come out of it."""

import argparse
import gc
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

SMOKE = "SMOKE TEST on a CPU: these times say nothing about a GPU."


class Unavailable(Exception):
    """This provider cannot do this work here."""


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
    memory: int | None = None
    """Peak bytes beyond what was there before the call; None where the device does not tell."""
    error: float | None = None
    """Relative error against the reference, measured before the time was."""
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
    """What the device reaches: FLOP/s of a large bf16 product of random numbers, bytes/s of a large copy."""

    flops: float
    bandwidth: float


def device_facts(device: torch.device) -> dict:
    """Device, driver-facing versions and libraries: what a number means nothing without."""
    facts = {"torch": torch.__version__, "python": platform.python_version(), "device": platform.processor() or "cpu"}
    for name in ("triton", "flash-attn", "transformers", "sentence-transformers", "inf-cl", "peft", "deepspeed"):
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


def arguments(name: str, doc: str, quick: str) -> argparse.ArgumentParser:
    """The arguments that every benchmark takes."""
    parser = argparse.ArgumentParser(prog=f"l2v bench {name}", description=doc.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--out", type=Path, default=None, help=f"folder for {name}.json, .md and .png")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def reason(error: Exception) -> str:
    """Why a provider gave no time, in one line."""
    if "out of memory" in str(error):
        return "out of memory"
    return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}" if str(error) else repr(error)


def sets_beyond_cache(bytes_per_set: float, device: torch.device, least: int = 1) -> int:
    """How many sets of inputs to rotate so that together they are larger than the cache, at most 8."""
    if device.type != "cuda":
        return least
    return max(least, min(8, round(2 * torch.cuda.get_device_properties(device).L2_cache_size / bytes_per_set) + 1))


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; a CPU has nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give back what an attempt that ran out of memory left behind."""
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
    if result.flops:
        result.tflops = result.flops / result.median / 1e12
        floor = max(result.flops / ceilings.flops, result.bytes / ceilings.bandwidth)
        result.roofline = floor / result.median
    return result


def table(results: list[Result]) -> str:
    """Markdown: a row a provider and workload; memory and error where any was measured."""
    columns = {
        "workload": lambda x: x.workload,
        "direction": lambda x: x.direction,
        "provider": lambda x: x.provider,
        "median us": lambda x: x.skipped if x.median is None else f"{x.median * 1e6:.1f}",
        "spread": lambda x: "" if x.median is None else f"{(x.high - x.low) / x.median:.1%}",
        "TFLOP/s": lambda x: "" if x.tflops is None else f"{x.tflops:.1f}",
        "of roofline": lambda x: "" if x.roofline is None else f"{x.roofline:.0%}",
    }
    if any(x.memory is not None for x in results):
        columns["peak MiB"] = lambda x: "" if x.memory is None else f"{x.memory / 2**20:.1f}"
    if any(x.error is not None for x in results):
        columns["error"] = lambda x: "" if x.error is None else f"{x.error:.1e}"
    return markdown(list(columns), [[show(x) for show in columns.values()] for x in results])


def targets_table(targets: list[Target]) -> str:
    """Markdown: what was to be reached, and whether it was."""
    rows = []
    for x in targets:
        sign = ">=" if x.at_least else "<="
        value = "" if x.value is None else f"{x.value:.3g} {x.unit}"
        rows.append([x.name, f"{sign} {x.limit:.4g} {x.unit}", value, x.verdict])
    return markdown(["target", "limit", "measured", ""], rows)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, *rows]).replace("\n", f"\n|{'---|' * len(head)}\n", 1)


def headline(facts: dict) -> str:
    """The line above every table."""
    head = f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}"
    return f"{SMOKE} {head}" if facts["smoke"] else head


Panel = tuple[str, str, dict[str, dict[str, float]]]
"""Title, unit, and provider -> workload -> value."""


def tflops_panels(results: list[Result], title: Callable[[Result], str]) -> list[Panel]:
    """A panel a title, of TFLOP/s."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for x in results:
        found.setdefault(title(x), {}).setdefault(x.provider, {})[x.workload] = x.tflops or 0.0
    return [(name, "TFLOP/s", found[name]) for name in sorted(found)]


def bars(panels: list[Panel]):
    """A figure of grouped bars; Unavailable without matplotlib."""
    pyplot = plotting()
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(10, 3.5 * len(panels)), squeeze=False)
    for axis, (title, unit, values) in zip(axes[:, 0], panels, strict=True):
        workloads = list(dict.fromkeys(w for found in values.values() for w in found))
        for i, (provider, found) in enumerate(values.items()):
            places = [j + (i - len(values) / 2) * 0.8 / len(values) for j in range(len(workloads))]
            axis.bar(places, [found.get(w, 0.0) for w in workloads], 0.8 / len(values), label=provider)
        axis.set_xticks(range(len(workloads)), workloads, fontsize=7)
        axis.set_ylabel(unit)
        axis.set_title(title)
        axis.legend(fontsize=6)
    return figure


def plotting():
    """matplotlib's pyplot, without a screen; Unavailable where it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise Unavailable("matplotlib is not installed") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def write(folder: Path, name: str, data: dict, text: str, figure: Callable[[], object] | None = None) -> None:
    """NAME.json and NAME.md, and NAME.png where matplotlib is installed. `data` holds Results and Targets as rows."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
    (folder / f"{name}.md").write_text(text + "\n")
    if figure is None:
        return
    try:
        drawn = figure()
    except Unavailable:
        return
    drawn.tight_layout()
    drawn.savefig(folder / f"{name}.png", dpi=120)
    plotting().close(drawn)
