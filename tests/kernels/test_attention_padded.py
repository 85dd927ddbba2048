import pytest
import torch
from support.attention_cases import plain

from l2v_kernels import attention_padded

MASKS = {
    "left": [[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]],
    "holes": [[0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]],
}


@pytest.mark.parametrize("chosen", [{}, {"causal": True, "window": 3}, {"dropout_p": 0.3, "stream": 4}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_equals_plain_attention_on_the_tokens(mask, dtype, chosen):
    mask = torch.tensor(mask, dtype=dtype)
    real, seeds = mask != 0, torch.tensor([5, -6, 7])
    tensors = [torch.randn(3, heads, 6, 16) for heads in (4, 2, 2)]
    grad = torch.randn(3, 4, 6, 16)
    for x in tensors:
        # What stands at padding must not matter, whatever it is.
        x.masked_fill_(~real[:, None, :, None], float("nan"))
    leaves = [x.clone().requires_grad_() for x in tensors]
    o = attention_padded(*leaves, mask, seeds_B=seeds, **chosen)
    o.backward(grad)
    packed = [x.transpose(1, 2)[real].double().requires_grad_() for x in tensors]
    want = plain(*packed, real.sum(1).tolist(), seeds, **chosen)
    want.backward(grad.transpose(1, 2)[real].double())
    assert o.shape == (3, 4, 6, 16)
    assert torch.equal(o.transpose(1, 2)[~real], torch.zeros(int((~real).sum()), 4, 16))
    torch.testing.assert_close(o.transpose(1, 2)[real].double(), want, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(leaves, packed, strict=True):
        torch.testing.assert_close(ours.grad.transpose(1, 2)[real].double(), theirs.grad, rtol=1e-4, atol=1e-5)
        assert not ours.grad.transpose(1, 2)[~real].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask_Bt": torch.ones(2, 1, 6, 6, dtype=torch.bool)}, r"attention_mask .*\(2, 1, 6, 6\)"),
        ({"attention_mask_Bt": torch.ones(2, 6)}, "attention_mask"),
        ({"attention_mask_Bt": torch.ones(6, 2, dtype=torch.bool)}, "attention_mask"),
        ({"q_BHtD": torch.zeros(2, 6, 16)}, r"q \[B, H, t, D\]"),
        ({"k_BKtD": torch.zeros(2, 2, 5, 16)}, r"k \(2, 2, 5, 16\)"),
        ({"seeds_B": torch.zeros(3, dtype=torch.int64)}, "seeds_B"),
        ({"dropout_p": 0.3}, "seeds_S"),
    ],
)
def test_bad_input(change, message):
    kv = torch.zeros(2, 2, 6, 16)
    good = {"q_BHtD": torch.zeros(2, 4, 6, 16), "k_BKtD": kv, "v_BKtD": kv}
    good["attention_mask_Bt"] = torch.ones(2, 6, dtype=torch.bool)
    attention_padded(**good)
    with pytest.raises(ValueError, match=message):
        attention_padded(**{**good, **change})
