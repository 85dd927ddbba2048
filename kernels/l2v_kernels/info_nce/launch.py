"""Launches of the InfoNCE kernels on a tile. Arguments and results as in `elementwise`."""

import functools

import torch
import triton

from l2v_kernels.info_nce import config, kernel_elementwise, kernel_fused
from l2v_kernels.info_nce.settings import Settings
from l2v_kernels.info_nce.tiles import Tile


def inverse_norms(x_nE: torch.Tensor, settings: Settings) -> torch.Tensor:
    """float64 [P, n]: 1 / norm of each prefix, 0 for a zero vector."""
    n, P = len(x_nE), len(settings.prefixes)
    out_Pn = torch.empty(P, n, dtype=torch.float64, device=x_nE.device)
    if n:
        kernel_elementwise.norms_kernel[(triton.cdiv(n, config.NORMS["BLOCK_R"]),)](
            x_nE, _bounds(settings.prefixes, x_nE.device), out_Pn, n, x_nE.stride(0), P, P=P,
            ALIGN=_alignment(settings.prefixes), **config.NORMS,
        )  # fmt: skip
    return out_Pn


def statistics(tile: Tile, planes_PRC, m_PR, l_PR, pair_PR) -> None:
    """Carries m, l and pair [P, R] over a tile's planes, in place."""
    P, R, C = planes_PRC.shape
    if not R * C:
        return
    chosen = config.elementwise(P)[0]
    kernel_elementwise.statistics_kernel[(triton.cdiv(R, chosen.block_r),)](
        planes_PRC,
        m_PR,
        l_PR,
        m_PR if pair_PR is None else pair_PR,
        *_who(tile),
        R,
        C,
        planes_PRC.stride(1),
        planes_PRC.stride(0),
        m_PR.stride(0),
        *_strides(tile),
        tile.first_column,
        tile.first_number,
        P,
        P=P,
        PREFIXES=triton.next_power_of_2(P),
        PAIR=pair_PR is not None,
        **_flags(tile),
        **chosen.meta(products=False),
    )


def coefficients(
    tile: Tile, planes_PRC, lse_PR, row_out_PR, out_PRC, row_sums_PR, column_sums_PC,
) -> None:  # fmt: skip
    """Writes out [P, R, C] and adds to the sums."""
    P, R, C = out_PRC.shape
    if not R * C:
        return
    chosen = config.elementwise(P)[1]
    grid = (triton.cdiv(R, chosen.block_r), triton.cdiv(C, chosen.block_c))
    with _Sums(P, R, C, grid, out_PRC.device, row_sums_PR, column_sums_PC) as sums:
        kernel_elementwise.coefficients_kernel[grid](
            planes_PRC,
            out_PRC,
            *sums,
            *_who(tile, lse_PR, row_out_PR),
            R,
            C,
            out_PRC.stride(1),
            out_PRC.stride(0),
            *_strides(tile, lse_PR, row_out_PR),
            tile.first_column,
            tile.first_number,
            P,
            P=P,
            MINUS=tile.block.minus,
            **_flags(tile),
            **chosen.meta(products=False),
        )


def fused_statistics(tile: Tile, x_RE, m_PR, l_PR, pair_PR, settings: Settings) -> None:
    """As `statistics`, from the embeddings of the tile's rows."""
    y_CE = tile.block.columns.x_nE[tile.columns]
    (R, C), P = tile.shape, len(settings.prefixes)
    if not R * C:
        return
    chosen = _tiles(tile, x_RE, P)[0]
    row_blocks = triton.cdiv(R, chosen.block_r)
    # Where there are few rows, columns are split, so that every multiprocessor has a few programs.
    splits = max(1, min(triton.cdiv(C, chosen.block_c), 4 * _multiprocessors(x_RE.device) // row_blocks))
    width = triton.cdiv(triton.cdiv(C, splits), chosen.block_c) * chosen.block_c
    splits = triton.cdiv(C, width)
    parts = torch.empty(3, splits, P, R, dtype=torch.float32, device=x_RE.device)
    kernel_fused.fused_statistics_kernel[(row_blocks, splits)](
        x_RE,
        y_CE,
        _bounds(settings.prefixes, x_RE.device),
        *parts,
        *_who(tile),
        R,
        C,
        width,
        x_RE.stride(0),
        y_CE.stride(0),
        *_strides(tile),
        tile.first_column,
        tile.first_number,
        P,
        P=P,
        PREFIXES=triton.next_power_of_2(P),
        **_flags(tile),
        **_products(settings, chosen, x_RE.dtype),
    )
    part_m, part_l, part_pair = parts
    top_PR = torch.maximum(m_PR, part_m.amax(0))
    shift_PR = torch.where(top_PR == -torch.inf, 0, top_PR)
    l_PR.mul_((m_PR - shift_PR).exp()).add_((part_l * (part_m - shift_PR).exp()).sum(0))
    m_PR.copy_(top_PR)
    if pair_PR is not None:
        own_R = tile.targets_R - tile.first_column
        pair_PR.copy_(torch.where((own_R >= 0) & (own_R < C), part_pair.sum(0), pair_PR))


def fused_coefficients(
    tile: Tile, x_RE, lse_PR, row_out_PR, out_PRC, row_sums_PR, column_sums_PC,
    settings: Settings,
) -> None:  # fmt: skip
    """As `coefficients`, from the embeddings of the tile's rows."""
    y_CE = tile.block.columns.x_nE[tile.columns]
    P, R, C = out_PRC.shape
    if not R * C:
        return
    chosen = _tiles(tile, x_RE, P)[1]
    grid = (triton.cdiv(R, chosen.block_r), triton.cdiv(C, chosen.block_c))
    with _Sums(P, R, C, grid, out_PRC.device, row_sums_PR, column_sums_PC) as sums:
        kernel_fused.fused_coefficients_kernel[(grid[0] * grid[1],)](
            x_RE,
            y_CE,
            _bounds(settings.prefixes, x_RE.device),
            out_PRC,
            *sums,
            *_who(tile, lse_PR, row_out_PR),
            R,
            C,
            x_RE.stride(0),
            y_CE.stride(0),
            out_PRC.stride(1),
            out_PRC.stride(0),
            *_strides(tile, lse_PR, row_out_PR),
            tile.first_column,
            tile.first_number,
            P,
            P=P,
            MINUS=tile.block.minus,
            GROUP=config.GROUP,
            **_flags(tile),
            **_products(settings, chosen, x_RE.dtype),
        )


def finish(sum_RE, x_RE, along_PR, unscale, out_RE, settings: Settings) -> None:
    """out = sum * unscale - x * along, segment by segment; what lies beyond the last prefix is 0."""
    for s, (begin, end) in enumerate(settings.segments):
        grid = (triton.cdiv(len(x_RE), config.FINISH["BLOCK_R"]), triton.cdiv(end - begin, config.FINISH["BLOCK_E"]))
        if not len(x_RE):
            break
        kernel_elementwise.finish_kernel[grid](
            sum_RE,
            x_RE,
            along_PR[s],
            sum_RE if unscale is None else unscale,
            out_RE,
            len(x_RE),
            begin,
            end,
            sum_RE.stride(0),
            x_RE.stride(0),
            out_RE.stride(0),
            UNSCALE=unscale is not None,
            **config.FINISH,
        )
    if settings.prefixes[-1] < out_RE.shape[1]:
        out_RE[:, settings.prefixes[-1] :] = 0


class _Sums:
    """Row and column sums of a launch: one entry a program, added to their totals in a fixed order at the end."""

    def __init__(self, P, R, C, grid, device, row_sums_PR, column_sums_PC) -> None:
        new = {"dtype": torch.float32, "device": device}
        self.parts = torch.empty(grid[1], P, R, **new), torch.empty(grid[0], P, C, **new)
        self.totals = row_sums_PR, column_sums_PC

    def __enter__(self):
        return self.parts

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            for part, total in zip(self.parts, self.totals, strict=True):
                total += part.sum(0)


def _who(tile: Tile, lse=None, row_out=None):
    """The pointers of a tile, in the kernels' order. What is absent is passed as something that is never read."""
    none = tile.targets_R
    outs = () if lse is None else (lse, row_out)
    return (
        tile.row_scale_PR,
        tile.column_scale_PC,
        *outs,
        tile.row_scale_PR if tile.limit_PR is None else tile.limit_PR,
        tile.targets_R,
        none if tile.row_ids_RK is None else tile.row_ids_RK,
        none if tile.column_ids_CK is None else tile.column_ids_CK,
        none if tile.owners_C is None else tile.owners_C,
        none if tile.restricted_C is None else tile.restricted_C.view(torch.uint8),
    )


def _strides(tile: Tile, *outs):
    limit = tile.row_scale_PR if tile.limit_PR is None else tile.limit_PR
    return (x.stride(0) for x in (tile.row_scale_PR, tile.column_scale_PC, *outs, limit))


def _flags(tile: Tile):
    ids, restricted = tile.row_ids_RK is not None, tile.restricted_C is not None
    return {
        "HIDE": ids or tile.hide_own or restricted,
        "IDS": tile.row_ids_RK.shape[1] if ids else 0,
        "OWN": tile.hide_own,
        "RESTRICTED": restricted,
        "LIMIT": tile.limit_PR is not None,
        "KEEP": tile.block.keep_target,
    }


def _tiles(tile: Tile, x_RE: torch.Tensor, P: int) -> tuple[config.Config, config.Config]:
    many = tile.row_ids_RK is not None and tile.row_ids_RK.shape[1] > 1
    heavy = many or tile.limit_PR is not None or tile.restricted_C is not None
    return config.fused(_architecture(x_RE.device), x_RE.element_size(), P, heavy)


def _products(settings: Settings, chosen: config.Config, dtype: torch.dtype):
    return {
        "ALIGN": _alignment(settings.prefixes),
        "EVEN": all(p % chosen.block_k == 0 for p in settings.prefixes),
        # fp32 is exact here; rounded to TF32 it would be no better than half precision.
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        **chosen.meta(products=True),
    }


def _alignment(prefixes: tuple[int, ...]) -> int:
    return 16 if all(p % 16 == 0 for p in prefixes) else 1


@functools.lru_cache(maxsize=64)
def _bounds(prefixes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    # Copied to the device once, not once a step.
    align = _alignment(prefixes)
    return torch.tensor([p // align for p in (0, *prefixes)], dtype=torch.int32, device=device)


@functools.cache
def _architecture(device: torch.device) -> int:
    from l2v_kernels.attention.config import architecture

    return architecture(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else 90


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
