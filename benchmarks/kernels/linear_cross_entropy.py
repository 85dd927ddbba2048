"""Cross-entropy of a frozen head against its peers: time of loss and gradient together, peak memory, error.

l2v bench linear_cross_entropy [--quick] [--shape L V E] [--dtype bf16|fp32] [--out FOLDER]

On a CPU it runs tiny sizes, as a smoke test of itself, and says so in everything it writes; --shape runs a size of yours.
"""

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from benchmarks.harness import (
    SMOKE,
    Ceilings,
    Result,
    Target,
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
    table,
    targets_table,
    tflops_panels,
    time_interleaved,
    write,
)
from l2v_kernels import linear_cross_entropy

Step = Callable[[torch.Tensor], tuple[torch.Tensor | None, torch.Tensor]]
"""hidden_LE -> (loss, its gradient of hidden)."""

STEP = "forward+backward"
LLAMA = (3277, 128256, 4096)
"""A fifth of 16,384 tokens, Llama-3-8B's head."""
SIZES = (LLAMA, (8192, 131072, 4096), (16384, 128256, 4096), (3277, 151936, 896), (3277, 49152, 576))
QUICK = SIZES[:2]
HEAD_OF_A_STEP = 0.02 * 780
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
        """Two products: logits, and the gradient of hidden. The head is frozen, so there is no third."""
        return 4.0 * self.n * self.v * self.e

    @property
    def bytes(self) -> float:
        """The weight read by both products, hidden and its gradient."""
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


def _step(loss_of) -> Step:
    def step(hidden):
        loss = loss_of(hidden)
        return loss.detach(), torch.autograd.grad(loss, hidden)[0]

    return step


def l2v(w: Workload, weight, labels) -> Step:
    return _step(lambda hidden: linear_cross_entropy(hidden, weight, labels, count=1)[0])


def _logits(weight, labels):
    return lambda hidden: F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


def torch_logits(w: Workload, weight, labels) -> Step:
    """As everyone writes it: logits in the model's dtype, cross-entropy in fp32."""
    return _step(_logits(weight, labels))


def torch_compiled(w: Workload, weight, labels) -> Step:
    if w.device.type != "cuda":
        raise Unavailable("compiling for a CPU takes longer than all the rest")
    # Sizes are compiled one by one, and after eight of them it would quietly stop compiling.
    torch.compiler.reset()
    return _step(torch.compile(_logits(weight, labels), dynamic=False))


def torch_chunked(w: Workload, weight, labels) -> Step:
    """PyTorch's own, in chunks of its own choice, its gradient made in the forward as well."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unavailable("needs torch 2.13")
    options = torch.nn.LinearCrossEntropyOptions()
    return _step(lambda hidden: F.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options))


def liger(w: Workload, weight, labels) -> Step:
    """Liger-Kernel (Hsu et al. 2024, arXiv 2410.10989)."""
    _needs_gpu(w, "liger_kernel", "liger-kernel")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return _step(lambda hidden: loss(weight, hidden, labels))


def cut_cross_entropy(w: Workload, weight, labels) -> Step:
    """Cut cross-entropy (Wijmans et al. 2024, arXiv 2411.09009), as it comes: it leaves out gradients below bf16's epsilon."""
    _needs_gpu(w, "cut_cross_entropy", "cut-cross-entropy")
    from cut_cross_entropy import linear_cross_entropy as cut

    return _step(lambda hidden: cut(hidden, weight, labels, reduction="sum"))


def _needs_gpu(w, module, package):
    if w.device.type != "cuda":
        raise Unavailable("CUDA only")
    if importlib.util.find_spec(module) is None:
        raise Unavailable(f"{package} is not installed")


def bare_products(w: Workload, weight, labels) -> Step:
    """Only the two products, by the library, a chunk at a time: no loss comes out of it."""
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
BARE = bare_products.__name__


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
    """Relative error of the gradient. Errors: ValueError if it is more than logits in the model's dtype explain."""
    error = float((step(hidden)[1].to(exact.dtype) - exact).norm() / exact.norm())
    if not error < (3e-2 if w.dtype == torch.bfloat16 else 1e-4):
        raise ValueError(f"wrong gradient: relative error {error:.1e}")
    return error


def run(w: Workload, ceilings: Ceilings, seconds: float, rounds: int = 5) -> list[Result]:
    """All providers on one workload, on one head."""
    weight, labels = w.head()
    sets = [w.hidden() for _ in range(sets_beyond_cache(w.bytes, w.device))]
    exact, results, calls = exact_gradient(w, weight, labels, sets[0]), [], {}
    facts = {"n": w.n, "v": w.v, "e": w.e, "logits_s": w.bytes_of_logits / ceilings.bandwidth}
    for provider in (bare_products, *PROVIDERS):
        result = Result(w.name, provider.__name__, STEP, flops=w.flops, bytes=w.bytes, facts=dict(facts))
        results.append(result)
        try:
            step = provider(w, weight, labels)
            if provider is not bare_products:
                result.error = error_of(w, step, sets[0], exact)
                result.memory = peak_memory(lambda s=step: s(sets[0]), w.device)
            calls[result.provider] = [lambda x=x, s=step: s(x) for x in sets]
        except Exception as error:  # whatever another library raises is its result
            result.skipped = reason(error)
            result.facts["failed"] = not isinstance(error, Unavailable)
        release(w.device)
    del exact
    found = time_interleaved(calls, w.device, seconds, rounds)
    for result in results:
        if result.provider in found:
            fill(result, found[result.provider], ceilings)
    return results


def by_workload(results: list[Result]) -> dict[str, dict[str, Result]]:
    out: dict[str, dict[str, Result]] = {}
    for x in results:
        out.setdefault(x.workload, {})[x.provider] = x
    return out


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
        Target(f"a fiftieth of a step of 16,384 tokens (H200), {name}", HEAD_OF_A_STEP, time, unit="ms"),
        Target(f"peak memory beyond the inputs, {name}: workspace + 2 gradients", limit / 2**20, memory, unit="MiB"),
        Target("time of the fastest of torch's / time", 1.0, worst(*(p for p in PEERS if "torch" in p)), at_least=True),
        Target("time of liger / time", 1.0, worst("liger"), at_least=True),
        Target("time of cut-cross-entropy / time", 1.0, worst("cut_cross_entropy"), at_least=True),
    ]


def comparison(results: list[Result]) -> str:
    """Markdown, a row a workload: the op against its floors, and the peers' times over the op's."""
    rows = []
    for workload, found in by_workload(results).items():
        ours, bare = found["l2v"].median, found[BARE].median
        logits = found["l2v"].facts["logits_s"]
        row = [workload, f"{bare * 1e6:.0f}" if bare else "", f"{logits * 1e6:.0f}"]
        row += [f"{ours / bare:.2f}", f"{ours / (bare + logits):.2f}"] if ours and bare else ["", ""]
        for peer in (found[p] for p in PEERS):
            absent = "" if peer.skipped.startswith("Unavailable") else peer.skipped
            row.append(f"{peer.median / ours:.2f}" if ours and peer.median else absent)
        rows.append(row)
    head = ["workload", "bare us", "logits us", "l2v / bare", "l2v / (bare + logits)"]
    return markdown(head + [f"{p} / l2v" for p in PEERS], rows)


def report(results: list[Result], found: list[Target], facts: dict) -> str:
    """The Markdown page."""
    return (
        f"{headline(facts)}\n\n## Targets\n\n{targets_table(found)}\n\n## Ratios\n\n"
        "Labels x vocabulary x hidden size. `bare us`: the two matrix products alone, timed in turns with the rest; `logits "
        "us`: what fp32 logits move through memory, at the bandwidth of a large copy. A peer's ratio above 1: it is slower. "
        f"Liger's and torch's peers make no gradient of the weight either: it needs none.\n\n{comparison(results)}\n\n## All"
        f"\n\n{table(results)}"
    )


def main(argv: list[str] | None = None) -> int:
    """Prints the tables and writes them; the exit code is 1 if this library was wrong or failed."""
    parser = arguments("linear_cross_entropy", __doc__, quick="two sizes: a minute on a GPU")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("L", "V", "E"), help="this size only, also on a CPU")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="of --shape (default: bf16 on a GPU, fp32 on a CPU)")
    options = parser.parse_args(argv)
    device = torch.empty(0, device=options.device).device
    torch.manual_seed(0)
    facts, ceilings = device_facts(device), measure_ceilings(device)
    for name in ("liger-kernel", "cut-cross-entropy"):
        facts[name] = importlib.metadata.version(name) if importlib.util.find_spec(name.replace("-", "_")) else None
    if facts["smoke"]:
        print(SMOKE)
    chosen = workloads(device, options.quick)
    if options.shape:
        default = "fp32" if facts["smoke"] else "bf16"
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype or default]
        chosen = [Workload(*options.shape, device, dtype)]
    seconds = 0.02 if facts["smoke"] else 0.2 if options.quick else 0.5
    results: list[Result] = []
    for w in chosen:
        new = run(w, ceilings, seconds, rounds=3 if options.quick else 7)
        results += new
        release(device)
        print(table(new), flush=True)
        if options.out:
            # After each size, so that what was measured is kept if the time runs out.
            found = targets(results, facts["smoke"])
            data = {"facts": facts, "ceilings": asdict(ceilings), "targets": [x.row() for x in found]}
            data["results"] = [asdict(x) for x in results]
            label = " (CPU smoke test)" if facts["smoke"] else ""
            drawn = tflops_panels(results, lambda x, end=label: f"loss and gradient{end}")
            text = report(results, found, facts)
            write(options.out, "linear_cross_entropy", data, text, lambda d=drawn: bars(d))
    print(targets_table(targets(results, facts["smoke"])))
    return int(any(x.median is None and x.facts.get("failed", True) for x in results if x.provider == "l2v"))


if __name__ == "__main__":
    sys.exit(main())
