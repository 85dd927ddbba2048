"""FP8: quantising rows, and matmuls of a frozen base with their quantising, against bf16 and what plain PyTorch does.

l2v bench fp8 [--quick] [--out FOLDER]

On a CPU it runs tiny sizes and emulated matmuls as a smoke test, and labels everything it writes as one.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks.command import Comparison, Setup
from benchmarks.harness import (
    Ceilings,
    Result,
    Target,
    attempt,
    compiled,
    peak_memory,
    release,
    sets_beyond_cache,
    time_results,
)
from benchmarks.pages import Panel, headline, table, tflops_panels
from l2v_kernels.fp8 import Fp8Linears, Fp8Weight, obstacle, quantize_rows
from l2v_kernels.fp8.matmul import scaled_matmul
from l2v_kernels.fp8.reference import quantize_rows_reference

TOKENS = 16384
LAYER = {"qkv": (6144, 4096), "o": (4096, 4096), "gate, up": (28672, 4096), "down": (4096, 14336)}
"""[outputs, inputs] of the matmuls of a Llama-3-8B layer."""
MAX_ERROR = {"bf16": 1e-2}
"""Relative error of a matmul, against fp32. FP8's is a few per cent; one that is much smaller is not FP8's."""
FP8_ERROR_RANGE = (1e-2, 6e-2)


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
    """Every matmul of a layer at 16k tokens on a GPU, small ones on a CPU; quick: the two largest."""
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

    return {
        "l2v": of(quantize_rows),
        "eager": of(quantize_rows_reference),
        "compiled": lambda: of(compiled(quantize_rows_reference, w.device))(),
    }


def matmuls(w: Workload) -> dict[str, Callable]:
    """Providers of a matmul from bf16 to bf16."""
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
    made["matmul alone"] = lambda: _alone(rows, scale_N, weight, forward=forward, emulate=emulate)
    return made | {"exact": lambda: lambda x: x.float() @ wide_NK.bfloat16().float().t()}


def _alone(rows, scale_N, weight, *, forward: bool, emulate: bool) -> Callable:
    """The matmul of rows that are FP8 already: a floor for every way of quantising."""
    kept = {}

    def go(x):
        if x.data_ptr() not in kept:
            kept[x.data_ptr()] = quantize_rows(x, None if forward else weight.scale_O)
        return scaled_matmul(*kept[x.data_ptr()], rows, scale_N, None, torch.bfloat16, emulate=emulate)

    return go


def check(w: Workload, name: str, got, x: torch.Tensor, exact: Callable | None) -> float | None:
    """The error of a result. Raises: ValueError if it is not what this provider's should be."""
    if w.direction == "quantise":
        return None
    want = exact(x)
    error = float((got.float() - want).norm() / want.norm())
    low, high = (0.0, MAX_ERROR[name]) if name in MAX_ERROR else FP8_ERROR_RANGE
    if not low <= error <= high:
        raise ValueError(f"wrong results: relative error {error:.1e}")
    return error


def run(w: Workload, ceilings: Ceilings, seconds: float) -> list[Result]:
    """All providers on one workload."""
    quantise = w.direction == "quantise"
    nbytes = 3.0 * w.T * w.K if quantise else 0.0
    sets = [w.inputs() for _ in range(sets_beyond_cache(2 * w.T * w.K, w.device, least=2))]
    providers = quantisers(w) if quantise else matmuls(w)
    exact = None if quantise else providers.pop("exact")()
    results, calls = [], {}
    for name, make in providers.items():
        result = Result(w.name, name, w.direction, flops=2.0 * w.T * w.N * w.K, bytes=nbytes)
        results.append(result)
        with attempt(result):
            go = make()
            got = go(sets[0])
            result.error = check(w, name, got, sets[0], exact)
            result.memory = peak_memory(lambda go=go: go(sets[0]), w.device)
            calls[name] = [lambda x=x, go=go: go(x) for x in sets]
        release(w.device)
    time_results(results, calls, w.device, ceilings, seconds)
    for result in results:
        if quantise and result.median:
            result.roofline = nbytes / ceilings.bandwidth / result.median
    return results


def emulation(device: torch.device) -> dict:
    """Whether the device has no FP8 of its own."""
    return {"emulated": obstacle(device) is not None}


def parts(setup: Setup) -> Iterator[Callable[[], list[Result]]]:
    """A call for each workload."""
    if not setup.smoke and obstacle(setup.device):
        print(f"FP8 matmuls are emulated: {obstacle(setup.device)}")
    seconds = setup.seconds(quick=0.1, full=0.3)
    for w in workloads(setup.device, setup.quick):
        yield lambda w=w: run(w, setup.ceilings, seconds)


def page(results: list[Result], _: list[Target], facts: dict) -> str:
    """The Markdown page."""
    emulated = "Matmuls are EMULATED: their times are not FP8's.\n\n" if facts["emulated"] else ""
    note = "The roofline of a matmul is that of bf16, measured here; of quantising, the copy rate."
    return f"{headline(facts)}\n\n{emulated}{note}\n\n{table(results)}"


def panels(results: list[Result], label: str) -> list[Panel]:
    """TFLOP/s of the matmuls, a panel for each direction."""
    return tflops_panels([x for x in results if x.flops], lambda x: x.direction + label)


BENCHMARK = Comparison(
    name="fp8",
    doc=__doc__,
    quick="the two largest matmuls: a minute on a GPU",
    parts=parts,
    page=page,
    panels=panels,
    facts=emulation,
)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
