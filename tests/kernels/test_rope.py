import importlib.util

import pytest
import torch

from l2v_kernels import rope
from l2v_kernels.dispatch import triton_everywhere
from l2v_kernels.rope.op import add_and_rotate, takes_shares
from l2v_kernels.rope.reference import add_and_rotate_reference, rope_reference

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton on this platform")


def angles(T, D, dtype=torch.float32):
    angle = torch.rand(T, 1) * 100 * 10000.0 ** -(torch.arange(D // 2) / (D // 2))
    return torch.cat([angle, angle], 1).cos().to(dtype), torch.cat([angle, angle], 1).sin().to(dtype)


def test_equals_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k, (cos, sin) = torch.randn(9, 4, 16), torch.randn(9, 2, 16), angles(9, 16)
    want = llama.apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
    for ours, theirs in zip(rope(q, k, cos, sin), want, strict=True):
        torch.testing.assert_close(ours, theirs[0].transpose(0, 1))


def test_gradients():
    cos, sin = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    q = torch.randn(5, 3, 8, dtype=torch.float64, requires_grad=True)
    k = torch.randn(5, 1, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: rope(*x, cos, sin), (q, k))


@pytest.mark.parametrize("inplace", [False, True])
def test_slices_of_one_buffer_in_place(inplace):
    qkv = torch.randn(7, 4 + 2 + 2, 16, requires_grad=True)
    cos, sin = angles(7, 16)
    weight = torch.randn(7, 6, 16)

    def run(inplace):
        buffer = qkv.clone()
        q, k = rope(buffer[:, :4], buffer[:, 4:6], cos, sin, inplace=inplace)
        gradient = torch.autograd.grad((torch.cat([q, k], 1) * weight).sum() + buffer[:, 6:].sum(), qkv)[0]
        return buffer.detach(), torch.cat([q, k], 1).detach(), gradient

    buffer, out, gradient = run(inplace)
    _, want, want_gradient = run(False)
    assert torch.equal(out, want) and torch.equal(gradient, want_gradient)
    assert torch.equal(buffer[:, :6], want if inplace else qkv[:, :6])
    assert torch.equal(buffer[:, 6:], qkv[:, 6:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_once(dtype):
    q, (cos, sin) = torch.randn(9, 4, 16).to(dtype), angles(9, 16)
    exact = rope_reference(q.double(), cos.double(), sin.double(), inverse=False)
    error = (rope(q, q, cos, sin)[0].double() - exact).abs()
    assert (error <= 0.51 * torch.finfo(dtype).eps * exact.abs().clamp(min=2**-10)).all()


@pytest.mark.parametrize(
    "change",
    [
        {"q_THD": torch.zeros(4, 16)},
        {"q_THD": torch.zeros(5, 3, 16)},
        {"k_TKD": torch.zeros(4, 3, 8)},
        {"q_THD": torch.zeros(4, 3, 15), "k_TKD": torch.zeros(4, 3, 15)},
        {"q_THD": torch.zeros(4, 3, 16, dtype=torch.float16)},
        {"cos_TD": torch.zeros(4, 8)},
        {"sin_TD": torch.zeros(4, 16, dtype=torch.float64)},
        {"sin_TD": torch.zeros(4, 16, device="meta")},
    ],
)
def test_bad_input(change):
    good = {"q_THD": torch.zeros(4, 3, 16), "k_TKD": torch.zeros(4, 1, 16)}
    good |= {"cos_TD": torch.zeros(4, 16), "sin_TD": torch.zeros(4, 16)}
    rope(**good)
    with pytest.raises(ValueError, match=r"q \("):
        rope(**{**good, **change})


@needs_triton
def test_the_kernel_in_the_interpreter(run_interpreted):
    run_interpreted(__file__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("T", "H", "D"), [(1, 1, 2), (5, 3, 64), (9, 8, 96), (3, 4, 128), (2, 2, 256)])
@pytest.mark.parametrize("inverse", [False, True])
def test_interpreted_kernel_equals_the_reference(T, H, D, dtype, inverse):
    from l2v_kernels.rope.kernel import launch

    x, cos, sin = torch.randn(T, H, D).to(dtype), torch.randn(T, D), torch.randn(T, D)
    want = rope_reference(x, cos, sin, inverse)
    buffer = torch.full((T, H + 1, D), float("nan"), dtype=dtype)
    got = launch(x, buffer[:, :H], cos, sin, inverse)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-3, "atol": 1e-3}
    torch.testing.assert_close(got, want, **tolerance)
    assert buffer[:, H:].isnan().all()
    transposed = x.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(launch(transposed, transposed, cos, sin, inverse), want, **tolerance)


def test_interpreted_autograd_path():
    class OnDevice(torch.Tensor):
        is_cuda = True

    q, k, (cos, sin) = torch.randn(5, 4, 64), torch.randn(5, 2, 64), angles(5, 64)
    leaves = [x.as_subclass(OnDevice).requires_grad_() for x in (q, k)]
    out = rope(*leaves, cos, sin)
    grads = [torch.randn_like(x) for x in (q, k)]
    torch.autograd.backward(out, grads)
    for x, y, grad, leaf in zip((q, k), out, grads, leaves, strict=True):
        torch.testing.assert_close(y.as_subclass(torch.Tensor), rope_reference(x, cos, sin, False))
        torch.testing.assert_close(leaf.grad.as_subclass(torch.Tensor), rope_reference(grad, cos, sin, True))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("T", "heads", "D", "R"), [(70, (4, 2), 32, 5), (1, (3, 1), 36, 16), (33, (1, 1), 64, 33), (0, (2, 1), 32, 4)]
)
def test_interpreted_adds_the_adapters_and_rotates(T, heads, D, R, dtype):
    """In columns of a wider buffer whose others are poison, with B whose rows lie one below the other."""
    torch.manual_seed(0)
    assert takes_shares(D, R) and not takes_shares(16, R) and not takes_shares(D, 65)
    N = (heads[0] + 2 * heads[1]) * D
    buffer = torch.full((T, N + 8), float("nan"), dtype=dtype)
    qkv = buffer[:, 5 : 5 + N]
    start = qkv.copy_(torch.randn(T, N)).clone()
    xa, b, (cos, sin) = torch.randn(T, 3 * R).to(dtype), torch.randn(N, R).to(dtype), angles(T, D, dtype)
    want = start.double()
    add_and_rotate_reference(want, xa.double(), b.double(), cos.double(), sin.double(), heads)
    with triton_everywhere():
        add_and_rotate(qkv, xa, b, cos, sin, heads)
    assert buffer[:, :5].isnan().all() and buffer[:, 5 + N :].isnan().all()
    if T:
        assert (qkv.double() - want).abs().max() <= 8 * torch.finfo(dtype).eps * want.abs().max()


def test_adding_the_adapters_is_the_sum_rotated():
    """PyTorch's path against its parts: the share by hand, then `rope`."""
    T, (H, K), D, R = 9, (4, 2), 8, 3
    qkv, xa, b, (cos, sin) = torch.randn(T, 8 * D), torch.randn(T, 3 * R), torch.randn(8 * D, R), angles(T, D)
    sizes = (H * D, K * D, K * D)
    parts = [y + x @ w.t() for y, x, w in zip(qkv.split(sizes, 1), xa.split(R, 1), b.split(sizes), strict=True)]
    q, k = rope(parts[0].view(T, H, D), parts[1].view(T, K, D), cos, sin)
    add_and_rotate(qkv, xa, b, cos, sin, (H, K))
    torch.testing.assert_close(qkv, torch.cat([q.flatten(1), k.flatten(1), parts[2]], 1))
