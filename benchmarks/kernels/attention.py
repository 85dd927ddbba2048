"""Packed attention against its peers.

l2v bench attention [--quick] [--out FOLDER]

On a CPU it runs tiny packs, as a smoke test of itself, and says so in everything it writes.
"""

import random
import sys
from dataclasses import asdict

import torch

from benchmarks.harness import (
    SMOKE,
    Result,
    Unavailable,
    arguments,
    bars,
    device_facts,
    fill,
    headline,
    measure_ceilings,
    reason,
    sets_beyond_cache,
    table,
    tflops_panels,
    time_interleaved,
    write,
)
from benchmarks.kernels.attention_peers import PROVIDERS, Workload
from l2v_kernels import AttentionPlan
from l2v_kernels.attention.reference import attention_reference
from l2v_kernels.attention.settings import Settings

SHAPES = {"llama-3-8b": (32, 8, 128), "64-dim": (16, 16, 64)}
FIXED = (128, 256, 512, 2048, 8192)


def sentences(tokens: int, seed: int = 0) -> tuple[int, ...]:
    """Log-normal lengths of about 30 tokens, as sentences of an encyclopedia, cut to fill exactly `tokens`."""
    generator, lengths = random.Random(seed), []
    while sum(lengths) < tokens:
        # exp(mu + sigma^2 / 2) = 30
        lengths.append(min(max(1, round(generator.lognormvariate(3.28, 0.5))), 256, tokens - sum(lengths)))
    return tuple(lengths)


def workloads(device: torch.device, quick: bool) -> list[Workload]:
    """The packs that are measured: 16k tokens on a GPU, a handful on a CPU."""
    smoke = device.type != "cuda"
    tokens, dtype = (256, torch.float32) if smoke else (16384, torch.bfloat16)
    fixed = (128,) if smoke else (128, 512, 2048) if quick else FIXED
    packs = {"sentences": sentences(tokens)} | {str(n): (n,) * (tokens // n) for n in fixed}
    shapes = dict(list(SHAPES.items())[:1]) if quick else SHAPES
    if smoke:
        shapes = {name: (heads // 8, max(1, key_heads // 8), D) for name, (heads, key_heads, D) in shapes.items()}
    return [
        Workload(f"{name} {shape}", lengths, *heads, dropout, device, dtype)
        for shape, heads in shapes.items()
        for name, lengths in packs.items()
        for dropout in (0.0, 0.3)
    ]


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
    """Errors: ValueError if output or gradients are further from `exact` than rounding explains."""
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
    settings = Settings(w.head_dim**-0.5, dropout)
    o, _ = attention_reference(*leaves, plan, torch.arange(len(w.lengths), device=w.device), settings)
    return [o.detach(), *torch.autograd.grad(o, leaves, tensors[3].float())]


def run(w: Workload, ceilings, seconds: float) -> list[Result]:
    """All providers on one workload, forward and backward."""
    sets = inputs(w, sets_beyond_cache(2 * w.bytes(False), w.device, least=2))
    exact, results, forward, backward = None, [], {}, {}
    for provider in PROVIDERS:
        name = provider.__name__
        try:
            attend = provider(w)
            # Another library's dropout draws other numbers: it is checked without, and ours with.
            if name == "l2v" or not w.dropout:
                if exact is None:
                    exact = exact_results(w, sets[0], w.dropout)
                check(w, attend, sets[0], exact)
            outputs = [attend(q, k, v) for q, k, v, _ in sets]
            torch.autograd.grad(outputs[0], sets[0][:3], sets[0][3], retain_graph=True)
        except (Unavailable, RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            results += [Result(w.name, name, direction, skipped=reason(error)) for direction in ("forward", "backward")]
            continue

        def ahead(tensors, attend=attend):
            with torch.no_grad():
                attend(*tensors[:3])

        def back(tensors, output):
            torch.autograd.grad(output, tensors[:3], tensors[3], retain_graph=True)

        forward[name] = [lambda x=x, go=ahead: go(x) for x in sets]
        backward[name] = [lambda x=x, o=o, go=back: go(x, o) for x, o in zip(sets, outputs, strict=True)]
    del exact
    for direction, calls in (("forward", forward), ("backward", backward)):
        for name, times in time_interleaved(calls, w.device, seconds).items():
            is_backward = direction == "backward"
            result = Result(w.name, name, direction, flops=w.flops(is_backward), bytes=w.bytes(is_backward))
            results.append(fill(result, times, ceilings))
    for result in results:
        result.facts = {"dropout": w.dropout, "tokens": w.tokens, "segments": len(w.lengths)}
        result.workload += f" dropout {w.dropout}"
    return results


def main(argv: list[str] | None = None) -> int:
    """Prints the table and writes it; the exit code is 1 if this library's own kernel was wrong or failed."""
    parser = arguments("attention", __doc__, quick="one shape and fewer lengths: minutes on a GPU")
    options = parser.parse_args(argv)
    device = torch.empty(0, device=options.device).device
    torch.manual_seed(0)
    facts, ceilings = device_facts(device), measure_ceilings(device)
    if facts["smoke"]:
        print(SMOKE)
    results, label = [], " (CPU smoke test)" if facts["smoke"] else ""
    for w in workloads(device, options.quick):
        part = run(w, ceilings, seconds=0.02 if facts["smoke"] else 0.1 if options.quick else 0.3)
        print(table(part), flush=True)
        results += part
        if options.out:
            data = {"facts": facts, "ceilings": asdict(ceilings), "results": [asdict(x) for x in results]}
            panels = tflops_panels(results, lambda x: f"{x.direction}, dropout {x.facts['dropout']}" + label)
            write(options.out, "attention", data, f"{headline(facts)}\n\n{table(results)}", lambda p=panels: bars(p))
    return int(any(x.provider == "l2v" and x.median is None for x in results))


if __name__ == "__main__":
    sys.exit(main())
