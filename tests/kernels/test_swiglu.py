import importlib.util

import pytest
import torch
from support.step_cases import bytes_saved, check_swiglu, plain_swiglu, poisoned

from l2v_kernels.dispatch import triton_everywhere
from l2v_kernels.swiglu import op, reference, swiglu
from l2v_kernels.swiglu.op import ACTIVATIONS, GateUpLora

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton on this platform")
SHAPES = [(1, 1), (5, 33), (9, 1024), (3, 1100), (0, 8), (4, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("T", "F"), SHAPES)
def test_against_float64(T, F, dtype):
    check_swiglu(T, F, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("T", "F"), SHAPES)
def test_gelu_against_float64(T, F, dtype):
    check_swiglu(T, F, dtype, activation="gelu_tanh")


def test_gelu_equals_gemma():
    gemma = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    config = gemma.Gemma3TextConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2)
    mlp, x = gemma.Gemma3MLP(config), torch.randn(5, 16)
    gate_up = x @ torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).t()
    torch.testing.assert_close(mlp.down_proj(swiglu(gate_up, activation="gelu_tanh")), mlp(x))


def test_equals_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2)
    mlp, x = llama.LlamaMLP(config), torch.randn(5, 16)
    gate_up = x @ torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).t()
    torch.testing.assert_close(mlp.down_proj(swiglu(gate_up)), mlp(x))


def test_gradients():
    gate_up = torch.randn(5, 14, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, (gate_up,))
    assert torch.autograd.gradcheck(lambda x: swiglu(x, activation="gelu_tanh"), (gate_up,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounds_once(dtype):
    gate_up = torch.randn(9, 200).to(dtype)
    exact = plain_swiglu(gate_up.double())
    error = (swiglu(gate_up).double() - exact).abs()
    assert (error <= (0.505 * torch.finfo(dtype).eps + 5e-7) * exact.abs() + 1e-7).all()


def test_gelu_gates_far_from_zero():
    gate_up = torch.tensor([[-1e4, 1e4, -200.0, 0.0, 3.0, 3.0, 3.0, 3.0]], requires_grad=True)
    product = swiglu(gate_up, activation="gelu_tanh")
    product.sum().backward()
    assert torch.equal(product, torch.tensor([[0.0, 3e4, 0.0, 0.0]]))
    assert torch.equal(gate_up.grad, torch.tensor([[0.0, 3.0, 0.0, 1.5, 0.0, 1e4, 0.0, 0.0]]))


def test_gates_far_from_zero():
    """No infinity and no NaN on the way, where the result is finite."""
    gate_up = torch.tensor([[-1e4, 1e4, -200.0, 0.0, 3.0, 3.0, 3.0, 3.0]], requires_grad=True)
    product = swiglu(gate_up)
    product.sum().backward()
    assert torch.equal(product, torch.tensor([[0.0, 3e4, 0.0, 0.0]]))
    assert torch.equal(gate_up.grad, torch.tensor([[0.0, 3.0, 0.0, 1.5, 0.0, 1e4, 0.0, 0.0]]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("adapted", [False, True])
def test_blocks_of_rows_change_nothing(activation, adapted, monkeypatch):
    """Seven rows of 10 in blocks of 3, with the share of gate alone; also where the gradient overwrites gate and up."""
    dproduct, gate_up, xa, b = torch.randn(7, 10), torch.randn(7, 20), torch.randn(7, 2), torch.randn(10, 2)
    share = GateUpLora(xa_gate_TR=xa, b_gate_FR=b) if adapted else None
    want = op.backward(dproduct, gate_up, lora=share, activation=activation)
    monkeypatch.setattr(reference, "BLOCK", 30)
    found = op.backward(dproduct, gate_up, lora=share, activation=activation)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)
    assert op.backward(dproduct, gate_up, gate_up, share, activation) is gate_up and torch.equal(gate_up, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_in_place(dtype):
    dproduct, gate_up = torch.randn(5, 7).to(dtype), torch.randn(5, 14).to(dtype)
    want = op.backward(dproduct, gate_up)
    assert op.backward(dproduct, gate_up, gate_up) is gate_up and torch.equal(gate_up, want)


def test_keeps_its_input_alone():
    gate_up = torch.randn(6, 40, dtype=torch.bfloat16, requires_grad=True)
    assert bytes_saved(lambda: swiglu(gate_up)) == [6 * 40 * 2]


@pytest.mark.parametrize("bad", [torch.zeros(4), torch.zeros(2, 3, 4), torch.zeros(4, 5), torch.zeros(4, 6).long()])
def test_bad_input(bad):
    with pytest.raises(ValueError, match=r"\(\d"):
        swiglu(bad)


def test_an_activation_that_is_not_known():
    with pytest.raises(ValueError, match="silu and gelu_tanh, got 'gelu'"):
        swiglu(torch.zeros(2, 4), activation="gelu")


def lora_problem(T, F, ranks, dtype):
    """gate_up, the gradient of the product, and LoRA on what has a rank; xa are columns of a buffer of poison."""
    torch.manual_seed(T + F)
    gate_up, dproduct, tensors = torch.randn(T, 2 * F).to(dtype), torch.randn(T, F).to(dtype), []
    for rank in ranks:
        if rank is None:
            tensors += [None, None]
            continue
        xa = torch.full((T, rank + 5), float("nan"), dtype=dtype)[:, 3 : 3 + rank]
        tensors += [xa.copy_(torch.randn(T, rank)), torch.randn(F, rank).to(dtype)]
    return gate_up, dproduct, GateUpLora(*tensors)


def with_share(gate_up, lora):
    """gate_up + xa B^T, in gate_up's dtype."""
    halves = [half.clone() for half in gate_up.chunk(2, 1)]
    for half, pair in zip(halves, (lora.gate, lora.up), strict=True):
        if pair:
            half += pair[0].to(half.dtype) @ pair[1].to(half.dtype).t()
    return torch.cat(halves, 1)


def check_lora(T, F, ranks, dtype, how="silu"):
    """At most the error of adding the share before, rounded to the dtype, and the frozen product is left as it is."""
    gate_up, dproduct, lora = lora_problem(T, F, ranks, dtype)
    before = gate_up.clone()
    with poisoned():
        found = op.forward(gate_up, lora, how), op.backward(dproduct, gate_up, lora=lora, activation=how)
    assert torch.equal(gate_up, before)
    leaf = with_share(gate_up.double(), lora).requires_grad_()
    product = plain_swiglu(leaf, how)
    want = product.detach(), torch.autograd.grad(product, leaf, dproduct.double())[0]
    rounded = with_share(gate_up, lora)
    plain = op.forward(rounded, activation=how), op.backward(dproduct, rounded, activation=how)
    for got, same_dtype, exact in zip(found, plain, want, strict=True):
        assert got.shape == exact.shape and got.dtype == dtype
        if got.numel():
            error, allowed = ((v.double() - exact).abs().max() for v in (got, same_dtype))
            assert error <= allowed + (torch.finfo(dtype).eps / 2 + 2e-6) * exact.abs().max()
    assert op.backward(dproduct, gate_up, gate_up, lora, how) is gate_up and torch.equal(gate_up, found[1])


LORA_SHAPES = [
    (37, 130, (5, 16)),
    (5, 33, (None, 3)),
    (3, 150, (64, None)),
    (1, 1, (1, 1)),
    (0, 8, (4, 4)),
    (4, 0, (2, 2)),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("T", "F", "ranks"), LORA_SHAPES)
def test_lora_share(T, F, ranks, dtype):
    check_lora(T, F, ranks, dtype)
    check_lora(T, F, ranks, dtype, "gelu_tanh")


@needs_triton
def test_the_kernels_in_the_interpreter(run_interpreted):
    run_interpreted(__file__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("T", "F"), SHAPES)
def test_interpreted_against_float64(T, F, dtype):
    with triton_everywhere():
        check_swiglu(T, F, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("T", "F"), SHAPES)
def test_interpreted_gelu_against_float64(T, F, dtype):
    with triton_everywhere():
        check_swiglu(T, F, dtype, activation="gelu_tanh")


@pytest.mark.parametrize(("T", "F", "ranks"), LORA_SHAPES)
def test_interpreted_gelu_lora_share(T, F, ranks):
    with triton_everywhere():
        check_lora(T, F, ranks, torch.float32, "gelu_tanh")


def test_interpreted_gates_far_from_zero():
    with triton_everywhere():
        test_gelu_gates_far_from_zero()
        test_gates_far_from_zero()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_interpreted_layouts_and_in_place(dtype):
    """Rows that lie apart are read and written where they are; other layouts through a copy; gate_up onto itself."""
    buffer = torch.full((6, 80), float("nan"), dtype=dtype)
    across = torch.full((40, 6), float("nan"), dtype=dtype)
    plain = torch.randn(6, 40).to(dtype)
    dproduct = torch.randn(20, 6).to(dtype).t()
    want = op.backward(dproduct, plain), op.forward(plain)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-3, "atol": 1e-3}
    for gate_up in (plain.clone(), buffer[:, 8:48], across.t()):
        gate_up.copy_(plain)
        with triton_everywhere(), poisoned():
            torch.testing.assert_close(op.forward(gate_up), want[1], **tolerance)
            apart = op.backward(dproduct, gate_up)
            assert op.backward(dproduct, gate_up, gate_up) is gate_up
        torch.testing.assert_close(apart, want[0], **tolerance)
        assert torch.equal(apart, gate_up)
    assert buffer[:, :8].isnan().all() and buffer[:, 48:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("T", "F", "ranks"), LORA_SHAPES)
def test_interpreted_lora_share(T, F, ranks, dtype):
    with triton_everywhere():
        check_lora(T, F, ranks, dtype)
