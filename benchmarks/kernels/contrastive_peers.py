"""The providers of in-batch InfoNCE: this library and what else can do the work. Each is a function of a Workload that
returns a step, from (q_NE, k_ME) to (loss, dq_NE, dk_ME), or raises Unavailable with the reason."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.harness import Unavailable, compiled, need_cuda, need_package
from benchmarks.kernels.losses import loss_step
from l2v_kernels import info_nce
from l2v_kernels.info_nce import WORKSPACE
from l2v_kernels.info_nce.paths import Chunked

Step = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Workload:
    """Sizes of one measurement. Candidate n is query n's positive; all beyond N are hard negatives."""

    n: int
    m: int
    e: int
    device: torch.device
    dtype: torch.dtype
    scale: float = 20.0

    @property
    def name(self) -> str:
        return f"{self.n} x {self.m} x {self.e}"

    @property
    def itemsize(self) -> int:
        return torch.finfo(self.dtype).bits // 8

    @property
    def matmuls(self) -> int:
        """Three where the scores are computed once: all of them, or those of enough rows with all candidates, fit the op's
        default workspace. Else four."""
        rows = WORKSPACE * 3 // 4 // ((4 + self.itemsize) * self.m)
        return 3 if rows >= min(self.n, Chunked.min_rows) else 4

    @property
    def flops(self) -> float:
        """Of that many matmuls, forward and backward together."""
        return 2.0 * self.matmuls * self.n * self.m * self.e

    @property
    def bytes_of_inputs(self) -> int:
        """Of the embeddings; their gradients take as many."""
        return (self.n + self.m) * self.e * self.itemsize

    @property
    def bytes_of_scores(self) -> float:
        """What passes through memory if fp32 scores do, a chunk at a time: about 22 bytes a score. Written once and read
        once forward; written, read, and made a half-precision coefficient that two matmuls read, backward."""
        return 22.0 * self.n * self.m

    @property
    def rows_of_a_chunk(self) -> int:
        """Rows whose fp32 scores fit the op's default workspace: what the chunked peers get as well."""
        return max(1, min(self.n, WORKSPACE // (4 * self.m)))

    def targets_N(self) -> torch.Tensor:
        return torch.arange(self.n, device=self.device)

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(q_NE, k_ME), random, with the positives at a cosine where they get about half of the probability."""
        q, k = (torch.randn(rows, self.e, device=self.device) for rows in (self.n, self.m))
        cosine = min(0.9, math.log(self.m) / self.scale)
        k[: self.n] = cosine * q + (1 - cosine**2) ** 0.5 * k[: self.n]
        return tuple(x.to(self.dtype).requires_grad_() for x in (q, k))


def spans(total: int, step: int) -> Iterator[slice]:
    """Slices of at most `step` that cover `total`."""
    return (slice(begin, min(begin + step, total)) for begin in range(0, total, step))


def _l2v(w, variant):
    targets = w.targets_N()
    return loss_step(lambda q, k: info_nce(q, k, targets, scale=w.scale, variant=variant))


def l2v(w: Workload) -> Step:
    """As a user gets it: the op chooses its variant."""
    return _l2v(w, None)


def l2v_chunked(w: Workload) -> Step:
    return _l2v(w, "chunked")


def l2v_fused(w: Workload) -> Step:
    need_cuda(w.device)
    return _l2v(w, "fused")


def _naive(w):
    targets, scale = w.targets_N(), w.scale
    return lambda q, k: F.cross_entropy(scale * (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).T), targets)


def torch_naive(w: Workload) -> Step:
    """As everyone writes it; its scores have the embeddings' dtype."""
    return loss_step(_naive(w))


def torch_compiled(w: Workload) -> Step:
    return loss_step(compiled(_naive(w), w.device))


def torch_chunked(w: Workload) -> Step:
    """A chunk of rows at a time, fp32 scores, recomputed in the backward."""
    targets = w.targets_N()
    return loss_step(
        lambda q, k: _Chunked.apply(
            F.normalize(q, dim=-1), F.normalize(k, dim=-1), targets, w.scale, w.rows_of_a_chunk, False
        )
    )


def torch_one_pass(w: Workload) -> Step:
    """The same, with the gradients made in the forward while the scores exist: three matmuls, but a loss that can
    only be scaled afterwards, and fp32 gradients that exist from the forward on."""
    targets = w.targets_N()
    return loss_step(
        lambda q, k: _Chunked.apply(
            F.normalize(q, dim=-1), F.normalize(k, dim=-1), targets, w.scale, w.rows_of_a_chunk, True
        )
    )


class _Chunked(torch.autograd.Function):
    """Mean cross-entropy of scale * u v^T over chunks of rows."""

    @staticmethod
    def forward(ctx, u_NE, v_ME, targets_N, scale, rows, one_pass):
        loss, gradients = u_NE.new_zeros((), dtype=_wide(u_NE)), None
        lse_N = torch.empty(len(u_NE), dtype=_wide(u_NE), device=u_NE.device)
        if one_pass:
            gradients = _Gradients(u_NE, v_ME)
        for at in spans(len(u_NE), rows):
            scores = _matmul(u_NE[at], v_ME.T).mul_(scale)
            lse_N[at] = scores.logsumexp(1)
            loss += (lse_N[at] - scores.gather(1, targets_N[at, None])[:, 0]).sum()
            if one_pass:
                gradients.add(at, scores, lse_N, targets_N, scale / len(u_NE))
        ctx.save_for_backward(u_NE, v_ME, targets_N, lse_N)
        ctx.settings, ctx.gradients = (scale, rows), gradients
        return loss / len(u_NE)

    @staticmethod
    def backward(ctx, gradient):
        u_NE, v_ME, targets_N, lse_N = ctx.saved_tensors
        (scale, rows), found = ctx.settings, ctx.gradients
        if found is None:
            found = _Gradients(u_NE, v_ME)
            for at in spans(len(u_NE), rows):
                scores = _matmul(u_NE[at], v_ME.T).mul_(scale)
                found.add(at, scores, lse_N, targets_N, scale / len(u_NE))
        du_NE, dv_ME = (x.mul_(gradient).to(u_NE.dtype) for x in (found.du_NE, found.dv_ME))
        return du_NE, dv_ME, None, None, None, None


class _Gradients:
    def __init__(self, u_NE, v_ME):
        self.u_NE, self.v_ME = u_NE, v_ME
        self.du_NE = torch.empty(u_NE.shape, dtype=_wide(u_NE), device=u_NE.device)
        self.dv_ME = torch.zeros(v_ME.shape, dtype=_wide(u_NE), device=u_NE.device)

    def add(self, at, scores, lse_N, targets_N, factor):
        """Of one chunk; overwrites its scores."""
        coefficients = scores.sub_(lse_N[at, None]).exp_()
        rows = torch.arange(len(coefficients), device=coefficients.device)
        coefficients[rows, targets_N[at]] -= 1
        coefficients = coefficients.mul_(factor).to(self.u_NE.dtype)
        self.du_NE[at] = _matmul(coefficients, self.v_ME)
        self.dv_ME += _matmul(coefficients.T, self.u_NE[at])


def _wide(x):
    return torch.promote_types(x.dtype, torch.float32)


def _matmul(a, b):
    """a b in fp32 at least."""
    if a.is_cuda and a.dtype != _wide(a):
        return torch.mm(a, b, out_dtype=_wide(a))
    return a.to(_wide(a)) @ b.to(_wide(a))


def sentence_transformers_cached(w: Workload) -> Step:
    """The head of CachedMultipleNegativesRankingLoss: its own loss over embeddings, backward chunk by chunk."""
    need_package("sentence_transformers", "sentence-transformers")
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss

    # It looks into the model's first module, and the head never calls it.
    model = torch.nn.Sequential(torch.nn.Identity())
    head = CachedMultipleNegativesRankingLoss(model, scale=w.scale, mini_batch_size=w.rows_of_a_chunk)

    def step(q, k):
        columns = [x.detach().requires_grad_() for x in (q, *k.split(w.n))]
        # Its similarity widens bf16; a trainer with bf16=True runs it under autocast, which makes the matmul bf16 again.
        with torch.autocast(w.device.type, w.dtype, enabled=w.dtype == torch.bfloat16):
            loss = head.calculate_loss([[x] for x in columns], with_backward=True)
        return loss, columns[0].grad, torch.cat([x.grad for x in columns[1:]])

    return step


def inf_cl(w: Workload) -> Step:
    """Inf-CL (Cheng et al. 2024, arXiv 2410.17243) on one GPU, on embeddings normalised outside, as its authors use it."""
    need_cuda(w.device)
    need_package("inf_cl", "inf-cl")
    from inf_cl import cal_flash_loss

    # It cuts the embeddings into pieces of one width; 256 is its own choice.
    width = next((x for x in (256, 128, 64) if w.e % x == 0), None)
    if width is None:
        raise Unavailable(f"cuts embeddings into pieces of 64 to 256, and {w.e} is no multiple")
    targets, scale = w.targets_N(), torch.tensor(w.scale, device=w.device)

    def loss_of(q, k):
        return cal_flash_loss(F.normalize(q, dim=-1), F.normalize(k, dim=-1), targets, scale, width).mean()

    return loss_step(loss_of)


def memeff(w: Workload) -> Step:
    """memeff (Kindulov): Triton kernels whose gradients are accumulated in fp32, with its InfoNCE of query to document."""
    need_cuda(w.device)
    need_package("memeff", "memeff")
    from memeff import MemoryEfficientQwen3Loss

    if w.n != w.m:
        raise Unavailable("gives every query hard negatives of its own, which no other sees")
    return loss_step(MemoryEfficientQwen3Loss(**memeff_options(w.scale)))


def memeff_options(scale: float) -> dict[str, Any]:
    """Plain InfoNCE: no false negatives are masked (cosines are below the margin), and gradients are the loss's own."""
    return {"temperature": 1 / scale, "margin": 4.0, "stable": False}


def memeff_matryoshka(w: Workload, prefixes: Sequence[int]) -> Callable[..., torch.Tensor]:
    """A loss summed over prefixes, in one pass over the scores."""
    need_cuda(w.device)
    need_package("memeff", "memeff")
    from memeff import MemoryEfficientMatryoshkaQwen3Loss

    return MemoryEfficientMatryoshkaQwen3Loss(dims=tuple(prefixes), **memeff_options(w.scale))


def bare_matmuls(w: Workload) -> Step:
    """Only the matmuls of a step, by torch, chunk by chunk: no loss is computed."""
    rows = max(1, min(w.n, (2 << 30) // (w.m * w.itemsize)))
    scores = torch.empty(rows, w.m, device=w.device, dtype=w.dtype)
    dq, dk = (torch.empty(n, w.e, device=w.device, dtype=w.dtype) for n in (w.n, w.m))

    @torch.no_grad()
    def step(q, k):
        for at in spans(w.n, rows):
            out = scores[: at.stop - at.start]
            for _ in range(w.matmuls - 2):
                torch.mm(q[at], k.T, out=out)
            torch.mm(out, k, out=dq[at])
            torch.mm(out.T, q[at], out=dk)
        return None, dq, dk

    return step


PROVIDERS = (
    l2v,
    l2v_chunked,
    l2v_fused,
    torch_naive,
    torch_compiled,
    torch_chunked,
    torch_one_pass,
    sentence_transformers_cached,
    inf_cl,
    memeff,
)
