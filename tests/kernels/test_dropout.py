import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from l2v_kernels import dropout
from l2v_kernels.dropout.reference import dropout_reference, dropped
from l2v_kernels.philox import DOMAIN_DROPOUT, keep_bytes, threshold

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="no Triton on this platform")


def pack(lengths, seeds):
    seeds_T = torch.repeat_interleave(torch.tensor(seeds), torch.tensor(lengths))
    return seeds_T, torch.cat([torch.arange(n) for n in lengths])


def test_is_its_definition():
    seeds, rows = pack([3, 7], [5, -9])
    x = torch.randn(10, 50)
    keep = keep_bytes(seeds, rows, 50, 33, DOMAIN_DROPOUT) >= threshold(0.3)
    assert torch.equal(dropout(x, 0.3, seeds, rows, 33), torch.where(keep, x * (256 / 179), torch.zeros(())))


def test_gradient_is_the_same_mask():
    seeds, rows = pack([4, 5], [1, 2])
    x = torch.randn(9, 33, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 33, dtype=torch.float64)
    (dropout(x, 0.25, seeds, rows, 1) * weight).sum().backward()
    assert torch.equal(x.grad, dropout_reference(weight, 0.25, seeds, rows, 1))
    assert torch.autograd.gradcheck(lambda y: dropout(y, 0.25, seeds, rows, 1), (x,))


@pytest.mark.parametrize("p", [0.05, 0.3])
def test_kept_fraction_and_expectation(p):
    seeds, rows = pack([500] * 4, [1, 2, 3, 4])
    y = dropout(torch.ones(2000, 576), p, seeds, rows, 7)
    dropped_fraction = threshold(p) / 256
    noise = (dropped_fraction * (1 - dropped_fraction) / y.numel()) ** 0.5
    assert abs((y == 0).double().mean().item() - dropped_fraction) < 4 * noise
    assert abs(y.double().mean().item() - 1) < 4 * noise / (1 - dropped_fraction)


def test_independent_of_packing_and_different_for_every_address():
    x = torch.ones(6, 64)
    one = dropout(x, 0.3, *pack([6], [42]), 5)
    packed = dropout(torch.ones(14, 64), 0.3, *pack([3, 6, 5], [7, 42, 9]), 5)
    assert torch.equal(packed[3:9], one)
    for other in (dropout(x, 0.3, *pack([6], [43]), 5), dropout(x, 0.3, *pack([6], [42]), 6)):
        assert not torch.equal(other, one)
    assert not torch.equal(one[0], one[1])
    high_bits = dropout(x, 0.3, *pack([6], [42 + (1 << 40)]), 5)
    assert not torch.equal(high_bits, one)


def test_zero_probability_and_empty_input():
    seeds, rows = pack([3], [1])
    x = torch.randn(3, 4)
    assert dropout(x, 0.0, seeds, rows, 0) is x
    assert dropout(x[:, :0], 0.3, seeds, rows, 0).shape == (3, 0)
    assert dropout(x[:0], 0.3, seeds[:0], rows[:0], 0).shape == (0, 4)


def test_dropped_infinities_become_zero():
    seeds, rows = pack([20], [1])
    y = dropout(torch.full((20, 20), float("inf")), 0.5, seeds, rows, 0)
    assert torch.equal(y == 0, dropped(20, 0.5, seeds, rows, 0))


@pytest.mark.parametrize(
    "change",
    [
        {"p": 1.0},
        {"p": -0.1},
        {"x_TE": torch.zeros(3)},
        {"x_TE": torch.zeros(4, 5)},
        {"x_TE": torch.zeros(3, 5, dtype=torch.int64)},
        {"seeds_T": torch.zeros(3, dtype=torch.int32)},
        {"seeds_T": torch.zeros(2, dtype=torch.int64)},
        {"rows_T": torch.zeros(3)},
        {"rows_T": torch.zeros(3, 1, dtype=torch.int64)},
        {"stream": -1},
        {"stream": 2**31},
        {"seeds_T": torch.zeros(3, dtype=torch.int64, device="meta")},
    ],
)
def test_bad_input(change):
    good = {"x_TE": torch.zeros(3, 5), "p": 0.3, "seeds_T": torch.zeros(3, dtype=torch.int64)}
    good |= {"rows_T": torch.zeros(3, dtype=torch.int64), "stream": 0}
    dropout(**good)
    with pytest.raises(ValueError, match=r"\(3, 5\)|x \(|drop probability"):
        dropout(**{**good, **change})


def test_runs_without_triton_and_transformers():
    """Neither is imported, let alone needed, by the package and its CPU path."""
    code = (
        f"import sys; sys.path.insert(0, {str(KERNELS)!r})\n"
        "import torch\n"
        "sys.modules['triton'] = sys.modules['transformers'] = None\n"
        "import l2v_kernels\n"
        "l2v_kernels.dropout(torch.ones(2, 3), 0.3, torch.zeros(2, dtype=torch.int64), torch.arange(2), 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@needs_triton
def test_the_kernel_in_the_interpreter(run_interpreted):
    run_interpreted(__file__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n_tokens", "n_columns"), [(1, 1), (9, 515), (8, 512), (17, 1040)])
def test_interpreted_kernel_equals_the_reference(n_tokens, n_columns, dtype):
    from l2v_kernels.dropout.kernel import launch

    x = torch.randn(n_tokens, n_columns).to(dtype)
    seeds = torch.randint(-(2**62), 2**62, (n_tokens,))
    for rows in (torch.arange(n_tokens), torch.arange(n_tokens, dtype=torch.int32) + 2**30):
        for p, stream in ((0.05, 1), (0.3, 16 * 80)):
            want = dropout_reference(x, p, seeds, rows, stream)
            # Wider than y, so that a write past the end of a row shows.
            buffer = torch.full((n_tokens + 1, n_columns + 3), float("nan"), dtype=dtype)
            got = launch(x, buffer[:n_tokens, :n_columns], p, seeds, rows, stream)
            if dtype == torch.bfloat16:
                # The interpreter rounds to bf16 in its own way; the GPU rounds to nearest like PyTorch.
                assert torch.equal(got == 0, want == 0)
                torch.testing.assert_close(got, want, rtol=2**-7, atol=0)
            else:
                assert torch.equal(got, want)
            assert buffer[n_tokens:].isnan().all() and buffer[:, n_columns:].isnan().all()


def test_interpreted_kernel_reads_strided_input():
    from l2v_kernels.dropout.kernel import launch

    seeds, rows = pack([5, 4], [1, 2])
    wide = torch.randn(9, 80)
    for x in (wide[:, 10:60], torch.randn(50, 9).t()):
        got = launch(x, torch.full((9, 50), float("nan")), 0.3, seeds, rows, 3)
        assert torch.equal(got, dropout_reference(x, 0.3, seeds, rows, 3))


def test_interpreted_autograd_path(monkeypatch):
    """The function's Triton branch, forward and backward, on a tensor that claims to be on a GPU."""
    from l2v_kernels.dropout import kernel

    class OnDevice(torch.Tensor):
        is_cuda = True

    launches, launch = [], kernel.launch
    monkeypatch.setattr(kernel, "launch", lambda *a: launches.append(1) or launch(*a))
    seeds, rows = pack([5, 4], [1, 2])
    x, weight = torch.randn(9, 50), torch.randn(9, 50)
    leaf = x.as_subclass(OnDevice).requires_grad_()
    y = dropout(leaf, 0.3, seeds, rows, 3)
    y.backward(weight)
    assert len(launches) == 2
    assert torch.equal(y.as_subclass(torch.Tensor), dropout_reference(x, 0.3, seeds, rows, 3))
    assert torch.equal(leaf.grad.as_subclass(torch.Tensor), dropout_reference(weight, 0.3, seeds, rows, 3))
