"""Cross-entropy of a frozen head against its peers: time of loss and gradient together, peak memory, error.

l2v bench linear_cross_entropy [--quick] [--shape L V E] [--dtype bf16|fp32] [--out FOLDER]

On a CPU it runs tiny sizes as a smoke test, and labels everything it writes as one; --shape runs a given size instead.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.command import Comparison, Setup
from benchmarks.harness import (
    Ceilings,
    Result,
    Target,
    Unavailable,
    compiled,
    need_cuda,
    need_package,
    sets_beyond_cache,
    time_results,
)
from benchmarks.kernels.losses import STEP, by_workload, loss_step, prepare
from benchmarks.kernels.losses import comparison as ratios
from benchmarks.pages import Panel, headline, table, targets_table, tflops_panels
from l2v_kernels import linear_cross_entropy

Step = Callable[[torch.Tensor], tuple[torch.Tensor | None, torch.Tensor]]
"""hidden_LE -> (loss, its gradient of hidden)."""

LLAMA = (3277, 128256, 4096)
"""A fifth of 16,384 tokens, Llama-3-8B's head."""
SIZES = (LLAMA, (8192, 131072, 4096), (16384, 128256, 4096), (3277, 151936, 896), (3277, 49152, 576))
QUICK = SIZES[:2]
HEAD_MS_LIMIT = 0.02 * 780
"""Milliseconds: a fiftieth of a step of 16,384 tokens at 21,000 tokens a second."""


@dataclass(frozen=True)
class Workload:
    """Sizes of one measurement: labelled positions, vocabulary, hidden size."""

    n: int
    v: int
    e: int
    device: torch.device
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.n} x {self.v} x {self.e}"

    @property
    def flops(self) -> float:
        """Two matmuls: logits, and the gradient of hidden. The head is frozen, so there is no third."""
        return 4.0 * self.n * self.v * self.e

    @property
    def bytes(self) -> float:
        """The weight read by both matmuls, hidden and its gradient."""
        return (2.0 * self.v + 2 * self.n) * self.e * self.dtype.itemsize

    @property
    def bytes_of_logits(self) -> float:
        """What passes through memory if fp32 logits do: written, read twice, then a share written and read."""
        return (12.0 + 2 * self.dtype.itemsize) * self.n * self.v

    def head(self) -> tuple[torch.Tensor, torch.Tensor]:
        """weight_VE and labels_L, the same for all providers."""
        weight = torch.randn(self.v, self.e, device=self.device) * (2 / self.e**0.5)
        return weight.to(self.dtype), torch.randint(self.v, (self.n,), device=self.device)

    def hidden(self) -> torch.Tensor:
        return torch.randn(self.n, self.e, device=self.device).to(self.dtype).requires_grad_()


def workloads(device: torch.device, quick: bool) -> list[Workload]:
    """Heads of language models on a GPU, two toys on a CPU."""
    if device.type != "cuda":
        return [Workload(*sizes, device, torch.float32) for sizes in ((24, 320, 32), (7, 203, 17))]
    return [Workload(*sizes, device, torch.bfloat16) for sizes in (QUICK if quick else SIZES)]


def l2v(w: Workload, weight, labels) -> Step:
    return loss_step(lambda hidden: linear_cross_entropy(hidden, weight, labels, count=1)[0])


def _logits(weight, labels):
    return lambda hidden: F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


def torch_logits(w: Workload, weight, labels) -> Step:
    """As everyone writes it: logits in the model's dtype, cross-entropy in fp32."""
    return loss_step(_logits(weight, labels))


def torch_compiled(w: Workload, weight, labels) -> Step:
    return loss_step(compiled(_logits(weight, labels), w.device))


def torch_chunked(w: Workload, weight, labels) -> Step:
    """PyTorch's own, in chunks that it chooses itself, with the gradient computed in the forward."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unavailable("needs torch 2.13")
    options = torch.nn.LinearCrossEntropyOptions()
    return loss_step(lambda hidden: F.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options))


def liger(w: Workload, weight, labels) -> Step:
    """Liger-Kernel (Hsu et al. 2024, arXiv 2410.10989)."""
    need_cuda(w.device)
    need_package("liger_kernel", "liger-kernel")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return loss_step(lambda hidden: loss(weight, hidden, labels))


def cut_cross_entropy(w: Workload, weight, labels) -> Step:
    """Cut cross-entropy (Wijmans et al. 2024, arXiv 2411.09009), with its defaults: it skips gradients below bf16's epsilon."""
    need_cuda(w.device)
    need_package("cut_cross_entropy", "cut-cross-entropy")
    from cut_cross_entropy import linear_cross_entropy as cut

    return loss_step(lambda hidden: cut(hidden, weight, labels, reduction="sum"))


def bare_matmuls(w: Workload, weight, labels) -> Step:
    """Only the two matmuls, by torch, a chunk at a time: no loss is computed."""
    rows = min(w.n, 1024)
    logits = torch.empty(rows, w.v, device=w.device, dtype=w.dtype)
    gradient = torch.empty(w.n, w.e, device=w.device, dtype=w.dtype)

    @torch.no_grad()
    def step(hidden):
        for begin in range(0, w.n, rows):
            at = slice(begin, min(begin + rows, w.n))
            out = logits[: at.stop - begin]
            torch.mm(hidden[at], weight.T, out=out)
            torch.mm(out, weight, out=gradient[at])
        return None, gradient

    return step


PROVIDERS = (l2v, torch_logits, torch_compiled, torch_chunked, liger, cut_cross_entropy)
PEERS = tuple(p.__name__ for p in PROVIDERS[1:])


@torch.no_grad()
def exact_gradient(w: Workload, weight, labels, hidden) -> torch.Tensor:
    """[L, E] by the definition, 512 rows at a time: in float64 on a CPU, in float32 on a GPU."""
    dtype = torch.float32 if w.device.type == "cuda" else torch.float64
    wide, out = weight.to(dtype), torch.empty(w.n, w.e, device=w.device, dtype=dtype)
    for begin in range(0, w.n, 512):
        at = slice(begin, begin + 512)
        shares = (hidden[at].to(dtype) @ wide.T).softmax(1)
        shares[torch.arange(len(shares), device=w.device), labels[at]] -= 1
        out[at] = shares @ wide
    return out


def error_of(w: Workload, step: Step, hidden, exact) -> float:
    """Relative error of the gradient. Raises: ValueError if it is more than logits in the model's dtype explain."""
    error = float((step(hidden)[1].to(exact.dtype) - exact).norm() / exact.norm())
    if not error < (3e-2 if w.dtype == torch.bfloat16 else 1e-4):
        raise ValueError(f"wrong gradient: relative error {error:.1e}")
    return error


def checked(w: Workload, weight, labels, hidden) -> Callable[[Step], float]:
    """`error_of`, with the exact gradient computed once."""
    exact = exact_gradient(w, weight, labels, hidden)
    return lambda step: error_of(w, step, hidden, exact)


def run(w: Workload, ceilings: Ceilings, seconds: float, rounds: int = 5) -> list[Result]:
    """All providers on one workload, on one head."""
    weight, labels = w.head()
    sets = [(w.hidden(),) for _ in range(sets_beyond_cache(w.bytes, w.device))]
    facts = {"n": w.n, "v": w.v, "e": w.e, "logits_s": w.bytes_of_logits / ceilings.bandwidth}
    providers = {p.__name__: p for p in (bare_matmuls, *PROVIDERS)}
    results = [Result(w.name, name, STEP, flops=w.flops, bytes=w.bytes, facts=dict(facts)) for name in providers]
    calls = prepare(
        results,
        lambda name: providers[name](w, weight, labels),
        checked(w, weight, labels, *sets[0]),
        sets,
        w.device,
    )
    time_results(results, calls, w.device, ceilings, seconds, rounds)
    return results


def targets(results: list[Result], smoke: bool) -> list[Target]:
    """What the op has to reach, computed from what was measured."""
    found = {} if smoke else by_workload(results)
    name = " x ".join(map(str, LLAMA))
    head = found.get(name, {}).get("l2v")
    time = head.median * 1e3 if head and head.median else None
    memory = head.memory / 2**20 if head and head.memory is not None else None
    limit = (768 << 20) + 2 * LLAMA[0] * LLAMA[2] * 2

    def worst(*peers: str) -> float | None:
        pairs = [(x["l2v"].median, x[p].median) for x in found.values() for p in peers]
        return min((peer / ours for ours, peer in pairs if ours and peer), default=None)

    return [
        Target(f"a fiftieth of a step of 16,384 tokens (H200), {name}", HEAD_MS_LIMIT, time, unit="ms"),
        Target(f"peak memory beyond the inputs, {name}: workspace + 2 gradients", limit / 2**20, memory, unit="MiB"),
        Target("time of the fastest of torch's / time", 1.0, worst(*(p for p in PEERS if "torch" in p)), at_least=True),
        Target("time of liger / time", 1.0, worst("liger"), at_least=True),
        Target("time of cut-cross-entropy / time", 1.0, worst("cut_cross_entropy"), at_least=True),
    ]


def comparison(results: list[Result]) -> str:
    """Markdown, a row a workload."""
    return ratios(results, PEERS, "logits")


def report(results: list[Result], found: list[Target], facts: dict) -> str:
    """The Markdown page."""
    return (
        f"{headline(facts)}\n\n## Targets\n\n{targets_table(found)}\n\n## Ratios\n\n"
        "Labels x vocabulary x hidden size. `bare us`: the two matmuls alone, timed in turns with the rest; `logits "
        "us`: what fp32 logits move through memory, at the bandwidth of a large copy. A peer's ratio above 1: it is slower. "
        f"Liger's and torch's peers make no gradient of the weight either: it needs none.\n\n{comparison(results)}\n\n## All"
        f"\n\n{table(results)}"
    )


def panels(results: list[Result], label: str) -> list[Panel]:
    """TFLOP/s."""
    return tflops_panels(results, lambda x: f"loss and gradient{label}")


def parts(setup: Setup) -> Iterator[Callable[[], list[Result]]]:
    """A call for each workload."""
    chosen, shape = workloads(setup.device, setup.quick), setup.options.shape
    if shape:
        default = "fp32" if setup.smoke else "bf16"
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[setup.options.dtype or default]
        chosen = [Workload(*shape, setup.device, dtype)]
    seconds, rounds = setup.seconds(quick=0.2, full=0.5), 3 if setup.quick else 7
    for w in chosen:
        yield lambda w=w: run(w, setup.ceilings, seconds, rounds)


BENCHMARK = Comparison(
    name="linear_cross_entropy",
    doc=__doc__,
    quick="two sizes: a minute on a GPU",
    options={
        "--shape": {"type": int, "nargs": 3, "metavar": ("L", "V", "E"), "help": "this size only, also on a CPU"},
        "--dtype": {"choices": ("bf16", "fp32"), "help": "of --shape (default: bf16 on a GPU, fp32 on a CPU)"},
    },
    parts=parts,
    targets=targets,
    page=report,
    panels=panels,
    packages=("liger-kernel", "cut-cross-entropy"),
)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
