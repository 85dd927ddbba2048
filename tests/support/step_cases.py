"""What the tests of the norms, swiglu and segment_pool share: ground truths in plain PyTorch, and the bars of error."""

import contextlib

import torch

from l2v_kernels.rms_norm import rms_norm
from l2v_kernels.sandwich_norm import sandwich_norm
from l2v_kernels.segment_pool import segment_pool
from l2v_kernels.swiglu import swiglu


@contextlib.contextmanager
def poisoned():
    """Memory that an op allocates without filling it holds NaN, results and scratch alike."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def bytes_saved(call):
    """Bytes that call() keeps for the backward, each storage once, by its size and dtype: {(elements, dtype): bytes}."""
    found = {}

    def pack(x):
        found[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    return sorted(x.numel() * x.element_size() for x in found.values())


def gradients(function, leaves, grads, dtype):
    """[results, gradients] of function(*leaves) in dtype, as float64. A leaf of None stays one."""
    leaves = [x if x is None else x.detach().to(dtype).requires_grad_() for x in leaves]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    wanted = [x for x in leaves if x is not None]
    pairs = [(y, g.to(y.dtype)) for y, g in zip(results, grads, strict=True) if g is not None]
    found = torch.autograd.grad([y for y, _ in pairs], wanted, [g for _, g in pairs])
    return [x.detach() for x in (*results, *found)]


def assert_as_exact_as_plain(op, plain, leaves, grads):
    """Results and gradients of op: at most twice the error of plain PyTorch in the same dtype, both against float64.

    For numbers that plain PyTorch happens to hit, the rounding of the largest counts too: in the result's own dtype, and
    what fp32 sums inside lose.
    """
    dtype = leaves[0].dtype
    with poisoned():
        ours = gradients(op, leaves, grads, dtype)
    theirs, exact = gradients(plain, leaves, grads, dtype), gradients(plain, leaves, grads, torch.float64)
    for i, (x, y, want) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert x.shape == want.shape and x.dtype == y.dtype, f"number {i}: {x.dtype} {tuple(x.shape)}"
        if want.numel():
            largest = want.abs().max()
            bar = 2 * (y.double() - want).abs().max() + (torch.finfo(x.dtype).eps / 2 + 1e-6) * largest
            error = (x.double() - want).abs().max()
            assert error <= bar, f"number {i} of {tuple(want.shape)} {x.dtype}: error {error:.2e} over {bar:.2e}"


def plain_rms_norm(eps=1e-6):
    """The norm as transformers' Llama has it, after the addition to the residual stream."""

    def run(x, weight, residual=None):
        total = x if residual is None else x + residual
        wide = total.to(torch.promote_types(total.dtype, torch.float32))
        y = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(total.dtype)
        return y if residual is None else (total, y)

    return run


def plain_gemma_norm(eps=1e-6):
    """The norm as transformers' Gemma has it, after the addition to the residual stream."""

    def run(x, weight, residual=None):
        total = x if residual is None else x + residual
        wide = total.to(torch.promote_types(total.dtype, torch.float32))
        y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (1.0 + weight.to(wide.dtype))).to(
            total.dtype
        )
        return y if residual is None else (total, y)

    return run


def check_rms_norm(shape, dtype, residual, device="cpu", offset=0.0):
    """A problem of this shape: x, weight and residual of unlike sizes, gradients of both results."""
    x = (torch.randn(shape) * torch.rand(*shape[:-1], 1).mul(6).exp()).to(device, dtype)
    weight = (1 + torch.randn(shape[-1])).to(device, dtype)
    delta = torch.randn(shape).to(device, dtype) if residual else None
    grads = [torch.randn(shape).to(device, dtype) for _ in range(1 + residual)]
    if offset:
        weight = weight - 1
    plain = plain_gemma_norm() if offset else plain_rms_norm()
    assert_as_exact_as_plain(lambda x, w, r: rms_norm(x, w, 1e-6, r, offset=offset), plain, (x, weight, delta), grads)


def plain_sandwich_norm(eps=1e-6, offset=1.0):
    """A Gemma layer's steps between its blocks."""
    norm = plain_gemma_norm(eps) if offset else plain_rms_norm(eps)

    def run(delta, residual, after, before):
        total = residual + norm(delta, after)
        return total, norm(total, before)

    return run


def sandwich_problem(T, E, dtype, device="cpu"):
    """delta, residual, after and before, of unlike sizes, and gradients of both results."""
    delta, residual = ((torch.randn(T, E) * torch.rand(T, 1).mul(4).exp()).to(device, dtype) for _ in range(2))
    after, before = (torch.randn(E).mul(0.3).to(device, dtype) for _ in range(2))
    return (delta, residual, after, before), [torch.randn(T, E).to(device, dtype) for _ in range(2)]


def check_sandwich_norm(T, E, dtype, offset=1.0, device="cpu"):
    """Results and gradients of all four tensors."""
    leaves, grads = sandwich_problem(T, E, dtype, device)
    op = lambda *tensors: sandwich_norm(*tensors, 1e-6, offset=offset)  # noqa: E731
    assert_as_exact_as_plain(op, plain_sandwich_norm(offset=offset), leaves, grads)


def plain_swiglu(gate_up, activation="silu"):
    gate, up = gate_up.chunk(2, -1)
    functional = torch.nn.functional
    return (functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")) * up


def check_swiglu(T, F, dtype, device="cpu", activation="silu"):
    """Gates from far below to far above 0."""
    gate_up = (torch.randn(T, 2 * F) * 4).to(device, dtype)
    assert_as_exact_as_plain(
        lambda x: swiglu(x, activation=activation),
        lambda x: plain_swiglu(x, activation),
        (gate_up,),
        [torch.randn(T, F).to(device, dtype)],
    )


def plain_pool(weights_T, lengths, eps=1e-6, offset=0.0):
    """Segment by segment. Norms stay in fp32, as the op's do: rounding them is the model's, not the definition's."""

    def run(x, norm_weight=None):
        if norm_weight is not None:
            norm = plain_gemma_norm(eps) if offset else plain_rms_norm(eps)
            x = norm(x.to(torch.promote_types(x.dtype, torch.float32)), norm_weight)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        weights, out = weights_T.to(x.dtype), []
        for part, w in zip(x.split(lengths), weights.split(lengths), strict=True):
            out.append((part * w[:, None]).sum(0) / w.sum().clamp(min=1e-9))
        return torch.stack(out)

    return run


def check_segment_pool(lengths, E, dtype, norm, device="cpu", cu_dtype=torch.int32, trained=False, offset=0.0):
    """Weights that are often 0, and everywhere 0 in the last segment; its gradient is not."""
    T = sum(lengths)
    x = (torch.randn(T, E) * torch.rand(T, 1).mul(4).exp()).to(device, dtype)
    weights = (torch.rand(T) * (torch.rand(T) < 0.7)).to(device)
    if len(lengths) > 1 and lengths[-1]:
        weights[-lengths[-1] :] = 0
    cu = torch.tensor([0, *lengths]).cumsum(0).to(device, cu_dtype)
    norm_weight = (1 + torch.randn(E)).to(device, dtype) if norm else None
    plain = plain_pool(weights, lengths, offset=offset)
    leaves, op = (x, norm_weight), lambda x, n: segment_pool(x, weights, cu, n, offset=offset)
    if norm and not trained:
        leaves, frozen, trainable = (x,), norm_weight, plain
        op = lambda x: segment_pool(x, weights, cu, frozen, offset=offset)  # noqa: E731
        plain = lambda x: trainable(x, frozen.to(torch.promote_types(x.dtype, torch.float32)))  # noqa: E731
    assert_as_exact_as_plain(op, plain, leaves, [torch.randn(len(lengths), E).to(device)])
