"""The memory-bound ops of a training step (rms_norm, sandwich_norm, swiglu, segment_pool) against their peers.

l2v bench step_ops [--quick] [--out FOLDER]

On a CPU it runs tiny sizes as a smoke test, and labels everything it writes as one.
"""

import sys
from collections.abc import Callable, Iterator

import torch

from benchmarks.command import Comparison, Setup
from benchmarks.harness import Ceilings, Result, Target, attempt, peak_memory, release, sets_beyond_cache, time_results
from benchmarks.kernels.attention import sentences
from benchmarks.kernels.step_ops_peers import PROVIDERS, Step, Workload, definition
from benchmarks.pages import Panel, headline, markdown

TOKENS, HIDDEN, FFN, HEADS, HEAD = 16384, 4096, 14336, 32, 128
NARROW = 640
"""Hidden size of Gemma 3 270M, whose GeGLU is a seventh of Llama-3-8B's SwiGLU."""


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
            Workload("sandwich_norm", f"norm + add + norm {NARROW}", T, 32 if smoke else NARROW, *at),
            Workload("geglu", f"geglu {F // 7}", T, F // 7, *at),
        ]
    return found


def outcome(step: Step, leaves: tuple[torch.Tensor, ...], grads: list[torch.Tensor]) -> list[torch.Tensor]:
    """Results and the leaves' gradients."""
    results = step(*leaves)
    return [x.detach() for x in (*results, *torch.autograd.grad(results, leaves, grads))]


def error_of(got: list[torch.Tensor], exact: list[torch.Tensor], dtype: torch.dtype) -> float:
    """Largest relative error. Raises: ValueError if it is more than a few roundings of the dtype explain."""
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
        with attempt(*both):
            step = provider(w)
            error = error_of(outcome(step, sets[0], grads), exact, w.dtype)
            memory = peak_memory(lambda s=step: torch.autograd.grad(s(*sets[0]), sets[0], grads), w.device)
            # The graphs are kept: a backward is timed by itself, again and again.
            graphs = [step(*x) for x in sets]
            _backward(graphs[0], sets[0], grads)  # a peer whose graph cannot be kept is skipped here, with its reason
            calls["forward"][name] = [lambda x=x, s=step: _forward(s, x) for x in sets]
            calls["backward"][name] = [
                lambda x=x, y=y: _backward(y, x, grads) for x, y in zip(sets, graphs, strict=True)
            ]
            for result in both:
                result.error, result.memory = error, memory
        release(w.device)
    del exact
    for direction, variants in calls.items():
        time_results([x for x in results if x.direction == direction], variants, w.device, ceilings, seconds)
    for result in results:
        if result.median:
            result.roofline = result.bytes / ceilings.bandwidth / result.median
            result.facts["gigabytes_per_second"] = result.bytes / result.median / 1e9
    return results


@torch.no_grad()
def _forward(step, leaves):
    step(*leaves)


def _backward(graph, leaves, grads):
    torch.autograd.grad(graph, leaves, grads, retain_graph=True)


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


def rate(x: Result) -> float:
    """GB/s, 0 where it was not measured."""
    return x.facts.get("gigabytes_per_second", 0.0)


def panels(results: list[Result], label: str) -> list[Panel]:
    """A panel a direction, of GB/s."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for x in results:
        found.setdefault(x.direction, {}).setdefault(x.provider, {})[x.workload] = rate(x)
    return [(f"{direction}{label}", "GB/s", values) for direction, values in found.items()]


def page(results: list[Result], _: list[Target], facts: dict) -> str:
    """The Markdown page."""
    return f"{headline(facts)}\n\n{table(results)}"


def parts(setup: Setup) -> Iterator[Callable[[], list[Result]]]:
    """A call for each workload."""
    seconds = setup.seconds(quick=0.1, full=0.3)
    for w in workloads(setup.device, setup.quick):
        yield lambda w=w: run(w, setup.ceilings, seconds)


BENCHMARK = Comparison(
    name="step_ops",
    doc=__doc__,
    quick="four workloads: a minute on a GPU",
    parts=parts,
    table=table,
    page=page,
    panels=panels,
    packages=("liger-kernel",),
)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
