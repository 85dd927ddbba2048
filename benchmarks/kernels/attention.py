"""Packed attention against its peers.

l2v bench attention [--quick] [--out FOLDER]

On a CPU it runs tiny packs as a smoke test, and labels everything it writes as one.
"""

import random
import sys
from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.command import Comparison, Setup
from benchmarks.harness import Ceilings, Result, Unavailable, attempt, sets_beyond_cache, time_results
from benchmarks.kernels.attention_peers import PROVIDERS, Workload
from benchmarks.pages import Panel, tflops_panels
from l2v_kernels import AttentionPlan
from l2v_kernels.attention.reference import attention_reference
from l2v_kernels.attention.settings import Settings

SHAPES = {"llama-3-8b": (32, 8, 128), "64-dim": (16, 16, 64)}
FIXED = (128, 256, 512, 2048, 8192)
WINDOW = 256
"""Of the pack `window`, whose segments are the longest that --quick measures."""
NAMES = ("sentences", *map(str, FIXED), "window")


def sentences(tokens: int, seed: int = 0) -> tuple[int, ...]:
    """Log-normal lengths of about 30 tokens, as sentences of an encyclopedia, cut to fill exactly `tokens`."""
    generator, lengths = random.Random(seed), []
    while sum(lengths) < tokens:
        # exp(mu + sigma^2 / 2) = 30
        lengths.append(min(max(1, round(generator.lognormvariate(3.28, 0.5))), 256, tokens - sum(lengths)))
    return tuple(lengths)


def workloads(device: torch.device, quick: bool, only: Sequence[str] = ()) -> list[Workload]:
    """The packs that are measured: 16k tokens on a GPU, a few hundred on a CPU.

    only: names of packs: `sentences`, a length, or `window`; those that are not measured here are skipped.
    """
    smoke = device.type != "cuda"
    tokens, dtype = (256, torch.float32) if smoke else (16384, torch.bfloat16)
    fixed = (128,) if smoke else (128, 512, 2048) if quick else FIXED
    packs = {"sentences": sentences(tokens)} | {str(n): (n,) * (tokens // n) for n in fixed}
    packs = {name: lengths for name, lengths in packs.items() if not only or name in only}
    shapes = dict(list(SHAPES.items())[:1]) if quick else SHAPES
    if smoke:
        shapes = {name: (heads // 8, max(1, key_heads // 8), D) for name, (heads, key_heads, D) in shapes.items()}
    found = [
        Workload(f"{name} {shape}", lengths, *heads, dropout, device, dtype)
        for shape, heads in shapes.items()
        for name, lengths in packs.items()
        for dropout in (0.0, 0.3)
    ]
    if not only or "window" in only:
        length, window = (128, 16) if smoke else (2048, WINDOW)
        segments = (length,) * (tokens // length)
        found += [
            Workload(f"{length} window {window} {shape}", segments, *heads, 0.0, device, dtype, window)
            for shape, heads in shapes.items()
        ]
    return found


def inputs(w: Workload, n: int) -> list[list[torch.Tensor]]:
    """n sets of [q, k, v, do]; q, k and v require grad."""
    heads = (w.heads, w.key_heads, w.key_heads, w.heads)
    make = lambda count: torch.randn(w.tokens, count, w.head_dim, device=w.device, dtype=w.dtype)  # noqa: E731
    sets = [[make(count) for count in heads] for _ in range(n)]
    for *leaves, _ in sets:
        for x in leaves:
            x.requires_grad_()
    return sets


def check(w: Workload, attend, tensors: list[torch.Tensor], exact: list[torch.Tensor]) -> None:
    """Raises: ValueError if output or gradients are further from `exact` than rounding explains."""
    q, k, v, do = tensors
    o = attend(q, k, v)
    got = [o, *torch.autograd.grad(o, (q, k, v), do)]
    tolerance = 2e-2 if w.dtype == torch.bfloat16 else 1e-4
    for name, ours, want in zip(("o", "dq", "dk", "dv"), got, exact, strict=True):
        error = float((ours.float() - want).norm() / want.norm())
        if not error < tolerance:
            raise ValueError(f"wrong {name}: relative error {error:.1e}")


def exact_results(w: Workload, tensors: list[torch.Tensor], dropout: float) -> list[torch.Tensor]:
    """[o, dq, dk, dv] of the reference in fp32."""
    leaves = [x.detach().float().requires_grad_() for x in tensors[:3]]
    plan = AttentionPlan.from_lengths(w.lengths, w.device)
    settings = Settings(w.head_dim**-0.5, dropout, window=w.window)
    o, _ = attention_reference(*leaves, plan, torch.arange(len(w.lengths), device=w.device), settings)
    return [o.detach(), *torch.autograd.grad(o, leaves, tensors[3].float())]


def run(w: Workload, ceilings: Ceilings, seconds: float) -> list[Result]:
    """All providers on one workload, forward and backward."""
    sets = inputs(w, sets_beyond_cache(2 * w.bytes(False), w.device, least=2))
    exact, results, calls = None, [], {"forward": {}, "backward": {}}
    facts = {"dropout": w.dropout, "tokens": w.tokens, "segments": len(w.lengths)}
    for provider in PROVIDERS:
        name, workload = provider.__name__, f"{w.name} dropout {w.dropout}"
        both = [
            Result(workload, name, d, flops=w.flops(d == "backward"), bytes=w.bytes(d == "backward"), facts=dict(facts))
            for d in calls
        ]
        results += both
        with attempt(*both):
            attend = provider(w)
            # Another library's dropout draws other numbers: it is checked without, and ours with.
            if name == "l2v" or not w.dropout:
                if exact is None:
                    exact = exact_results(w, sets[0], w.dropout)
                check(w, attend, sets[0], exact)
            outputs = [attend(q, k, v) for q, k, v, _ in sets]
            torch.autograd.grad(outputs[0], sets[0][:3], sets[0][3], retain_graph=True)
            calls["forward"][name] = [lambda x=x, f=attend: _forward(f, x) for x in sets]
            calls["backward"][name] = [lambda x=x, o=o: _backward(o, x) for x, o in zip(sets, outputs, strict=True)]
    del exact
    for direction, variants in calls.items():
        time_results([x for x in results if x.direction == direction], variants, w.device, ceilings, seconds)
    return results


@torch.no_grad()
def _forward(attend, tensors):
    attend(*tensors[:3])


def _backward(output, tensors):
    torch.autograd.grad(output, tensors[:3], tensors[3], retain_graph=True)


def parts(setup: Setup) -> Iterator[Callable[[], list[Result]]]:
    """A call for each workload."""
    seconds = setup.seconds(quick=0.1, full=0.3)
    only = [name for name in setup.options.packs.split(",") if name]
    if unknown := set(only) - {*NAMES}:
        raise Unavailable(f"--packs has no {', '.join(sorted(unknown))}; choose of {', '.join(NAMES)}")
    for w in workloads(setup.device, setup.quick, only):
        yield lambda w=w: run(w, setup.ceilings, seconds)


def panels(results: list[Result], label: str) -> list[Panel]:
    """TFLOP/s, a panel for each direction and dropout."""
    return tflops_panels(results, lambda x: f"{x.direction}, dropout {x.facts['dropout']}{label}")


BENCHMARK = Comparison(
    name="attention",
    doc=__doc__,
    quick="one shape and fewer lengths: minutes on a GPU",
    options={"--packs": {"default": "", "metavar": "NAMES", "help": "of these packs alone, for example sentences,512"}},
    parts=parts,
    panels=panels,
)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
