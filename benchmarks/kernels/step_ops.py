"""The memory-bound ops of a training step (rms_norm, swiglu, segment_pool) against their peers.

l2v bench step_ops [--quick] [--out FOLDER]

On a CPU it runs tiny sizes, as a smoke test of itself, and says so in everything it writes.
"""

import importlib.metadata
import sys
from dataclasses import asdict

import torch

from benchmarks.harness import (
    SMOKE,
    Ceilings,
    Result,
    Unavailable,
    arguments,
    bars,
    device_facts,
    fill,
    headline,
    markdown,
    measure_ceilings,
    peak_memory,
    reason,
    release,
    sets_beyond_cache,
    time_interleaved,
    write,
)
from benchmarks.kernels.attention import sentences
from benchmarks.kernels.step_ops_peers import PROVIDERS, Step, Workload, definition

TOKENS, HIDDEN, FFN, HEADS, HEAD = 16384, 4096, 14336, 32, 128


def workloads(device: torch.device, quick: bool) -> list[Workload]:
    """Llama-3-8B's shapes at 16k tokens on a GPU (the heads' norm is Qwen3-8B's), small ones on a CPU."""
    smoke = device.type != "cuda"
    T, E, F, H, D = (96, 64, 160, 4, 16) if smoke else (TOKENS, HIDDEN, FFN, HEADS, HEAD)
    at = (device, torch.float32 if smoke else torch.bfloat16)
    found = [
        Workload("rms_norm", f"add + norm {E}", T, E, *at),
        Workload("head_norm", f"norm of {H} heads {D}", T, D, *at, heads=H),
        Workload("swiglu", f"swiglu {F}", T, F, *at),
        Workload("segment_pool", f"norm + pool {E}, sentences", T, E, *at, lengths=sentences(T)),
    ]
    if not quick:
        length = T // 4
        found += [
            Workload("segment_pool", f"norm + pool {E}, {length}", T, E, *at, lengths=(length,) * 4),
            Workload("rms_norm", f"add + norm {E // 4}", T, E // 4, *at),
        ]
    return found


def outcome(step: Step, leaves: tuple[torch.Tensor, ...], grads: list[torch.Tensor]) -> list[torch.Tensor]:
    """Results and the leaves' gradients."""
    results = step(*leaves)
    return [x.detach() for x in (*results, *torch.autograd.grad(results, leaves, grads))]


def error_of(got: list[torch.Tensor], exact: list[torch.Tensor], dtype: torch.dtype) -> float:
    """Largest relative error. Errors: ValueError if it is more than a few roundings of the dtype explain."""
    error = max(
        float((x.double() - want.double()).norm() / want.double().norm()) for x, want in zip(got, exact, strict=True)
    )
    if not error < 4 * torch.finfo(dtype).eps:
        raise ValueError(f"wrong results: relative error {error:.1e}")
    return error


def run(w: Workload, ceilings: Ceilings, seconds: float) -> list[Result]:
    """All providers on one workload, forward and backward."""
    sets = [w.leaves() for _ in range(sets_beyond_cache(w.bytes(False), w.device, least=2))]
    with torch.no_grad():
        grads = [torch.randn_like(x) for x in definition(w)(*sets[0])]
    wide = torch.float32 if w.device.type == "cuda" else torch.float64
    leaves = tuple(x.detach().to(wide).requires_grad_() for x in sets[0])
    exact = outcome(definition(w), leaves, [x.to(wide) if x.dtype == w.dtype else x for x in grads])
    del leaves
    results, calls = [], {"forward": {}, "backward": {}}
    for provider in PROVIDERS:
        name = provider.__name__
        both = [Result(w.name, name, d, bytes=w.bytes(d == "backward")) for d in calls]
        results += both
        try:
            step = provider(w)
            error = error_of(outcome(step, sets[0], grads), exact, w.dtype)
            memory = peak_memory(lambda s=step: torch.autograd.grad(s(*sets[0]), sets[0], grads), w.device)
            # The graphs are kept: a backward is timed by itself, again and again.
            graphs = [step(*x) for x in sets]
        except Exception as failure:  # whatever another library raises is its result
            for result in both:
                result.skipped = reason(failure)
                result.facts["failed"] = not isinstance(failure, Unavailable)
            release(w.device)
            continue

        def ahead(leaves, step=step):
            with torch.no_grad():
                step(*leaves)

        def back(leaves, graph):
            torch.autograd.grad(graph, leaves, grads, retain_graph=True)

        calls["forward"][name] = [lambda x=x, go=ahead: go(x) for x in sets]
        calls["backward"][name] = [lambda x=x, y=y: back(x, y) for x, y in zip(sets, graphs, strict=True)]
        for result in both:
            result.error, result.memory = error, memory
    del exact
    for direction, variants in calls.items():
        times = time_interleaved(variants, w.device, seconds)
        for result in results:
            if result.direction == direction and result.provider in times:
                fill(result, times[result.provider], ceilings)
                result.roofline = result.bytes / ceilings.bandwidth / result.median
                result.facts["gigabytes_per_second"] = result.bytes / result.median / 1e9
    return results


def table(results: list[Result]) -> str:
    """Markdown: a row a provider, workload and direction. Bytes are those that the definition needs."""
    head = ["workload", "direction", "provider", "median us", "spread", "GB/s", "of copy", "peak MiB", "error"]
    rows = []
    for x in results:
        row = [x.workload, x.direction, x.provider]
        if x.median is None:
            rows.append([*row, x.skipped, *[""] * 5])
            continue
        row += [f"{x.median * 1e6:.1f}", f"{(x.high - x.low) / x.median:.1%}", f"{rate(x):.0f}", f"{x.roofline:.0%}"]
        rows.append([*row, "" if x.memory is None else f"{x.memory / 2**20:.1f}", f"{x.error:.1e}"])
    return markdown(head, rows)


def liger_version() -> str | None:
    try:
        return importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        return None


def rate(x: Result) -> float:
    """GB/s, 0 where it was not measured."""
    return x.facts.get("gigabytes_per_second", 0.0)


def panels(results: list[Result], label: str) -> list:
    """A panel a direction, of GB/s."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for x in results:
        found.setdefault(x.direction, {}).setdefault(x.provider, {})[x.workload] = rate(x)
    return [(f"{direction}{label}", "GB/s", values) for direction, values in found.items()]


def main(argv: list[str] | None = None) -> int:
    """Prints the table and writes it; the exit code is 1 if this library's own kernel was wrong or failed."""
    options = arguments("step_ops", __doc__, quick="four workloads: a minute on a GPU").parse_args(argv)
    device = torch.empty(0, device=options.device).device
    torch.manual_seed(0)
    facts, ceilings = device_facts(device) | {"liger-kernel": liger_version()}, measure_ceilings(device)
    if facts["smoke"]:
        print(SMOKE)
    results, label = [], " (CPU smoke test)" if facts["smoke"] else ""
    for w in workloads(device, options.quick):
        part = run(w, ceilings, seconds=0.02 if facts["smoke"] else 0.1 if options.quick else 0.3)
        print(table(part), flush=True)
        results += part
        if options.out:
            data = {"facts": facts, "ceilings": asdict(ceilings), "results": [asdict(x) for x in results]}
            shown = panels(results, label)
            text = f"{headline(facts)}\n\n{table(results)}"
            write(options.out, "step_ops", data, text, lambda p=shown: bars(p))
    return int(any(x.provider == "l2v" and x.median is None for x in results))


if __name__ == "__main__":
    sys.exit(main())
