"""In-batch InfoNCE against its peers: time of forward and backward together, peak memory, error.

l2v bench contrastive [--quick] [--out FOLDER]

On a CPU it runs tiny sizes as a smoke test, and labels everything it writes as one.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.command import Comparison, Setup
from benchmarks.harness import (
    Ceilings,
    Result,
    Target,
    attempt,
    fill,
    peak_memory,
    release,
    sets_beyond_cache,
    time_interleaved,
    time_results,
)
from benchmarks.kernels.contrastive_peers import PROVIDERS, Workload, bare_matmuls, memeff_matryoshka, spans
from benchmarks.kernels.losses import BARE, STEP, by_workload, prepare
from benchmarks.kernels.losses import comparison as ratios
from benchmarks.pages import Panel, headline, markdown, table, targets_table, tflops_panels
from l2v_kernels import info_nce

WIDTHS = (384, 1024, 4096)
ROWS = (512, 1024, 4096, 8192, 16384, 65536)
CANDIDATES_PER_QUERY = 8
"""Where each query has seven hard negatives."""
QUICK = (
    (512, 512, 384), (8192, 8192, 4096), (65536, 65536, 4096), (65536, 65536, 384), (16384, 16384, 1024),
    (1024, 8192, 1024), (1024, 1024, 1024),
)  # fmt: skip
"""The targets' sizes come early: a run that is stopped has written what it measured."""
MAX_FLOPS = 3e14
"""Larger ones say nothing new, and their reference alone takes most of a minute."""


def workloads(device: torch.device, quick: bool) -> list[Workload]:
    """From a batch of 512 to 65,536 on a GPU, a few rows on a CPU."""
    if device.type != "cuda":
        return [
            Workload(*sizes, device, torch.float32) for sizes in ((48, 48, 64), (16, 16 * CANDIDATES_PER_QUERY, 64))
        ]
    sizes = QUICK
    if not quick:
        sizes = [(n, n * per, e) for e in WIDTHS for per in (1, CANDIDATES_PER_QUERY) for n in ROWS]
    found = [Workload(*each, device, torch.bfloat16) for each in sizes]
    return [w for w in found if w.flops <= MAX_FLOPS]


@torch.no_grad()
def exact_gradients(w: Workload, q_NE: torch.Tensor, k_ME: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(dq, dk) by the definition, a gigabyte of scores at a time: in float64 on a CPU, in float32 on a GPU."""
    dtype = torch.float32 if w.device.type == "cuda" else torch.float64
    q, k = q_NE.detach().to(dtype), k_ME.detach().to(dtype)
    lengths = [x.norm(dim=1, keepdim=True) for x in (q, k)]
    u, v = q / lengths[0], k / lengths[1]
    del q, k
    du, dv, targets = torch.empty_like(u), torch.zeros_like(v), w.targets_N()
    for at in spans(w.n, max(1, (1 << 30) // (4 * w.m))):
        shares = (w.scale * u[at] @ v.T).softmax(1)
        shares[torch.arange(len(shares), device=w.device), targets[at]] -= 1
        du[at] = shares @ v
        dv.addmm_(shares.T, u[at])
    out = []
    for unit, gradient, length in ((u, du, lengths[0]), (v, dv, lengths[1])):
        gradient -= (gradient * unit).sum(1, keepdim=True) * unit
        out.append(gradient.mul_(w.scale / w.n).div_(length).float())
    return out[0], out[1]


def error_of(w: Workload, step, tensors, exact) -> float:
    """Relative error of the gradients. Raises: ValueError if it is more than scores in the embeddings' dtype explain."""
    _, *got = step(*tensors)
    error = max(float((ours.float() - want).norm() / want.norm()) for ours, want in zip(got, exact, strict=True))
    # bf16 scores of 10 are off by up to 0.03, and so is every probability that is made of them.
    tolerance = 3e-2 if w.dtype == torch.bfloat16 else 1e-4
    if not error < tolerance:
        raise ValueError(f"wrong gradients: relative error {error:.1e}")
    return error


def checked(w: Workload, tensors) -> Callable[[Callable], float]:
    """`error_of`, with the exact gradients computed once."""
    exact = exact_gradients(w, *tensors)
    return lambda step: error_of(w, step, tensors, exact)


def run(w: Workload, ceilings: Ceilings, seconds: float, rounds: int = 5) -> list[Result]:
    """All providers on one workload."""
    sets = [w.inputs() for _ in range(sets_beyond_cache(2 * w.bytes_of_inputs, w.device))]
    facts = {"n": w.n, "m": w.m, "e": w.e, "products": w.matmuls, "scores_s": w.bytes_of_scores / ceilings.bandwidth}
    facts |= {"inputs": w.bytes_of_inputs}
    # Matmuls first: their buffers stay while the others are tried, so none runs out of memory only when it is timed.
    providers = {p.__name__: p for p in (bare_matmuls, *PROVIDERS)}
    results = [
        Result(w.name, name, STEP, flops=w.flops, bytes=2 * w.bytes_of_inputs, facts=dict(facts)) for name in providers
    ]
    calls = prepare(results, lambda name: providers[name](w), checked(w, sets[0]), sets, w.device)
    time_results(results, calls, w.device, ceilings, seconds, rounds)
    return results


def run_matryoshka(device: torch.device, ceilings: Ceilings, seconds: float) -> list[Result]:
    """Six prefixes in one call, against one loss of the whole length, six calls, and memeff; the forward by itself too."""
    if device.type == "cuda":
        w, prefixes = Workload(16384, 16384, 4096, device, torch.bfloat16), (128, 256, 512, 1024, 2048, 4096)
    else:
        w, prefixes = Workload(48, 48, 48, device, torch.float32), (8, 16, 24, 32, 40, 48)
    targets, (q, k) = w.targets_N(), w.inputs()
    losses = {
        "one loss": lambda: info_nce(q, k, targets, scale=w.scale),
        "six losses": lambda: sum(info_nce(q[:, :p], k[:, :p], targets, scale=w.scale) for p in prefixes),
    }
    checked = {
        "six prefixes": lambda: lambda: info_nce(q, k, targets, scale=w.scale, prefixes=prefixes),
        "memeff": lambda: functools.partial(memeff_matryoshka(w, prefixes), q, k),
    }
    results = {
        name: [Result(f"matryoshka {w.name}", name, direction) for direction in ("forward", STEP)]
        for name in ("one loss", "six prefixes", "six losses", "memeff")
    }
    want = torch.autograd.grad(losses["six losses"](), (q, k))
    for name, make in checked.items():
        with attempt(*results[name]):
            loss = make()
            error = _wrong(torch.autograd.grad(loss(), (q, k)), want, 2e-2 if w.dtype == torch.bfloat16 else 1e-4)
            for result in results[name]:
                result.error = error
            losses[name] = loss
        release(device)
    del want
    for at, call in enumerate((lambda f: f(), lambda f: torch.autograd.grad(f(), (q, k)))):
        # The forward with a graph, as training runs it; its share of the whole is subtracted for the backward.
        calls = {name: [lambda f=f, c=call: c(f)] for name, f in losses.items()}
        for name, variants in calls.items():
            results[name][at].memory = peak_memory(variants[0], w.device)
            results[name][at].flops = w.flops if at else 2.0 * w.n * w.m * w.e
        for name, times in time_interleaved(calls, device, seconds, rounds=5).items():
            fill(results[name][at], times, ceilings)
    return [x for pair in results.values() for x in pair]


def _wrong(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor], tolerance: float) -> float:
    """The relative error of gradients. Raises: ValueError above the tolerance."""
    error = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(got, want, strict=True))
    if not error < tolerance:
        raise ValueError(f"wrong gradients: {error:.1e}")
    return error


def steps(results: list[Result]) -> list[Result]:
    """Those of `run`, without the prefixes'."""
    return [x for x in results if x.direction == STEP and "n" in x.facts]


def targets(results: list[Result], smoke: bool) -> list[Target]:
    """What the op has to reach, computed from what was measured: the worst of the workloads that each line is about."""
    found = {} if smoke else by_workload(steps(results))

    def ratios(over: str, under: str, where=lambda facts: True) -> list[float]:
        pairs = [(each.get(over), each.get(under)) for each in found.values()]
        timed = [(a, b) for a, b in pairs if a and b and a.median and b.median and where(a.facts)]
        return [a.median / b.median for a, b in timed]

    def square(facts):
        return facts["e"] == 4096 and facts["n"] >= 8192

    memory = None
    large = found.get("65536 x 65536 x 4096", {}).get("l2v")
    if large and large.memory is not None:
        memory = large.memory / 2**20
    inputs = 2 * 65536 * 4096 * 2
    pairs = {} if smoke else matryoshka(results)
    forward, backward = ({name: pair[i] for name, pair in pairs.items()} for i in (0, 1))

    def against_one_loss(times: dict[str, float]) -> float | None:
        return times["six prefixes"] / times["one loss"] if times else None

    return [
        Target(
            "peak memory beyond the inputs at 65,536 x 65,536 x 4096: 1.2 x (inputs + gradients) + 512 MiB",
            (1.2 * 2 * inputs + (512 << 20)) / 2**20,
            memory,
            unit="MiB",
        ),
        Target("time / bare matmuls, E = 4096, N >= 8192", 1.25, max(ratios("l2v", BARE, square), default=None)),
        Target("time of inf-cl / time", 1.5, min(ratios("inf_cl", "l2v"), default=None), at_least=True),
        Target("time of chunked torch / time", 1.0, min(ratios("torch_chunked", "l2v"), default=None), at_least=True),
        Target("six prefixes / one loss, forward", 1.3, against_one_loss(forward)),
        Target("six prefixes / one loss, backward", 1.6, against_one_loss(backward)),
    ]


def matryoshka(results: list[Result]) -> dict[str, tuple[float, float]]:
    """Seconds of (forward, backward) of each way; the backward is what a whole step takes beyond its forward."""
    found = {(x.provider, x.direction): x.median for x in results if x.workload.startswith("matryoshka") and x.median}
    names = [name for name, direction in found if direction == STEP]
    return {name: (found[name, "forward"], found[name, STEP] - found[name, "forward"]) for name in names}


def matryoshka_table(results: list[Result]) -> str:
    """Markdown: forward and backward apart, also as multiples of one loss of the whole length."""
    found = matryoshka(results)
    one, rows = found.get("one loss"), []
    for name, times in found.items():
        ratios = [f"{mine / base:.2f}" for mine, base in zip(times, one, strict=True)]
        rows.append([name, *(f"{x * 1e6:.0f}" for x in times), *ratios])
    return markdown(["", "forward us", "backward us", "forward / one loss", "backward / one loss"], rows)


def comparison(results: list[Result]) -> str:
    """Markdown, a row a workload."""
    return ratios(
        steps(results), [p.__name__ for p in PROVIDERS if not p.__name__.startswith("l2v")], "scores", ["products"]
    )


def report(results: list[Result], found: list[Target], facts: dict) -> str:
    """The Markdown page."""
    return (
        f"{headline(facts)}\n\n## Targets\n\n{targets_table(found)}\n\n## Ratios\n\n"
        "`bare us`: the matmuls alone, timed in turns with the rest; `scores us`: 22 bytes a score at the bandwidth "
        "of a large copy, which a way that writes its scores to memory cannot go below. A peer's ratio above 1: it is "
        f"slower.\n\n{comparison(results)}\n\n## Matryoshka\n\n{matryoshka_table(results)}\n\n## All\n\n{table(results)}"
    )


def panels(results: list[Result], label: str) -> list[Panel]:
    """TFLOP/s by width, and peak memory where it was measured."""
    out = tflops_panels(steps(results), lambda x: f"E = {x.facts['e']}, forward and backward{label}")
    memory: dict[str, dict[str, float]] = {}
    for x in steps(results):
        if x.memory is not None:
            memory.setdefault(x.provider, {})[x.workload] = x.memory / 2**20
    return out + ([("peak beyond the inputs", "MiB", memory)] if memory else [])


def parts(setup: Setup) -> Iterator[Callable[[], list[Result]]]:
    """A call for the prefixes, then one for each workload."""
    seconds, rounds = setup.seconds(quick=0.1, full=0.3), 3 if setup.quick else 7
    yield lambda: run_matryoshka(setup.device, setup.ceilings, seconds)
    for w in workloads(setup.device, setup.quick):
        yield lambda w=w: run(w, setup.ceilings, seconds, rounds)


BENCHMARK = Comparison(
    name="contrastive",
    doc=__doc__,
    quick="seven sizes: two minutes on a GPU",
    parts=parts,
    targets=targets,
    page=report,
    panels=panels,
    ours=("l2v", "six"),
    packages=("memeff",),
)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
