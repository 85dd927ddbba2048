"""int8 of an ONNX graph: dynamic, a scale per output channel, without the layers that suffer most."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from l2v.formats.onnx_engine import padded
from l2v.formats.onnx_graph import Graph

SENSITIVE = 0.1
"""A layer stays in float32 if int8 moves its output by more than this share of its norm. Where one input channel is a hundred
times the others, as before the last matmul of some layers, one scale for all of them leaves the others no bits."""
WEIGHT_LEVELS = 63
"""Of 7 bits: processors without VNNI add pairs of products in 16 bits, and those of 8 bits overflow."""


@torch.no_grad()
def sensitive_layers(graph: Graph, ids: Sequence[Sequence[int]], starts: Sequence[int]) -> list[str]:
    """Names of the linear layers that int8 moves by more than `SENSITIVE`, computed layer by layer on these texts."""
    errors: dict[str, list[float]] = {}
    layers = {name: module for name, module in graph.named_modules() if isinstance(module, nn.Linear)}

    def measure(name: str) -> Any:
        def hook(module: nn.Linear, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            moved = _rounded(args[0], module) - out
            errors.setdefault(name, []).append(float(moved.norm() / out.norm().clamp(min=1e-30)))

        return hook

    hooks = [module.register_forward_hook(measure(name)) for name, module in layers.items()]
    try:
        for each, start in zip(ids, starts, strict=True):
            feed = {name: torch.from_numpy(value) for name, value in padded([each]).items()}
            graph(**feed, pool_start=torch.tensor([start]))
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name, found in errors.items() if sum(found) / len(found) > SENSITIVE]


def _rounded(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """The layer's output as ONNX Runtime computes it: unsigned 8 bits for all inputs together, signed ones per channel."""
    low, high = float(x.min().clamp(max=0)), float(x.max().clamp(min=0))
    step = max(high - low, 1e-30) / 255
    zero = round(-low / step)
    inputs = ((x / step).round() + zero).clamp(0, 255).sub(zero) * step
    scale = layer.weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / WEIGHT_LEVELS
    return nn.functional.linear(inputs, (layer.weight / scale).round() * scale, layer.bias)


def quantize(source: Path, target: Path, floats: Sequence[str]) -> None:
    """Write `target`, the graph in `source` with int8 matmuls of weights but for the layers named in `floats`."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it advises a preprocessing that was done at the export
    try:
        quantize_dynamic(
            source, target, op_types_to_quantize=["MatMul"], per_channel=True, reduce_range=True,
            weight_type=QuantType.QInt8, nodes_to_exclude=list(floats), extra_options={"MatMulConstBOnly": True},
            use_external_data_format=source.with_name(source.name + ".data").is_file(),
        )  # fmt: skip
    finally:
        logger.setLevel(level)
