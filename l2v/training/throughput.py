"""Training speed: tokens per second, model FLOPs utilisation (MFU) and peak memory.

Tokens are those that a step learns from, over all ranks: every text of every example (query, positive and negatives; both
views of SimCSE), once. There is no padding, and the filler token of an empty micro-batch does not count.

FLOPs are 4N per token, where N is the number of weights in the linear layers that each token passes through, without
embeddings and head: 2N for the forward and 2N for the gradients of the layers' inputs. Where the weights are frozen, the 2N that
their gradients need are absent; without LoRA FLOPs are 6N. LoRA, the matmuls inside attention (2% at 512 tokens), the second
forward of a gradient cache and recomputation do not count as useful work, so they lower MFU. What the last layer leaves out
because nobody reads it counts like the rest: at most a layer's share.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from l2v.machine import calibration, device_name, peak_flops

MAX_UNKNOWN_SHARE = 0.05  # of the weights; with more in layers of unknown kind there is no FLOP count
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def linear_parameters(decoder: nn.Module) -> int | None:
    """N of a decoder, without head and adapters; None if it cannot be determined from the modules.

    That is the case with experts, of which a token uses only some; with an image tower; and with layers of an unknown kind.
    Sizes are those of the layers, however their weights are stored (in 4 bits, or sharded over ranks).
    """
    inner: Any = decoder.get_base_model() if isinstance(decoder, PeftModel) else decoder
    config = inner.config
    if config.get_text_config() is not config or any((getattr(config, key, 0) or 0) > 1 for key in EXPERTS):
        return None
    counted, known = 0, set()
    for name, module in inner.named_modules():
        if "lora_" in name or isinstance(module, nn.Embedding):
            known |= set(map(id, module.parameters(recurse=False)))
        elif isinstance(module, nn.Linear | Conv1D):
            known |= set(map(id, module.parameters(recurse=False)))
            counted += (
                module.in_features * module.out_features if isinstance(module, nn.Linear) else module.nx * module.nf
            )
    others = sum(getattr(p, "ds_numel", p.numel()) for p in inner.parameters() if id(p) not in known)
    return counted if counted and others <= MAX_UNKNOWN_SHARE * counted else None


def peak_memory(device: torch.device) -> int:
    """Peak bytes: on a GPU those of tensors in this stage, on a CPU those of the process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Throughput:
    """Measures throughput between one log line and the next."""

    def __init__(
        self, decoder: nn.Module, device: torch.device, dtype: torch.dtype, *, world: int, tokens: int = 0
    ) -> None:
        """dtype: of the matmuls. world: ranks, on devices like this one. tokens: seen before the first step."""
        weights = linear_parameters(decoder)
        flops = 4 if isinstance(decoder, PeftModel) else 6  # of a weight, for each token
        found = calibration(device, dtype)
        rates = {"mfu": found and found.gemm_flops, "mfu_peak": peak_flops(device_name(device), dtype)}
        self.shares = {key: flops * weights / (world * rate) for key, rate in rates.items() if weights and rate}
        """MFU at one token per second."""
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.began, self.tokens = time.perf_counter(), tokens

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock: what runs inside (evaluation, a checkpoint) is not training."""
        at = time.perf_counter()
        try:
            yield
        finally:
            self.began += time.perf_counter() - at

    def row(self, tokens: int) -> dict[str, float]:
        """Throughput since the last row; call it after a wait for the device. tokens: seen by now.

        Keys: tokens_per_second; mfu, as a share of the measured rate of a large matmul; mfu_peak, as a share of the
        vendor's peak. A key is absent if its rate is unknown.
        """
        now = time.perf_counter()
        rate = (tokens - self.tokens) / max(now - self.began, 1e-9)
        self.began, self.tokens = now, tokens
        return {"tokens_per_second": round(rate, 1)} | {key: round(rate * x, 4) for key, x in self.shares.items()}


def summary(row: dict[str, Any]) -> str:
    """A row of metrics as text for the progress bar: `loss 2.1034, 21,034 tokens/s, MFU 75%`."""
    loss = "NaN or Inf" if row["loss"] is None else f"{row['loss']:.4f}"
    text = f"loss {loss}, {row['tokens_per_second']:,.0f} tokens/s"
    if "mfu" in row:
        return f"{text}, MFU {row['mfu']:.0%}"
    return f"{text}, MFU {row['mfu_peak']:.0%} of the peak" if "mfu_peak" in row else text
