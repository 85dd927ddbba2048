"""The kernels without the rest of l2v: packed attention and InfoNCE, each checked against plain PyTorch.

On the CPU the ops take their PyTorch reference, on a GPU their Triton kernels. T tokens, H heads, D head size, S texts,
E embedding size.
"""

import torch
from torch.nn import functional as F

from l2v_kernels import attention, info_nce, segment_pool

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [3, 7, 2, 12, 5, 9, 4, 6]  # eight texts, one after another, without padding
H, D, SCALE = 4, 32, 20.0


def plain_attention(q_THD, k_THD, v_THD):
    """Attention text by text."""
    parts = []
    for q, k, v in zip(*(x.split(LENGTHS) for x in (q_THD, k_THD, v_THD)), strict=True):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # heads first
        parts.append(F.scaled_dot_product_attention(q, k, v).transpose(0, 1))
    return torch.cat(parts)


def main() -> None:
    torch.manual_seed(0)
    cu_seqlens = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).to(DEVICE, torch.int32)
    q_THD, k_THD, v_THD = torch.randn(3, sum(LENGTHS), H, D, device=DEVICE).unbind()
    o_THD = attention(q_THD, k_THD, v_THD, cu_seqlens)
    difference = (o_THD - plain_attention(q_THD, k_THD, v_THD)).abs().max()
    print(f"attention: {len(LENGTHS)} texts, {sum(LENGTHS)} tokens, largest difference {difference:.1e}")

    weights_T = torch.ones(sum(LENGTHS), device=DEVICE)  # every token counts alike in the mean
    vectors_SE = segment_pool(o_THD.flatten(1), weights_T, cu_seqlens)
    queries_NE = vectors_SE[0::2].detach().requires_grad_()  # every second text is a question,
    answers_NE = vectors_SE[1::2].detach().requires_grad_()  # the text after it is its answer
    targets_N = torch.arange(len(queries_NE), device=DEVICE)
    loss = info_nce(queries_NE, answers_NE, targets_N, scale=SCALE)
    loss.backward()

    plain_NE = queries_NE.detach().clone().requires_grad_()
    cosines_NN = F.normalize(plain_NE, dim=-1) @ F.normalize(answers_NE.detach(), dim=-1).T
    plain = F.cross_entropy(SCALE * cosines_NN, targets_N)
    plain.backward()
    print(f"info_nce: loss {loss.item():.6f}, plain PyTorch {plain.item():.6f}")
    print(f"info_nce: gradient {queries_NE.grad.norm():.6f}, plain PyTorch {plain_NE.grad.norm():.6f}")


if __name__ == "__main__":
    main()
