"""Cross-entropy of a linear head on labelled positions: no full logits in memory, and the weight may be trained."""

import os

import torch

from l2v_kernels.linear_cross_entropy.op import LinearCrossEntropy, in_chunks
from l2v_kernels.spans import spanned

__all__ = ["linear_cross_entropy"]


@spanned("head")
def linear_cross_entropy(
    hidden_LE: torch.Tensor,
    weight_VE: torch.Tensor,
    labels_L: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    count: float | torch.Tensor | None = None,
    workspace: int | None = None,
    check_values: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over L of -log softmax(hidden weight^T + bias)[label], divided by count; and how many labels are the argmax.

    Only a chunk of rows of logits exists at a time. Where hidden requires grad, its gradient is computed in the forward from
    the chunk at hand (two matmuls in total), and the backward multiplies it by the incoming one; otherwise there is one
    matmul. So is that of the weight where it requires grad (a third matmul, and [V, E] kept for the backward; over several
    chunks it is summed in fp32). No atomics: the same inputs give the same bits.

    Args:
        hidden_LE: [L, E] fp32, bf16 or fp16 (fp64 by the reference), any strides. L = 0 gives a loss of 0.
        weight_VE: the head's weight [V, E] in hidden's dtype; frozen, or trained with the embedding that it is tied to.
        labels_L: int64 [L], each from 0 to V - 1.
        bias_V: the head's bias [V] in hidden's dtype, frozen.
        count: what the sum is divided by, for example the labels of a whole step: a number, or a tensor without dimensions,
            which is not read on the host. Default: L.
        workspace: bytes for a chunk of logits; a chunk has at least one row. Default: 768 MiB on CUDA, 128 MiB on a CPU.
        check_values: check the labels' range; default: always on the CPU, on CUDA with L2V_CHECK=1. Unchecked, a label out
            of range makes the loss and its row's gradient NaN, reads nothing outside the weight and needs no host sync.

    Returns:
        The loss, fp32 (fp64 for fp64), without dimensions, differentiable once in hidden and weight; and hits, int64 without
        dimensions: the number of labels whose logit is the largest (of equal logits the first, as `argmax` has it).

    Raises:
        ValueError: shapes, dtypes, devices or labels are outside the above, or the bias requires grad.

    Source: chunks of logits whose gradient is computed in the forward: Hsu et al. 2024 (Liger Kernel), arXiv 2410.10989.
    """
    V, shapes = _check(hidden_LE, weight_VE, labels_L, bias_V)
    wide = torch.promote_types(hidden_LE.dtype, torch.float32)
    divisor = max(len(hidden_LE), 1) if count is None else _divisor(count, wide, shapes)
    if workspace is None:
        workspace = (768 if hidden_LE.is_cuda else 128) << 20
    elif workspace < 1:
        raise ValueError(f"workspace is bytes for logits and must be at least 1, got {workspace}")
    if check_values is None:
        check_values = not hidden_LE.is_cuda or os.environ.get("L2V_CHECK") == "1"
    if check_values:
        _check_labels(labels_L, V)
    arguments = (hidden_LE, weight_VE, bias_V, labels_L, workspace)
    if torch.is_grad_enabled() and (hidden_LE.requires_grad or weight_VE.requires_grad):
        total, hits = LinearCrossEntropy.apply(*arguments)
    else:
        losses_L, hits_L, _ = in_chunks(*arguments, gradient=False)
        total, hits = losses_L.sum(), hits_L.sum()
    return total / divisor, hits


def _check(hidden_LE, weight_VE, labels_L, bias_V):
    """(V, the shapes for a message). Raises ValueError for shapes, dtypes, devices and gradients."""
    tensors = {"hidden": hidden_LE, "weight": weight_VE, "labels": labels_L, "bias": bias_V}
    tensors = {name: x for name, x in tensors.items() if x is not None}
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
    if hidden_LE.ndim != 2 or weight_VE.ndim != 2 or hidden_LE.shape[1] != weight_VE.shape[1] or not weight_VE.numel():
        raise ValueError(f"linear_cross_entropy needs hidden [L, E] and weight [V, E], E and V above 0, got {shapes}")
    L, V = len(hidden_LE), len(weight_VE)
    if labels_L.shape != (L,) or (bias_V is not None and bias_V.shape != (V,)):
        raise ValueError(f"linear_cross_entropy needs labels [L] and bias [V], got {shapes}")
    floating = [x.dtype for name, x in tensors.items() if name != "labels"]
    if not hidden_LE.is_floating_point() or len(set(floating)) > 1 or labels_L.dtype != torch.int64:
        types = ", ".join(f"{name} {x.dtype}" for name, x in tensors.items())
        raise ValueError(
            f"hidden, weight and bias must have one floating dtype and labels int64, got {types} for {shapes}"
        )
    if len({x.device for x in tensors.values()}) > 1:
        devices = ", ".join(f"{name} {x.device}" for name, x in tensors.items())
        raise ValueError(f"all tensors must be on one device, got {devices} for {shapes}")
    if torch.is_grad_enabled() and bias_V is not None and bias_V.requires_grad:
        raise ValueError(
            "bias requires grad and would not get one: linear_cross_entropy is for a frozen bias. Freeze it with "
            f"bias.requires_grad_(False), or use torch.nn.functional.cross_entropy on the logits ({shapes})"
        )
    return V, shapes


def _divisor(count, dtype, shapes):
    """count as it divides a loss of this dtype. Raises ValueError where it cannot."""
    if isinstance(count, torch.Tensor):
        if count.ndim or count.requires_grad:
            raise ValueError(
                f"count is a number or a tensor without dimensions and gradient, got {tuple(count.shape)} for {shapes}"
            )
        return count.to(dtype)
    if not count > 0:
        raise ValueError(f"count must be above 0, got {count} for {shapes}")
    return count


def _check_labels(labels_L, V):
    """Raises ValueError naming the first label out of range. Syncs with the device."""
    bad = ((labels_L < 0) | (labels_L >= V)).nonzero().flatten()
    if len(bad):
        at = int(bad[0])
        raise ValueError(f"labels[{at}] is {int(labels_L[at])} and the head has {V} rows")
