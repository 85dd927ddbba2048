"""A decoder as a value that can be pickled: workers of Spark, Ray, joblib and multiprocessing get encoders so."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from l2v.model.packed import PackedDecoder


def to_portable(model: PackedDecoder) -> dict[str, Any]:
    """The decoder without its fused forwards, which are functions of this process, and its options; weights on the CPU.

    The weights are shared with the model as long as they are not pickled.
    """
    return {
        "decoder": _plain(model.decoder, {}),
        "causal": model.causal,
        "backend": model.backend,
        "pooling": model.pooling,
        "layers": "auto" if model.fused is not None else "plain",
    }


def from_portable(value: dict[str, Any]) -> PackedDecoder:
    """The reverse of `to_portable`, in eval mode, on the CPU."""
    if value["backend"] == "l2v":
        from l2v_kernels.integrations.transformers import register

        register()  # a process that has loaded nothing yet
    options = {key: value[key] for key in ("causal", "backend", "pooling", "layers")}
    return PackedDecoder(value["decoder"], **options).eval()


def _plain(module: nn.Module, known: dict[int, Any]) -> Any:
    """A copy of a module's tree, with the same tensors and without forwards that were put on single modules."""
    if id(module) in known:
        return known[id(module)]
    copy = known[id(module)] = module.__new__(type(module))
    copy.__dict__ |= {key: value for key, value in module.__dict__.items() if key != "forward"}
    copy._modules = {name: child and _plain(child, known) for name, child in module._modules.items()}
    for kind in ("_parameters", "_buffers"):
        tensors = getattr(module, kind)
        setattr(
            copy, kind, {name: tensor if tensor is None else _on_cpu(tensor, known) for name, tensor in tensors.items()}
        )
    return copy


def _on_cpu(tensor: torch.Tensor, known: dict[int, Any]) -> torch.Tensor:
    if id(tensor) not in known:  # tied weights stay one
        moved = tensor if tensor.device.type == "cpu" else tensor.detach().cpu()
        known[id(tensor)] = (
            nn.Parameter(moved, False) if isinstance(tensor, nn.Parameter) and moved is not tensor else moved
        )
    return known[id(tensor)]
