"""The providers of packed attention: this library and what else can do the work. Each is a function of a Workload that
returns a callable from (q_THD, k_TKD, v_TKD) to o_THD, or raises Unavailable with the reason."""

import importlib.util
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import Unavailable, compiled, need_cuda, need_package, reason
from l2v_kernels import AttentionPlan, attention

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Workload:
    """Segments and heads of one measurement."""

    name: str
    lengths: tuple[int, ...]
    heads: int
    key_heads: int
    head_dim: int
    dropout: float
    device: torch.device
    dtype: torch.dtype
    window: int | None = None
    """Keys fewer than so many places away are seen, on both sides."""

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def equal(self) -> bool:
        return len(set(self.lengths)) == 1

    def cu_seqlens(self) -> torch.Tensor:
        """int32 [S + 1] on the device."""
        return torch.tensor([0, *self.lengths]).cumsum(0).int().to(self.device)

    def flops(self, backward: bool) -> float:
        """Of the matmuls that the definition needs: two forward, five backward."""
        return (10 if backward else 4) * self.heads * self.head_dim * sum(map(self.pairs, self.lengths))

    def pairs(self, length: int) -> int:
        """Queries and keys of a segment that see each other."""
        reach = length if self.window is None else min(self.window, length)
        return length * (2 * reach - 1) - reach * (reach - 1)

    @property
    def sides(self) -> tuple[int, int]:
        """The window as FlashAttention takes it: keys to the left and to the right of a query's own; -1 is no limit."""
        return (-1, -1) if self.window is None else (self.window - 1, self.window - 1)

    def bytes(self, backward: bool) -> float:
        """Each input read once and each output written once."""
        queries, keys = self.tokens * self.heads * self.head_dim, self.tokens * self.key_heads * self.head_dim
        itemsize = torch.finfo(self.dtype).bits // 8
        return itemsize * ((4 * queries + 4 * keys) if backward else (2 * queries + 2 * keys))


def l2v(w: Workload) -> Attend:
    cu_seqlens, seeds_S = w.cu_seqlens(), torch.arange(len(w.lengths), device=w.device)
    plan = AttentionPlan.from_lengths(w.lengths, w.device)
    return lambda q, k, v: attention(
        q, k, v, cu_seqlens, dropout_p=w.dropout, window=w.window, seeds_S=seeds_S, plan=plan
    )


def _no_window(w: Workload) -> None:
    if w.window is not None:
        raise Unavailable("has no window")


def _sdpa(w, backend):
    """On padded input; packing and unpacking are not part of the time, as a padded model would not do it."""
    _no_window(w)
    if not w.equal:
        raise Unavailable("segments of one length only: padded input of others would need a mask")
    B, L = len(w.lengths), w.lengths[0]

    def run(q, k, v):
        q, k, v = (x.view(B, L, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            o = F.scaled_dot_product_attention(q, k, v, dropout_p=w.dropout, enable_gqa=w.heads != w.key_heads)
        return o.transpose(1, 2).flatten(0, 1)

    return run


def sdpa_flash(w: Workload) -> Attend:
    return _sdpa(w, SDPBackend.FLASH_ATTENTION)


def sdpa_cudnn(w: Workload) -> Attend:
    return _sdpa(w, SDPBackend.CUDNN_ATTENTION)


def sdpa_efficient(w: Workload) -> Attend:
    """With a mask of the padding where lengths differ, on input that is padded already."""
    if w.equal:
        return _sdpa(w, SDPBackend.EFFICIENT_ATTENTION)
    _no_window(w)
    longest, B = max(w.lengths), len(w.lengths)
    place = torch.cat([torch.arange(n) + i * longest for i, n in enumerate(w.lengths)]).to(w.device)
    real = torch.zeros(B * longest, dtype=torch.bool, device=w.device)
    real[place] = True
    mask = real.view(B, 1, 1, longest).expand(B, w.heads, longest, longest)

    def run(q, k, v):
        padded = [x.new_zeros(B * longest, *x.shape[1:]).index_copy(0, place, x) for x in (q, k, v)]
        q, k, v = (x.view(B, longest, *x.shape[1:]).transpose(1, 2) for x in padded)
        k, v = (x.repeat_interleave(w.heads // w.key_heads, 1) for x in (k, v))
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=w.dropout)
        return o.transpose(1, 2).flatten(0, 1)[place]

    return run


def torch_fa2_varlen(w: Workload) -> Attend:
    """FlashAttention 2 as torch carries it, through the operator that takes segments and dropout."""
    need_cuda(w.device)
    cu, longest = w.cu_seqlens(), max(w.lengths)
    forward = torch.ops.aten._flash_attention_forward
    left, right = w.sides
    more = {} if w.window is None else {"window_size_left": left, "window_size_right": right}
    return lambda q, k, v: forward(q, k, v, cu, cu, longest, longest, w.dropout, False, False, **more)[0]


def torch_varlen_attn(w: Workload) -> Attend:
    need_cuda(w.device)
    if w.dropout:
        raise Unavailable("takes no dropout")
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise Unavailable("not in this torch") from error
    cu, longest = w.cu_seqlens(), max(w.lengths)
    takes = inspect.signature(varlen_attn).parameters
    more = {"enable_gqa": True} if "enable_gqa" in takes else {}
    if w.window is not None:
        if "window_size" not in takes:
            raise Unavailable("has no window in this torch")
        more["window_size"] = w.sides
    return lambda q, k, v: varlen_attn(q, k, v, cu, cu, longest, longest, **more)


def flex(w: Workload) -> Attend:
    """FlexAttention, compiled, with a document mask whose block mask is built outside the time."""
    need_cuda(w.device)
    if w.dropout:
        raise Unavailable("takes no dropout")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lengths = torch.tensor(w.lengths, device=w.device)
    document = torch.arange(len(w.lengths), device=w.device).repeat_interleave(lengths)
    near = w.window or w.tokens
    same = lambda b, h, i, j: (document[i] == document[j]) & ((i - j).abs() < near)  # noqa: E731
    mask = create_block_mask(same, None, None, w.tokens, w.tokens, device=w.device, _compile=True)
    attend = compiled(flex_attention, w.device, kept_graph=True)

    def run(q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return attend(q, k, v, block_mask=mask, enable_gqa=w.heads != w.key_heads)[0].transpose(0, 1)

    return run


def flash_attn_2(w: Workload) -> Attend:
    need_cuda(w.device)
    need_package("flash_attn", "flash-attn")
    from flash_attn import flash_attn_varlen_func

    cu, longest = w.cu_seqlens(), max(w.lengths)
    return lambda q, k, v: flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, w.dropout, window_size=w.sides)


HUB_FLASH_4 = "kernels-community/flash-attn4"
FLASH_4_VERSION = 0
"""The version that transformers 5.17 takes."""


def _flash_4() -> Callable:
    """The function of the package, or of the Hub's build where the user allows code from there."""
    if importlib.util.find_spec("flash_attn") is not None and importlib.util.find_spec("flash_attn.cute") is not None:
        from flash_attn.cute import flash_attn_varlen_func

        return flash_attn_varlen_func
    if os.environ.get("L2V_HUB_KERNELS") != "1":
        raise Unavailable(f"flash_attn.cute is not installed (L2V_HUB_KERNELS=1 takes {HUB_FLASH_4} from the Hub)")
    need_package("kernels", "kernels")
    from kernels import get_kernel

    try:
        return get_kernel(HUB_FLASH_4, version=FLASH_4_VERSION).flash_attn_varlen_func
    except Exception as error:  # no network, no build for this machine
        raise Unavailable(f"{HUB_FLASH_4} cannot be loaded: {reason(error)}") from error


def flash_attn_4(w: Workload) -> Attend:
    need_cuda(w.device)
    if w.dropout:
        raise Unavailable("takes no dropout")
    attend, cu = _flash_4(), w.cu_seqlens()
    more = {} if w.window is None else {"window_size": w.sides}

    def run(q, k, v):
        o = attend(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, **more)
        return o[0] if isinstance(o, tuple) else o

    return run


PROVIDERS = (
    l2v,
    sdpa_flash,
    sdpa_cudnn,
    sdpa_efficient,
    torch_fa2_varlen,
    torch_varlen_attn,
    flex,
    flash_attn_2,
    flash_attn_4,
)
