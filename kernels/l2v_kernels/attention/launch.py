"""Launchers of the attention kernels. Imported only where Triton is installed."""

import functools

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from l2v_kernels.attention.config import Config
from l2v_kernels.attention.kernel_forward import forward_kernel
from l2v_kernels.attention.kernel_key import key_gradient_kernel
from l2v_kernels.attention.kernel_query import query_gradient_kernel
from l2v_kernels.attention.settings import Settings
from l2v_kernels.attention.tables import TokenTables
from l2v_kernels.attention.tune import choose
from l2v_kernels.launching import PRECISION, cdiv, on_device, power_of_2, unit_stride
from l2v_kernels.philox import keep_scale, threshold

_LOG2E = 1.4426950408889634
MAX_GROUP = 8


@on_device
def forward(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    tables: TokenTables,
    seeds_S: torch.Tensor | None,
    settings: Settings,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """o [T, H, D] in q's dtype and lse fp32 [H, T]."""
    T, H, _ = q_THD.shape
    q_THD, k_TKD, v_TKD = (unit_stride(x) for x in (q_THD, k_TKD, v_TKD))
    o_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
    lse_HT = torch.empty((H, T), dtype=torch.float32, device=q_THD.device)
    if o_THD.numel() == 0:
        return o_THD, lse_HT
    group, constants = _constants(q_THD, k_TKD, settings)

    def run(config):
        grid = (cdiv(T * group, config.block_m), H // group)
        of_queries, of_keys = _tiles(config, group, constants["BLOCK_D"])
        forward_kernel[grid](
            of_queries(q_THD),
            of_keys(k_TKD),
            of_keys(v_TKD),
            o_THD,
            lse_HT,
            *_tables(tables, seeds_S, settings),
            *_strides(q_THD, k_TKD, v_TKD, o_THD),
            *_scales(settings),
            FOLD=settings.softcap is None and settings.scale > 0,
            **constants,
            **config.meta(),
        )

    config = config or choose(
        "forward", q_THD, tables.n_segments, group, _variant(constants), can_tma(q_THD, k_TKD, v_TKD), run
    )
    run(config)
    return o_THD, lse_HT


@on_device
def backward(
    do_THD: torch.Tensor,
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    o_THD: torch.Tensor,
    lse_HT: torch.Tensor,
    tables: TokenTables,
    seeds_S: torch.Tensor | None,
    settings: Settings,
    configs: tuple[Config, Config] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq [T, H, D], dk and dv [T, K, D]. configs: of the query and of the key gradient.

    Where q, k and v are parts of one buffer, their gradients lie side by side in one as well, [T, (H + 2 K) D].
    """
    T, H, _ = q_THD.shape
    K = k_TKD.shape[1]
    do_THD, q_THD, k_TKD, v_TKD = (unit_stride(x) for x in (do_THD, q_THD, k_TKD, v_TKD))
    dq_THD, dk_TKD, dv_TKD = _gradients(q_THD, k_TKD, v_TKD)
    if q_THD.numel() == 0:
        return dq_THD, dk_TKD.zero_(), dv_TKD.zero_()
    group, constants = _constants(q_THD, k_TKD, settings)
    # lse / log(2) and delta in the order of the tiles' rows: half, group, token, head of the group. Room for a multiple of 16
    # tokens: the stride is then always divisible by 16, and no kernel is compiled a second time for where it is not.
    room = (2 * H // group, 16 * cdiv(T, 16), group)
    statistics = torch.empty(room, dtype=torch.float32, device=lse_HT.device)[:, :T]

    def run_query(config):
        of_queries, of_keys = _tiles(config, group, constants["BLOCK_D"])
        query_gradient_kernel[(cdiv(T * group, config.block_m), H // group)](
            of_queries(q_THD), of_keys(k_TKD), of_keys(v_TKD), o_THD, of_queries(do_THD), dq_THD, lse_HT, statistics,
            *_tables(tables, seeds_S, settings), *_strides(q_THD, k_TKD, v_TKD, o_THD, do_THD, dq_THD),
            statistics.stride(0), settings.scale, *_scales(settings), **constants, **config.meta(),
        )  # fmt: skip

    def run_key(config):
        of_queries, of_keys = _tiles(config, group, constants["BLOCK_D"])
        described = config.tma and group >= 4
        of_statistics = _described(described, [1, config.block_m // group, group], statistics)
        positions = 16 * tables.n_blocks if threshold(settings.dropout_p) else T
        key_gradient_kernel[(cdiv(positions, config.block_n), K)](
            of_queries(q_THD), k_TKD, v_TKD, of_queries(do_THD), of_keys(dk_TKD), of_keys(dv_TKD), of_statistics,
            *_tables(tables, seeds_S, settings), *_strides(q_THD, k_TKD, v_TKD, do_THD, dk_TKD), statistics.stride(0),
            settings.scale, *_scales(settings), **constants, **config.meta(),
        )  # fmt: skip

    of_query, of_key = configs or (None, None)
    choice = (q_THD, tables.n_segments, group, _variant(constants), can_tma(q_THD, k_TKD, v_TKD, do_THD))
    # In this order: the first kernel writes the delta that the second reads.
    run_query(of_query or choose("query", *choice, run_query))
    run_key(of_key or choose("key", *choice, run_key))
    return dq_THD, dk_TKD, dv_TKD


def head_group(n_query_heads: int, n_key_heads: int) -> int:
    """How many query heads share a tile: the largest power of two up to MAX_GROUP that divides those of a key head."""
    ratio = n_query_heads // n_key_heads
    return min(ratio & -ratio, MAX_GROUP)


def _gradients(*inputs_THD):
    if len({x.untyped_storage().data_ptr() for x in inputs_THD}) > 1:
        return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs_THD]
    sizes = [x.shape[1] * x.shape[2] for x in inputs_THD]
    whole = inputs_THD[0].new_empty((inputs_THD[0].shape[0], sum(sizes)))
    return [part.unflatten(1, x.shape[1:]) for part, x in zip(whole.split(sizes, 1), inputs_THD, strict=True)]


def _constants(q_THD, k_TKD, settings):
    group = head_group(q_THD.shape[1], k_TKD.shape[1])
    head_dim = q_THD.shape[2]
    return group, {
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, power_of_2(head_dim)),
        "GROUP": group,
        "GROUPS_PER_KEY_HEAD": q_THD.shape[1] // k_TKD.shape[1] // group,
        "CAUSAL": settings.causal,
        "WINDOW": settings.window is not None,
        "SOFTCAP": settings.softcap is not None,
        "DROPOUT": threshold(settings.dropout_p) > 0,
        "PRECISION": PRECISION,
    }


def can_tma(*tensors: torch.Tensor) -> bool:
    """Whether tensor descriptors can describe all of them: 16-byte addresses and strides (cuTensorMapEncodeTiled)."""
    return all(
        x.element_size() == 2 and x.data_ptr() % 16 == 0 and all(s > 0 and s % 8 == 0 for s in x.stride()[:2])
        for x in tensors
    )


def _tiles(config, group, block_d):
    """How the kernels take queries and keys: with TMA as descriptors of their tiles, else as they are."""
    return (
        functools.partial(_described, config.tma, [config.block_m // group, group, block_d]),
        functools.partial(_described, config.tma, [config.block_n, 1, block_d]),
    )


def _described(tma, block, x):
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block) if tma else x


def _variant(constants):
    """What is compiled in besides shapes, and so decides which configuration is faster."""
    return " ".join(name.lower() for name in ("CAUSAL", "WINDOW", "SOFTCAP", "DROPOUT") if constants[name]) or "plain"


def _tables(tables, seeds_S, settings):
    seeds_S = seeds_S.contiguous() if threshold(settings.dropout_p) else tables.segment_T
    return (
        tables.start_T,
        tables.end_T,
        tables.segment_T,
        tables.first_block_T,
        tables.block_first_X,
        tables.block_end_X,
        seeds_S,
        tables.n_tokens,
        tables.n_blocks,
    )


def _strides(*tensors):
    return [stride for x in tensors for stride in x.stride()[:2]]


def _scales(settings):
    if settings.softcap is None:
        scale_in, scale_out = settings.scale * _LOG2E, 0.0
    else:
        scale_in, scale_out = settings.scale / settings.softcap, settings.softcap * _LOG2E
    return (
        scale_in,
        scale_out,
        settings.window or 0,
        settings.stream,
        threshold(settings.dropout_p),
        keep_scale(settings.dropout_p),
    )
