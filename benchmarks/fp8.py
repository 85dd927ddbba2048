"""FP8: quantising rows, and products of a frozen base with their quantising, against bf16 and what plain PyTorch does.

python -m benchmarks.fp8 [--quick] [--out FOLDER]

On a CPU it runs tiny sizes and emulated products, as a smoke test of itself, and says so in everything it writes.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

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
    measure_ceilings,
    peak_memory,
    reason,
    release,
    sets_beyond_cache,
    table,
    tflops_panels,
    time_interleaved,
    write,
)
from l2v_kernels.fp8 import Fp8Linears, Fp8Weight, obstacle, quantize_rows
from l2v_kernels.fp8.matmul import scaled_matmul
from l2v_kernels.fp8.reference import quantize_rows_reference

TOKENS = 16384
LAYER = {"qkv": (6144, 4096), "o": (4096, 4096), "gate, up": (28672, 4096), "down": (4096, 14336)}
"""[outputs, inputs] of the products of a Llama-3-8B layer."""
BARS = {"bf16": 1e-2}
"""Relative error of a product, against fp32; FP8's is several per cent, and much less would not be FP8's."""
FP8_ERROR = (1e-2, 6e-2)


@dataclass(frozen=True)
class Workload:
    """direction: quantise, forward or gradient. T tokens, contracted over K, N results; quantise: rows of K, by factors if
    they are output gradients."""

    name: str
    direction: str
    T: int
    N: int
    K: int
    device: torch.device

    def inputs(self) -> torch.Tensor:
        """[T, K] bf16."""
        return torch.randn(self.T, self.K, device=self.device).bfloat16()


def workloads(device: torch.device, quick: bool) -> list[Workload]:
    """Every product of a layer at 16k tokens on a GPU, small ones on a CPU; quick: the two largest."""
    smoke = device.type != "cuda"
    found = []
    for name, (outputs, inputs) in LAYER.items():
        if quick and name not in ("gate, up", "down"):
            continue
        T, N, K = (32, outputs // 128, inputs // 128) if smoke else (TOKENS, outputs, inputs)
        found += [Workload(name, "forward", T, N, K, device), Workload(name, "gradient", T, K, N, device)]
        found += [
            Workload(f"{name}, x", "quantise", T, 0, K, device),
            Workload(f"{name}, dy", "quantise", T, 0, N, device),
        ]
    return found


def quantisers(w: Workload) -> dict[str, Callable]:
    """Providers of q and scales; gradients are multiplied by the weight's scales in the same pass."""
    factors_K = torch.exp2(torch.randint(-12, -4, (w.K,), device=w.device).float()) if w.name.endswith("dy") else None

    def of(quantise):
        return lambda: lambda x: quantise(x, factors_K)

    def compiled():
        if w.device.type != "cuda":
            raise Unavailable("compiled for a GPU only")
        return of(torch.compile(quantize_rows_reference, dynamic=False))()

    return {"l2v": of(quantize_rows), "eager": of(quantize_rows_reference), "compiled": compiled}


def products(w: Workload) -> dict[str, Callable]:
    """Providers of a product from bf16 to bf16."""
    wide_NK = torch.randn(w.N, w.K, device=w.device) * w.K**-0.5
    emulate = obstacle(w.device) is not None
    # The layer's weight has the contracted side of the forward along its rows, that of the gradient along its columns.
    own = wide_NK if w.direction == "forward" else wide_NK.t().contiguous()
    weight = Fp8Weight.of([own.bfloat16()])
    linears, plain = Fp8Linears(weight, [len(own)], emulate=emulate), own.bfloat16()
    forward = w.direction == "forward"
    rows, scale_N = (weight.rows_OE, weight.scale_O) if forward else (weight.columns_EO, None)

    def apart(quantise):
        def go(x):
            q, scale = quantise(x, None if forward else weight.scale_O)
            return scaled_matmul(q, scale, rows, scale_N, None, x.dtype, emulate=emulate)

        return go

    found = {
        "l2v": linears.matmul if forward else linears.input_gradient,
        "eager quantise": apart(quantize_rows_reference),
        "bf16": (lambda x: x @ plain.t()) if forward else (lambda x: x @ plain),
    }
    made = {name: (lambda go=go: go) for name, go in found.items()}
    made["product alone"] = lambda: _alone(rows, scale_N, weight, forward=forward, emulate=emulate)
    return made | {"exact": lambda: lambda x: x.float() @ wide_NK.bfloat16().float().t()}


def _alone(rows, scale_N, weight, *, forward: bool, emulate: bool) -> Callable:
    """The product of rows that are FP8 already: what no quantising can beat."""
    kept = {}

    def go(x):
        if x.data_ptr() not in kept:
            kept[x.data_ptr()] = quantize_rows(x, None if forward else weight.scale_O)
        return scaled_matmul(*kept[x.data_ptr()], rows, scale_N, None, torch.bfloat16, emulate=emulate)

    return go


def check(w: Workload, name: str, got, x: torch.Tensor, exact: Callable | None) -> float | None:
    """The error of a result. Errors: ValueError if it is not what this provider's should be."""
    if w.direction == "quantise":
        return None
    want = exact(x)
    error = float((got.float() - want).norm() / want.norm())
    low, high = (0.0, BARS[name]) if name in BARS else FP8_ERROR
    if not low <= error <= high:
        raise ValueError(f"wrong results: relative error {error:.1e}")
    return error


def run(w: Workload, ceilings: Ceilings, seconds: float) -> list[Result]:
    """All providers on one workload."""
    quantise = w.direction == "quantise"
    nbytes = 3.0 * w.T * w.K if quantise else 0.0
    sets = [w.inputs() for _ in range(sets_beyond_cache(2 * w.T * w.K, w.device, least=2))]
    providers = quantisers(w) if quantise else products(w)
    exact = None if quantise else providers.pop("exact")()
    results, calls = [], {}
    for name, make in providers.items():
        result = Result(w.name, name, w.direction, flops=2.0 * w.T * w.N * w.K, bytes=nbytes)
        results.append(result)
        try:
            go = make()
            got = go(sets[0])
            result.error = check(w, name, got, sets[0], exact)
            result.memory = peak_memory(lambda go=go: go(sets[0]), w.device)
        except Exception as failure:  # whatever another library raises is its result
            result.skipped = reason(failure)
            release(w.device)
            continue
        calls[name] = [lambda x=x, go=go: go(x) for x in sets]
    times = time_interleaved(calls, w.device, seconds) if calls else {}
    for result in results:
        if result.provider in times:
            fill(result, times[result.provider], ceilings)
            if quantise:
                result.roofline = nbytes / ceilings.bandwidth / result.median
    return results


def main(argv: list[str] | None = None) -> int:
    """Prints the table and writes it; the exit code is 1 if this library's own kernel was wrong or failed."""
    options = arguments("fp8", __doc__, quick="the two largest products: a minute on a GPU").parse_args(argv)
    device = torch.empty(0, device=options.device).device
    torch.manual_seed(0)
    facts, ceilings = device_facts(device), measure_ceilings(device)
    if facts["smoke"]:
        print(SMOKE)
    elif obstacle(device):
        print(f"FP8 products are emulated: {obstacle(device)}")
    facts["emulated"] = obstacle(device) is not None
    results, label = [], " (CPU smoke test)" if facts["smoke"] else ""
    for w in workloads(device, options.quick):
        part = run(w, ceilings, seconds=0.02 if facts["smoke"] else 0.1 if options.quick else 0.3)
        print(table(part), flush=True)
        results += part
        if options.out:
            data = {"facts": facts, "ceilings": asdict(ceilings), "results": [asdict(x) for x in results]}
            emulated = "Products are EMULATED: their times are not FP8's.\n\n" if facts["emulated"] else ""
            note = "The roofline of a product is that of bf16, measured here; of quantising, the copy rate."
            text = f"{headline(facts)}\n\n{emulated}{note}\n\n{table(results)}"
            shown = tflops_panels([x for x in results if x.flops], lambda x: x.direction + label)
            write(options.out, "fp8", data, text, lambda p=shown: bars(p))
    return int(any(x.provider == "l2v" and x.median is None for x in results))


if __name__ == "__main__":
    sys.exit(main())
