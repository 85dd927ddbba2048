"""What a launch specialises a kernel on does not change with the size of a batch: else it compiles again in mid-training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.info_nce_cases import ours, problem

pytest.importorskip("triton")

from l2v_kernels.attention import launch as attention
from l2v_kernels.attention.config import Config
from l2v_kernels.attention.settings import Settings
from l2v_kernels.attention.tables import TokenTables
from l2v_kernels.info_nce import engine, kernel_elementwise, paths
from l2v_kernels.lora_linear import launch as lora_linear
from l2v_kernels.lora_linear.settings import Adapter, Adapters, InputDropout
from l2v_kernels.rms_norm import kernel as rms_norm

Facts = set[tuple[str, ...]]


class Watched:
    """In place of a kernel: notes what a compiled one would be specialised on, and runs nothing."""

    def __init__(self, kernel: Any, into: Facts) -> None:
        self.kernel, self.into = kernel, into

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            found = [self.kernel.fn.__name__]
            for parameter, value in zip(self.kernel.params, arguments, strict=False):
                if isinstance(value, int) and not parameter.do_not_specialize:
                    found.append(f"{parameter.name}: {'16' if value % 16 == 0 else value if value == 1 else 'any'}")
            self.into.add((*found, *(f"{name}={value}" for name, value in sorted(constants.items()))))

        return launch


@pytest.mark.parametrize("prefixes", [None, (16, 32)], ids=["one prefix", "two"])
def test_info_nce_at_any_number_of_candidates(monkeypatch, prefixes):
    found: Facts = set()
    names = ("statistics_kernel", "coefficients_kernel", "norms_kernel", "finish_kernel")
    for name in names:
        monkeypatch.setattr(kernel_elementwise, name, Watched(getattr(kernel_elementwise, name), found))
    monkeypatch.setattr(engine, "choose", lambda *_: paths.Chunked())
    for N, M in ((32, 48), (32, 51), (31, 48), (7, 17)):
        tensors, targets, chosen = problem(N, M, 32, ids=1, prefixes=prefixes)
        ours(tensors, targets, chosen, workspace=1 << 20)
    assert len(found) == len(names), "\n".join(map(str, sorted(found)))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_attention_at_any_number_of_tokens(monkeypatch, dropout_p):
    found: Facts = set()
    names = ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel")
    for name in names:
        monkeypatch.setattr(attention, name, Watched(getattr(attention, name), found))
    tile = Config(16, 16, 4, 1)
    for T in (32, 33, 34, 36):
        tables = TokenTables.build(torch.tensor([0, 5, T], dtype=torch.int32), T)
        q_THD, (k_TKD, v_TKD) = torch.zeros(T, 4, 16), torch.zeros(2, T, 1, 16)
        settings, seeds_S = Settings(0.25, dropout_p), torch.zeros(2, dtype=torch.int64)
        o_THD, lse_HT = attention.forward(q_THD, k_TKD, v_TKD, tables, seeds_S, settings, tile)
        attention.backward(o_THD, q_THD, k_TKD, v_TKD, o_THD, lse_HT, tables, seeds_S, settings, (tile, tile))
    assert len(found) == len(names), "\n".join(map(str, sorted(found)))


def test_sums_of_any_number_of_adapters(monkeypatch):
    """q, k and v, gate and up, and a linear alone share a kernel; each kernel more is compiled in every stage."""
    found: Facts = set()
    for name in ("lora_up_backward_kernel", "up_sums_kernel"):
        monkeypatch.setattr(lora_linear, name, Watched(getattr(lora_linear, name), found))
    for outputs in ((64, 16, 16), (96, 96), (64,)):
        sizes, rank = tuple(outputs), 16
        group = Adapters(
            [Adapter(i, torch.zeros(rank, 32), torch.zeros(size, rank), 1.0) for i, size in enumerate(sizes)]
        )
        xa, db = torch.zeros(7, rank * len(sizes)), torch.zeros(rank * sum(sizes))
        lora_linear.up_backward(
            torch.zeros(7, sum(sizes)), xa, sizes, group, InputDropout(), torch.empty_like(xa), db, None
        )
    assert len([facts for facts in found if facts[0] == "up_sums_kernel"]) == 1, "\n".join(map(str, sorted(found)))


def test_a_norm_and_the_same_norm_again(monkeypatch):
    """The forward that a backward recomputes from the saved rstd is the kernel of the first forward."""
    found: Facts = set()
    monkeypatch.setattr(rms_norm, "rms_norm_forward_kernel", Watched(rms_norm.rms_norm_forward_kernel, found))
    for T in (1, 7, 32):
        x, weight, y, rstd = torch.zeros(T, 64), torch.zeros(64), torch.zeros(T, 64), torch.zeros(T)
        for known in (False, True):
            rms_norm.launch_forward(x, None, weight, 1e-5, None, y, rstd, known=known)
    assert len(found) == 1, "\n".join(map(str, sorted(found)))
