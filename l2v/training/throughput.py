"""How fast training goes: real tokens a second, what share of the machine's arithmetic that is, and peak memory.

Tokens are those that a step learns from, over all ranks: every segment of every example (query, positive and negatives;
both views of SimCSE), once. There are no pads, and the token that fills a rank's empty micro-batch does not count.

FLOPs are 4N a token, N the weights of the linear layers that each token goes through, without embeddings and head: 2N
forward, and 2N for the gradients of the layers' inputs. Weights are frozen, so the 2N of their gradients that full training
has are not there. LoRA, attention's own products (2% at 512 tokens), the second forward of a gradient cache and what is
recomputed are no useful work and do not count: they lower the share, as they should.
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

UNCOUNTED = 0.05  # of the weights; more in layers of unknown kind, and there is no FLOP count
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def linear_parameters(decoder: nn.Module) -> int | None:
    """N of a decoder without its head, adapters apart; None where it cannot be read off the modules.

    That is: experts, of which a token goes through some; a decoder with a tower for images; layers of an unknown kind.
    Sizes are those of the layers, whatever their weights are stored as (4 bits, or parts on other ranks).
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
    return counted if counted and others <= UNCOUNTED * counted else None


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU the most that tensors held in this stage, on a CPU the most that the process held since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Throughput:
    """Rows of throughput between one log line and the next."""

    def __init__(
        self, decoder: nn.Module, device: torch.device, dtype: torch.dtype, *, world: int, tokens: int = 0
    ) -> None:
        """dtype: of the products. world: ranks, on devices like this one. tokens: seen before the first step."""
        weights = linear_parameters(decoder)
        found = calibration(device, dtype)
        rates = {"mfu": found and found.gemm_flops, "mfu_peak": peak_flops(device_name(device), dtype)}
        self.shares = {key: 4 * weights / (world * rate) for key, rate in rates.items() if weights and rate}
        """Of the machine, a token a second."""
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.began, self.tokens = time.perf_counter(), tokens

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens meanwhile (evaluation, a checkpoint) is not training and takes no time."""
        at = time.perf_counter()
        try:
            yield
        finally:
            self.began += time.perf_counter() - at

    def row(self, tokens: int) -> dict[str, float]:
        """Since the last row; tokens: seen by now.

        Keys: tokens_per_second; mfu, against the measured rate of a large product; mfu_peak, against the maker's. A rate
        that is not known leaves its key out. After a wait for the device.
        """
        now = time.perf_counter()
        rate = (tokens - self.tokens) / max(now - self.began, 1e-9)
        self.began, self.tokens = now, tokens
        return {"tokens_per_second": round(rate, 1)} | {key: round(rate * x, 4) for key, x in self.shares.items()}


def summary(row: dict[str, Any]) -> str:
    """A row of metrics as the progress bar has it: `loss 2.1034, 21,034 tokens/s, MFU 75%`."""
    loss = "NaN or Inf" if row["loss"] is None else f"{row['loss']:.4f}"
    text = f"loss {loss}, {row['tokens_per_second']:,.0f} tokens/s"
    if "mfu" in row:
        return f"{text}, MFU {row['mfu']:.0%}"
    return f"{text}, MFU {row['mfu_peak']:.0%} of the peak" if "mfu_peak" in row else text
