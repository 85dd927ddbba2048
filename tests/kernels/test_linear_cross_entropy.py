import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from l2v_kernels import linear_cross_entropy
from l2v_kernels.dispatch import triton_everywhere
from l2v_kernels.linear_cross_entropy.op import rows_per_chunk
from l2v_kernels.linear_cross_entropy.reference import linear_cross_entropy_reference

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton on this platform")
# L, V, E: one row, one column, sides that no tile divides, more than one tile of 128 rows
SIZES = [(1, 1, 1), (1, 50, 7), (5, 203, 33), (9, 64, 16), (300, 97, 24)]


def problem(L, V, E, dtype=torch.float32, bias=False, spread=3.0):
    """hidden, weight, labels, bias. Labels are likely ones, so that losses are neither zero nor those of noise."""
    hidden, weight = torch.randn(L, E), torch.randn(V, E) * spread / E**0.5
    bias_V = torch.randn(V).to(dtype) if bias else None
    logits = hidden @ weight.T + (bias_V.float() if bias else 0)
    labels = (logits + 2 * torch.randn(L, V)).argmax(1)
    return hidden.to(dtype), weight.to(dtype), labels, bias_V


def plain(given, dtype, count=1):
    """Loss, hits and the gradient of hidden by the definition, computed in dtype."""
    hidden, weight, labels, bias = given
    hidden = hidden.detach().to(dtype).requires_grad_()
    losses, hits = linear_cross_entropy_reference(
        hidden, weight.to(dtype), labels, None if bias is None else bias.to(dtype)
    )
    loss = losses.sum() / count
    return loss.detach(), hits.sum(), torch.autograd.grad(loss, hidden)[0]


def ours(given, count=1, **more):
    hidden, weight, labels, bias = given
    hidden = hidden.detach().requires_grad_()
    loss, hits = linear_cross_entropy(hidden, weight, labels, bias_V=bias, count=count, **more)
    assert loss.dtype == torch.promote_types(hidden.dtype, torch.float32) and hits.dtype == torch.int64
    assert loss.requires_grad and not hits.requires_grad
    gradient = torch.autograd.grad(loss, hidden)[0]
    assert gradient.dtype == hidden.dtype
    return loss.detach(), hits, gradient


def assert_close(got, given, count=1, same_hits=True):
    """Loss and gradient within 1e-5 of the largest, or twice the error of PyTorch in that dtype."""
    want, same_dtype = plain(given, torch.float64, count), plain(given, given[0].dtype, count)
    for ours, exact, other in zip(got[::2], want[::2], same_dtype[::2], strict=True):
        error = (ours.double() - exact).abs().max()
        bar = 2 * (other.double() - exact).abs().max() + 1e-5 * exact.abs().max().clamp(min=1e-3)
        assert error <= bar, f"error {error:.2e}, allowed {bar:.2e}, largest {exact.abs().max():.2e}"
    if same_hits:
        assert got[1] == want[1]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("L", "V", "E"), SIZES)
def test_equals_the_definition(L, V, E, dtype, bias):
    given = problem(L, V, E, dtype, bias)
    assert_close(ours(given, count=7), given, count=7, same_hits=dtype.itemsize > 2)


def test_the_definition_is_cross_entropy():
    hidden, weight, labels, bias = problem(20, 40, 8, bias=True)
    logits = hidden @ weight.T + bias
    losses, hits = linear_cross_entropy_reference(hidden, weight, labels, bias)
    torch.testing.assert_close(losses, -logits.log_softmax(1)[torch.arange(20), labels])
    assert torch.equal(hits, logits.max(1).indices == labels) and 0 < hits.sum() < 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 4, 130])
def test_chunks_are_put_together(rows, dtype):
    given = problem(300, 97, 24, dtype)
    workspace = rows * 97 * (4 if dtype == torch.float32 else 6)
    assert_close(ours(given, workspace=workspace), given, same_hits=dtype == torch.float32)


@pytest.mark.parametrize(
    ("L", "bytes_a_row", "workspace", "rows"),
    [
        (10, 100, 10_000, 10),
        (10, 100, 399, 3),  # 3, 3, 3, 1
        (10, 100, 899, 5),  # two of one size
        (10, 100, 1, 1),
        (0, 100, 10_000, 1),
        (
            3277,
            6 * 128256,
            768 << 20,
            896,
        ),  # 1046 fit, of whole tiles 1024: four chunks of one size, again of whole tiles
        (300, 1, 299, 256),
    ],
)
def test_rows_per_chunk(L, bytes_a_row, workspace, rows):
    assert rows_per_chunk(L, bytes_a_row, workspace) == rows


@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(bias):
    hidden, weight, labels, bias_V = problem(5, 23, 6, torch.float64, bias)

    def loss(hidden):
        return linear_cross_entropy(hidden, weight, labels, bias_V=bias_V, count=3, workspace=500)[0]

    assert torch.autograd.gradcheck(loss, hidden.requires_grad_())


def test_count_is_a_number_or_a_tensor_and_by_default_the_labels():
    given = problem(6, 40, 8)
    want = plain(given, torch.float32, count=6)
    for count in (None, 6, 6.0, torch.tensor(6.0), torch.tensor(6), torch.tensor(6.0, dtype=torch.float64)):
        for x, y in zip(ours(given, count=count), want, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("count", [None, 5.0, torch.tensor(5.0)])
def test_no_labels_are_a_zero_with_a_gradient_of_zero(count):
    leaf, weight, _, _ = problem(4, 30, 8)
    hidden = (leaf.requires_grad_() * 2)[torch.zeros(0, dtype=torch.long)]
    loss, hits = linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.long), count=count)
    loss.backward()
    assert loss == 0 and hits == 0 and torch.equal(leaf.grad, torch.zeros(4, 8))


def test_strided_inputs():
    hidden, weight, labels, bias = problem(6, 40, 8, bias=True)
    want = ours((hidden, weight, labels, bias))
    spaced = [torch.stack([x, x], -1)[..., 0] for x in (hidden, labels, bias)]
    turned = weight.T.contiguous().T
    assert not any(x.is_contiguous() for x in (*spaced, turned))
    for x, y in zip(ours((spaced[0], turned, *spaced[1:])), want, strict=True):
        torch.testing.assert_close(x, y)


def test_of_equal_logits_the_first_counts():
    weight = torch.tensor([[1.0], [3.0], [3.0], [2.0]])
    for label, hit in ((0, 0), (1, 1), (2, 0), (3, 0)):
        assert linear_cross_entropy(torch.ones(1, 1), weight, torch.tensor([label]))[1] == hit


def test_a_likely_label_keeps_its_digits():
    """p - 1 of a share near 1, and a loss near 0, both far from the rounding of 1."""
    hidden, weight = torch.tensor([[9.0]]), torch.tensor([[1.0], [0.0]])
    loss, _, gradient = ours((hidden, weight, torch.tensor([0]), None))
    exact = torch.tensor(-9.0, dtype=torch.float64).exp().log1p()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-3, atol=0)
    torch.testing.assert_close(gradient.double()[0, 0], -(1 - (-exact).exp()), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_gradient_is_kept_for_the_backward(dtype):
    hidden, weight, labels, _ = problem(6, 40, 8, dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    # Beside it the count, by which the sum was divided.
    assert [tuple(x.shape) for x in kept if x.numel() > 1] == [(6, 8)]
    assert sum(x.numel() * x.element_size() for x in kept) <= 6 * 8 * dtype.itemsize + 8


class Largest(TorchDispatchMode):
    """The most bytes of any tensor that an operation gave."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_logits_are_never_in_memory(dtype):
    L, V, E = 600, 3000, 8
    given = problem(L, V, E, dtype)
    with Largest() as seen:
        ours(given, workspace=1 << 20)
    assert seen.bytes <= 1 << 20 < L * V * dtype.itemsize
    with Largest() as seen, torch.no_grad():
        linear_cross_entropy(*given[:3], workspace=1 << 20)
    assert seen.bytes <= 1 << 20


def test_without_a_gradient_there_is_one_product(monkeypatch):
    given, matmuls, mm = problem(6, 40, 8), [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: (matmuls.append(1), mm(*a, **k))[1])
    want = ours(given)
    assert len(matmuls) == 2
    loss, hits = linear_cross_entropy(*given[:3], count=1)
    with torch.no_grad():
        same, _ = linear_cross_entropy(given[0].clone().requires_grad_(), *given[1:3], count=1)
    assert len(matmuls) == 4 and not loss.requires_grad and not same.requires_grad
    assert torch.equal(loss, want[0]) and torch.equal(same, want[0]) and torch.equal(hits, want[1])


def test_backward_twice_and_the_gradient_of_a_gradient():
    hidden, weight, labels, _ = problem(6, 40, 8)
    loss, _ = linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    first, second = (torch.autograd.grad(x * loss, hidden, retain_graph=True)[0] for x in (1, 3))
    torch.testing.assert_close(second, 3 * first)
    again = torch.autograd.grad(loss**2, hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        again.sum().backward()


def test_autocast_changes_nothing():
    given = problem(6, 40, 8)
    want = ours(given)
    with torch.autocast("cpu", torch.bfloat16):
        got = ours(given)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_LE": torch.zeros(8)},
        {"hidden_LE": torch.zeros(5, 7)},
        {"weight_VE": torch.zeros(0, 8)},
        {"hidden_LE": torch.zeros(5, 0), "weight_VE": torch.zeros(9, 0)},
        {"labels_L": torch.zeros(4, dtype=torch.long)},
        {"labels_L": torch.zeros(5, dtype=torch.int32)},
        {"bias_V": torch.zeros(8)},
        {"bias_V": torch.zeros(9, dtype=torch.float16)},
        {"hidden_LE": torch.zeros(5, 8, dtype=torch.bfloat16)},
        {"hidden_LE": torch.zeros(5, 8, dtype=torch.long), "weight_VE": torch.zeros(9, 8, dtype=torch.long)},
        {"weight_VE": torch.zeros(9, 8, device="meta")},
        {"bias_V": torch.zeros(9, requires_grad=True)},
        {"count": torch.ones(1)},
        {"count": torch.tensor(1.0, requires_grad=True)},
        {"count": 0},
        {"count": float("nan")},
    ],
)
def test_bad_input(change):
    good = {
        "hidden_LE": torch.zeros(5, 8),
        "weight_VE": torch.zeros(9, 8),
        "labels_L": torch.zeros(5, dtype=torch.long),
    }
    linear_cross_entropy(**good)
    with pytest.raises(ValueError, match=r"hidden \("):
        linear_cross_entropy(**{**good, **change})


def test_bad_numbers():
    given = problem(5, 9, 8)[:3]
    with pytest.raises(ValueError, match="workspace is bytes for logits and must be at least 1, got 0"):
        linear_cross_entropy(*given, workspace=0)
    for label in (9, -1, -100):
        labels = torch.tensor([0, 8, label, 3, 11])
        with pytest.raises(ValueError, match=rf"labels\[2\] is {label} and the head has 9 rows"):
            linear_cross_entropy(*given[:2], labels)


def test_a_bias_that_is_not_frozen_may_be_looked_at():
    hidden, weight, labels, bias = problem(5, 9, 8, bias=True)
    with pytest.raises(ValueError, match=r"bias.requires_grad_\(False\)"):
        linear_cross_entropy(hidden, weight, labels, bias_V=bias.requires_grad_())
    with torch.no_grad():
        loss, _ = linear_cross_entropy(hidden, weight, labels, bias_V=bias)
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T + bias.detach(), labels))


def of_weight(given, dtype, workspace=None):
    """The gradient of a weight [V, E] that hidden depends on as well, as an embedding's; workspace None: by the definition."""
    hidden, weight, labels, bias = (None if x is None else x.to(dtype) if x.is_floating_point() else x for x in given)
    weight = weight.detach().requires_grad_()
    hidden = hidden + weight[labels]
    if workspace is None:
        loss = linear_cross_entropy_reference(hidden, weight, labels, bias)[0].sum() / 3
    else:
        loss, _ = linear_cross_entropy(hidden, weight, labels, bias_V=bias, count=3, workspace=workspace)
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.dtype == dtype
    return gradient.double()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 400])
@pytest.mark.parametrize(("L", "V", "E"), SIZES)
def test_a_trained_weight_gets_its_gradient(L, V, E, rows, dtype, bias):
    """Over chunks of some rows or in one, as near to the exact gradient as PyTorch in that dtype."""
    given = problem(L, V, E, torch.bfloat16, bias=bias)
    exact, other = of_weight(given, torch.float64), of_weight(given, dtype)
    error = (of_weight(given, dtype, workspace=rows * V * 8) - exact).abs().max()
    # In bf16 the kept gradient is rounded once more than PyTorch's, when the incoming one multiplies it.
    assert error <= 3 * (other - exact).abs().max() + 1e-6 * exact.abs().max()


def test_a_weight_alone_and_no_label():
    hidden, weight, labels, _ = problem(4, 9, 8)
    weight.requires_grad_()
    loss, _ = linear_cross_entropy(hidden, weight, labels)
    wanted = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, labels), weight)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], wanted)
    loss, _ = linear_cross_entropy(hidden[:0], weight, labels[:0])
    assert not torch.autograd.grad(loss, weight)[0].any()


def check_unseen_labels(**more):
    """Labels that nobody looked at: NaN is the loss, and the gradient of their rows; the others keep theirs."""
    hidden, weight, labels, _ = problem(6, 40, 8)
    want = ours((hidden, weight, labels, None), **more)
    labels = labels.clone()
    labels[1], labels[4] = 40, -(2**62)
    loss, _, gradient = ours((hidden, weight, labels, None), check_values=False, **more)
    bad = torch.tensor([1, 4])
    assert loss.isnan() and gradient[bad].isnan().all()
    gradient[bad] = want[2][bad]
    assert torch.equal(gradient, want[2])


def check_values_that_are_not_finite():
    for value in (float("nan"), float("inf")):
        hidden, weight, labels, _ = problem(6, 40, 8)
        want = ours((hidden, weight, labels, None), workspace=1)[2]
        hidden[2, 3] = value
        loss, _, gradient = ours((hidden, weight, labels, None), workspace=1)
        assert not loss.isfinite() and not gradient[2].isfinite().all()
        keep = torch.arange(6) != 2
        assert torch.equal(gradient[keep], want[keep])


def check_excluded_tokens():
    """A bias of minus infinity takes tokens out, as often as one likes."""
    hidden, weight, labels, bias = problem(6, 300, 8, bias=True)
    bias[torch.arange(300) % 3 > 0] = -torch.inf
    given = hidden, weight, labels // 3 * 3, bias
    assert_close(ours(given), given)


def test_unseen_labels():
    check_unseen_labels()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_values_that_are_not_finite():
    check_values_that_are_not_finite()


def test_excluded_tokens():
    check_excluded_tokens()


@needs_triton
def test_the_kernel_in_the_interpreter(run_interpreted):
    run_interpreted(__file__)


@pytest.fixture
def kernel(monkeypatch):
    """The Triton path on the CPU, in blocks of which these sizes need several; buffers start as NaN, hits as true."""
    from l2v_kernels.linear_cross_entropy import kernel

    new_empty = torch.Tensor.new_empty

    def poisoned(self, *size, **kwargs):
        x = new_empty(self, *size, **kwargs)
        return x.fill_(float("nan") if x.is_floating_point() else 1)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    monkeypatch.setattr(kernel, "CONFIG", {"BLOCK": 32, "num_warps": 4})
    with triton_everywhere():
        yield


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("L", "V", "E"), SIZES[:-1])
def test_interpreted_kernel_equals_the_definition(kernel, L, V, E, dtype, bias):
    given = problem(L, V, E, dtype, bias)
    got = ours(given, count=7)
    assert_close(got, given, count=7)
    # The logits are not rounded here, so the loss is exact to fp32 in half precision too.
    torch.testing.assert_close(got[0].double(), plain(given, torch.float64, 7)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("gradient", [False, True])
def test_interpreted_chunks(kernel, dtype, gradient):
    given = problem(9, 70, 16, dtype)
    workspace = 2 * 70 * (4 + (2 if dtype == torch.float16 and gradient else 0))
    if gradient:
        assert_close(ours(given, workspace=workspace), given)
        return
    loss, hits = linear_cross_entropy(*given[:3], count=1, workspace=workspace)
    want = plain(given, torch.float64)
    torch.testing.assert_close(loss.double(), want[0], rtol=1e-5, atol=0)
    assert hits == want[1]


@pytest.mark.parametrize("spread", [0.0, 100.0])
def test_interpreted_flat_and_steep(kernel, spread):
    given = problem(6, 100, 16, spread=spread)
    assert_close(ours(given), given)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_interpreted_bad_values(kernel):
    check_unseen_labels()
    check_unseen_labels(workspace=1)
    check_values_that_are_not_finite()
    check_excluded_tokens()


def test_interpreted_ties_and_a_likely_label(kernel):
    test_of_equal_logits_the_first_counts()
    test_a_likely_label_keeps_its_digits()


def test_interpreted_strides_and_no_labels(kernel):
    test_strided_inputs()
    test_no_labels_are_a_zero_with_a_gradient_of_zero(None)


def test_interpreted_columns_beyond_the_row_are_left_alone(kernel):
    from l2v_kernels.linear_cross_entropy.kernel import launch

    logits = torch.randn(4, 50)
    labels, losses, hits = torch.tensor([3, 49]), torch.full((2,), torch.nan), torch.zeros(2, dtype=torch.bool)
    out = torch.full((4, 50), 7.0, dtype=torch.float16)
    launch(logits[1:3], None, labels, losses, hits, out[1:3])
    torch.testing.assert_close(losses, F.cross_entropy(logits[1:3], labels, reduction="none"))
    want = logits[1:3].softmax(1) - F.one_hot(labels, 50)
    torch.testing.assert_close(out[1:3].float(), want, rtol=1e-3, atol=1e-6)
    assert (out[[0, 3]] == 7).all()
