"""The providers of the step's memory-bound ops: this library and what else can do the work. Each is a function of a
Workload that returns a callable from its leaves to a tuple of results, or raises Unavailable with the reason."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.harness import Unavailable, need_cuda, need_package
from benchmarks.harness import compiled as compile_for
from l2v_kernels.rms_norm import rms_norm
from l2v_kernels.sandwich_norm import sandwich_norm
from l2v_kernels.segment_pool import segment_pool
from l2v_kernels.swiglu import swiglu

EPS = 1e-6
Step = Callable[..., tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Workload:
    """One op at one size. width: E of a norm and of pooling, D of the heads' norm, F of SwiGLU and GeGLU."""

    op: str
    name: str
    tokens: int
    width: int
    device: torch.device
    dtype: torch.dtype
    heads: int = 1
    lengths: tuple[int, ...] = ()

    def leaves(self) -> tuple[torch.Tensor, ...]:
        """What requires grad: the token states. Weights of norms are frozen, as under LoRA."""
        make = lambda *shape: torch.randn(*shape, device=self.device, dtype=self.dtype)  # noqa: E731
        T, width = self.tokens, self.width
        if self.op == "head_norm":
            # Queries as they are stored in the output of one matmul for q, k and v.
            made = [make(T, 2 * self.heads, width)[:, : self.heads]]
        else:
            shapes = {"rms_norm": [(T, width)] * 2, "sandwich_norm": [(T, width)] * 2, "segment_pool": [(T, width)]}
            shapes |= {"swiglu": [(T, 2 * width)], "geglu": [(T, 2 * width)]}
            made = [make(*shape) for shape in shapes[self.op]]
        return tuple(x.requires_grad_() for x in made)

    def weight(self) -> torch.Tensor:
        """A norm's weight, the same each time."""
        return torch.linspace(0.5, 1.5, self.width, device=self.device).to(self.dtype)

    def cu_seqlens(self) -> torch.Tensor:
        return torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32, device=self.device)

    def token_weights(self) -> torch.Tensor:
        return torch.ones(self.tokens, device=self.device)

    def bytes(self, backward: bool) -> float:
        """Each token state that the definition reads or writes, once; in the backward, gradients and what it needs."""
        states = {
            "rms_norm": (4, 4),  # x, delta -> sum, y; dy, dsum, sum -> dx
            "sandwich_norm": (4, 6),  # delta, residual -> sum, y; dy, dsum, sum, delta -> dresidual, ddelta
            "head_norm": (2, 3),  # x -> y; dy, x -> dx
            "geglu": (3, 5),  # as SwiGLU
            "swiglu": (3, 5),  # gate, up -> y; dy, gate, up -> dgate, dup
            "segment_pool": (1, 2),  # x -> ; x -> dx
        }[self.op][backward]
        itemsize = torch.finfo(self.dtype).bits // 8
        return states * self.tokens * self.heads * self.width * itemsize + len(self.lengths) * self.width * 4


def definition(w: Workload) -> Step:
    """What a model of transformers does, in plain PyTorch; in fp32 and fp64 it is exact but for its own rounding."""
    weight = w.weight()

    def norm(x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return weight.to(x.dtype) * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)

    def add_and_norm(x, delta):
        total = x + delta
        return total, norm(total)

    def norm_add_and_norm(delta, residual):
        total = residual + norm(delta)
        return total, norm(total)

    def gelu_gated(gate_up):
        gate, up = gate_up.chunk(2, -1)
        return (F.gelu(gate, approximate="tanh") * up,)

    def gated(gate_up):
        gate, up = gate_up.chunk(2, -1)
        return (F.silu(gate) * up,)

    if w.op == "segment_pool":
        lengths_S, weights_T = w.cu_seqlens().diff().long(), w.token_weights()

        def pooled(x):
            states = norm(x)
            wide = states.to(torch.promote_types(states.dtype, torch.float32))
            sums = torch.segment_reduce(wide * weights_T.to(wide.dtype)[:, None], "sum", lengths=lengths_S, unsafe=True)
            total = torch.segment_reduce(weights_T, "sum", lengths=lengths_S, unsafe=True)
            return (sums / total.clamp(min=1e-9)[:, None],)

        return pooled
    more = {"sandwich_norm": norm_add_and_norm, "geglu": gelu_gated}
    return {"rms_norm": add_and_norm, "head_norm": lambda x: (norm(x),), "swiglu": gated, **more}[w.op]


def l2v(w: Workload) -> Step:
    weight = w.weight()
    if w.op == "segment_pool":
        weights_T, cu_seqlens = w.token_weights(), w.cu_seqlens()
        return lambda x: (segment_pool(x, weights_T, cu_seqlens, weight, EPS),)
    return {
        "rms_norm": lambda x, delta: rms_norm(x, weight, EPS, delta),
        "head_norm": lambda x: (rms_norm(x, weight, EPS),),
        "sandwich_norm": lambda delta, residual: sandwich_norm(delta, residual, weight, weight, EPS),
        "swiglu": lambda gate_up: (swiglu(gate_up),),
        "geglu": lambda gate_up: (swiglu(gate_up, activation="gelu_tanh"),),
    }[w.op]


def eager(w: Workload) -> Step:
    return definition(w)


def compiled(w: Workload) -> Step:
    """torch.compile of the same."""
    return compile_for(definition(w), w.device, kept_graph=True)


def liger(w: Workload) -> Step:
    """Liger-Kernel, with gradients in their own memory: its default overwrites what is read again when timed."""
    need_package("liger_kernel", "liger-kernel")
    need_cuda(w.device)
    if w.op in ("segment_pool", "sandwich_norm"):
        raise Unavailable(f"has no {w.op}")
    if w.op == "geglu":
        from liger_kernel.ops.geglu import LigerGELUMulFunction

        return lambda gate_up: (LigerGELUMulFunction.apply(*gate_up.chunk(2, -1)),)
    weight = w.weight()
    if w.op == "swiglu":
        from liger_kernel.ops import swiglu as ops

        if hasattr(ops, "LigerFusedGateUpSiLUMulFunction"):
            return lambda gate_up: (ops.LigerFusedGateUpSiLUMulFunction.apply(gate_up),)
        return lambda gate_up: (ops.LigerSiLUMulFunction.apply(*gate_up.chunk(2, -1)),)
    if w.op == "head_norm":
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return lambda x: (LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False),)
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    def add_and_norm(x, delta):
        y, total = LigerFusedAddRMSNormFunction.apply(x, delta, weight, EPS, 0.0, "llama", False)
        return total, y

    return add_and_norm


PROVIDERS = (l2v, eager, compiled, liger)
