"""lora_linear on a GPU: bf16, the compiled kernels, full sizes, no host sync."""

import pytest
import torch
from test_lora_linear import as64, gradients, problem

from l2v_kernels.lora_linear import InputDropout, Linears, lora_linear
from l2v_kernels.lora_linear.reference import lora_linear_reference
from l2v_kernels.lora_linear.settings import Adapter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_gpu(x, weights, bias, adapters, keys):
    """The same problem on the device, with leaves of its own."""

    def move(t):
        return None if t is None else t.detach().cuda().requires_grad_(t.requires_grad)

    found = tuple(Adapter(a.part, move(a.a_RE), move(a.b_OR), a.scaling, a.stream) for a in adapters)
    keys = InputDropout(keys.p, keys.seeds_T.cuda(), keys.rows_T.cuda())
    return move(x), [move(w) for w in weights], [move(b) for b in bias], found, keys


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("tokens", "width", "sizes", "ranks", "p"),
    [
        (999, 4096, (512, 128, 128), (16, 16, 16), 0.05),
        (301, 14336, (256,), (16,), 0.05),
        (130, 576, (192, 96), (7, 64), 0.3),
        (1, 64, (16, 16, 16), (None, 3, None), 0.0),
        (0, 64, (16, 16), (4, 4), 0.1),
    ],
    ids=["qkv", "down", "odd-ranks", "one-token", "none"],
)
def test_at_most_twice_the_error_of_pytorch(tokens, width, sizes, ranks, p, dtype):
    given = problem(dtype, tokens=tokens, width=width, sizes=sizes, ranks=ranks, p=p, biases=False)
    x, weights, bias, adapters, keys = on_gpu(*given)
    dy = torch.randn(tokens, sum(sizes), device="cuda").to(dtype)
    exact_x, *exact = as64(x, weights, bias, adapters)
    want = lora_linear_reference(exact_x, *exact, keys)
    wanted = [want, *gradients(want, exact_x, exact[2], dy)]
    plain = lora_linear_reference(x, weights, bias, adapters, keys)
    plains = [plain, *gradients(plain, x, adapters, dy)]
    ours = lora_linear(x, Linears(weights, bias), adapters, keys)
    for got, same_dtype, exact_value in zip([ours, *gradients(ours, x, adapters, dy)], plains, wanted, strict=True):
        if exact_value.numel():
            error, allowed = ((v.double() - exact_value).abs().max() for v in (got, same_dtype))
            assert error <= 2 * allowed + 1e-5 * exact_value.abs().max()


def test_no_host_sync_and_the_same_bits_twice():
    x, weights, bias, adapters, keys = on_gpu(*problem(torch.bfloat16, tokens=2000, width=512, p=0.1))
    dy = torch.randn(2000, 40, device="cuda", dtype=torch.bfloat16)

    def run():
        y = lora_linear(x, Linears(weights, bias), adapters, keys)
        return [y.detach(), *gradients(y, x, adapters, dy)]

    first = run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
