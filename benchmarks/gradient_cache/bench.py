"""Time and peak memory of a contrastive step against the batch, with and without the gradient cache.

l2v bench gradient_cache [--quick] [--model SHAPE] [--out FOLDER]

On the real training path: decoder, LoRA, DeepSpeed engine, `contrastive_step`, optimizer. The cache takes micro-batches of
one size, so the batch is what changes. On a CPU memory is resident memory, a real measurement; its times are a CPU's.
"""

import argparse
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict

import torch

from benchmarks.command import Benchmark
from benchmarks.gradient_cache.step import SHAPES, Setting, TrainingStep, check_installed, memory_on_cpu, times_on_cpu
from benchmarks.harness import Result, Target, device_facts, peak_memory, reason, release, synchronize
from benchmarks.pages import headline, markdown, plotting, targets_table, write

CPU_TIMES = "Memory is resident memory of a CPU process; times are a CPU's and say nothing about a GPU."
MICRO_BATCHES = (1, 2, 4, 8, 16)
"""Batches, in micro-batches."""


def settings(model: str, quick: bool, recompute: Iterable[bool]) -> list[Setting]:
    """Cached and uncached for every batch, what needs the least memory first."""
    b, found = SHAPES[model].examples, []
    for again in sorted(recompute, reverse=True):
        counts = (1, 4, 16) if quick else MICRO_BATCHES
        found += [Setting(model, m, b, again) for m in counts if m > 1]
        found += [Setting(model, 1, b * m, again) for m in counts]
    return found


def blank(x: Setting) -> Result:
    """A result without numbers."""
    facts = asdict(x) | {"batch": x.batch, "tokens": x.tokens, "embeddings": x.embeddings}
    provider = "gradient cache" if x.micros > 1 else "whole batch"
    return Result(f"batch {x.batch}", provider, "recompute" if x.recompute else "no recompute", facts=facts)


def on_cpu(chosen: list[Setting], rounds: int, show: Callable[[list[Result]], None]) -> list[Result]:
    """Each setting in its own processes."""
    results = []
    for x in chosen:
        result = blank(x)
        results.append(result)
        result.memory = memory_on_cpu(x)
        if rounds:
            _time(result, times_on_cpu(x, rounds))
        show(results)
    return results


def on_gpu(chosen: list[Setting], rounds: int, show: Callable[[list[Result]], None]) -> list[Result]:
    """All settings in one process: the allocator reports what each of them needs."""
    at = TrainingStep(chosen[0].model, torch.bfloat16)
    results, steps = [blank(x) for x in chosen], []
    full: set[bool] = set()
    for x, result in zip(chosen, results, strict=True):
        if x.micros == 1 and x.recompute in full:
            result.skipped = "out of memory"
            continue
        try:
            step = at.prepare(x)
            step()
            result.memory = peak_memory(step, at.device)
            steps.append((result, step))
        except RuntimeError as error:
            result.skipped = reason(error)
            if result.skipped != "out of memory":
                raise
            full.add(x.recompute)
        release(at.device)
    show(results)
    # In turns, so that a clock that drifts hits all alike.
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for (result, step), taken in zip(steps, times, strict=True):
            synchronize(at.device)
            start = time.perf_counter()
            step()
            synchronize(at.device)
            taken.append(time.perf_counter() - start)
            _time(result, taken)
    show(results)
    return results


def _time(result, times):
    result.median, result.low, result.high = statistics.median(times), min(times), max(times)


def targets(results: list[Result], where: str) -> list[Target]:
    """What the cache has to keep to, computed from what was measured; the worst batch counts."""
    out = []
    for recompute in (False, True):
        found = [x for x in results if x.facts["recompute"] == recompute and not x.skipped]
        cached = [x for x in found if x.facts["micros"] > 1]
        size = cached[0].facts["examples"] if cached else None
        base = next((x for x in found if x.facts["micros"] == 1 and x.facts["examples"] == size), None)
        label = f"{where}, {'recompute' if recompute else 'no recompute'}"
        slower, memory = [], None
        if base:
            for x in cached:
                if x.median and base.median:
                    a_token = (x.median / x.facts["tokens"]) / (base.median / base.facts["tokens"])
                    slower.append(a_token / (1 if recompute else 1.5 - 0.5 / x.facts["micros"]))
            if sixteen := [x for x in cached if x.facts["micros"] == 16 and x.memory and base.memory]:
                memory = (sixteen[0].memory - sixteen[0].facts["embeddings"]) / base.memory
        expected = "whole batch" if recompute else "((1.5 - 0.5/m) x whole batch)"
        out.append(
            Target(f"{label}: time a token, cache / {expected}", 1.35 if recompute else 1.05, max(slower, default=None))
        )
        out.append(Target(f"{label}: (peak of 16 micro-batches - embeddings) / peak of one", 1.1, memory))
    return out


def table(results: list[Result]) -> str:
    """Markdown, a row a setting."""
    rows = []
    for x in results:
        row = [x.direction, str(x.facts["batch"]), x.provider, str(x.facts["micros"])]
        row += [f"{x.median * 1e3:.0f}", f"{x.facts['tokens'] / x.median:.0f}"] if x.median else [x.skipped, ""]
        rows.append([*row, f"{x.memory / 2**20:.1f}" if x.memory else ""])
    return markdown(["", "batch", "", "micro-batches", "ms a step", "tokens/s", "peak MiB"], rows)


def report(results: list[Result], found: list[Target], facts: dict) -> str:
    """The Markdown page."""
    shape = SHAPES[results[0].facts["model"]]
    text = (
        f"{facts['line']}\n\nA Llama of {shape.layers} layers and width {shape.hidden} without weights, LoRA as in the recipes; "
        f"pairs of two texts of {shape.length} tokens; {shape.examples} pairs a micro-batch. `peak MiB`: beyond weights and "
        "optimizer state, which exist before the step.\n\n"
    )
    return f"{text}## Targets\n\n{targets_table(found)}\n\n## Steps\n\n{table(results)}"


def curves(results: list[Result], line: str):
    """Peak memory, and time a token, against the batch."""
    pyplot = plotting()
    timed = any(x.median for x in results)
    figure, axes = pyplot.subplots(1, 1 + timed, figsize=(5.5 * (1 + timed), 4.5), squeeze=False)
    values = [("peak memory of a step, MiB", lambda x: x.memory and x.memory / 2**20)]
    if timed:
        values.append(("microseconds a token", lambda x: x.median and x.median / x.facts["tokens"] * 1e6))
    groups = {(x.provider, x.direction): [] for x in results}
    for x in results:
        groups[x.provider, x.direction].append(x)
    for axis, (title, value) in zip(axes[0], values, strict=True):
        for (provider, direction), part in groups.items():
            points = sorted((x.facts["batch"], value(x)) for x in part if value(x))
            style = "o-" if provider == "gradient cache" else "s--"
            axis.plot([x for x, _ in points], [y for _, y in points], style, label=f"{provider}, {direction}")
        axis.set_xscale("log", base=2)
        batches = sorted({x.facts["batch"] for x in results})
        axis.set_xticks(batches, batches)
        axis.set_xlabel("pairs a step")
        axis.set_title(title, fontsize=10)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
    figure.suptitle(textwrap.fill(line, 70 * (1 + timed)), fontsize=8)
    return figure


RECOMPUTE = {"on": [True], "off": [False], "both": [True, False]}


def run(options: argparse.Namespace) -> int:
    """Prints the tables and writes them. Raises: Unavailable where the step cannot run."""
    device = options.device
    gpu = device.type == "cuda"
    check_installed()
    model = options.model or ("1b" if gpu else "small")
    chosen = settings(model, options.quick, RECOMPUTE[options.recompute])
    facts = device_facts(device) | {"smoke": False}
    facts["line"] = headline(facts) + ("" if gpu else f". {CPU_TIMES}")
    print(facts["line"], flush=True)
    where = "GPU" if gpu else "CPU"

    def show(results: list[Result]) -> None:
        print(table(results[-1:] if not gpu else results), flush=True)
        if options.out:
            found = targets(results, where)
            data = {"facts": facts, "model": asdict(SHAPES[model]), "targets": [x.row() for x in found]}
            data["results"] = [asdict(x) for x in results]
            text = report(results, found, facts)
            write(options.out, "gradient_cache", data, text, lambda: curves(results, facts["line"]))

    rounds = options.rounds if options.rounds is not None else 2 if options.quick else 5 if gpu else 3
    results = (on_gpu if gpu else on_cpu)(chosen, rounds, show)
    print(targets_table(targets(results, where)))
    return 0


BENCHMARK = Benchmark(
    name="gradient_cache",
    doc=__doc__,
    quick="three batches: a minute on a GPU",
    options={
        "--model": {"choices": tuple(SHAPES), "help": "default: 1b on a GPU, small on a CPU"},
        "--recompute": {"choices": tuple(RECOMPUTE), "default": "both", "help": "of activations"},
        "--rounds": {"type": int, "help": "timed steps of each setting; 0 measures memory alone"},
    },
    run=run,
)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
