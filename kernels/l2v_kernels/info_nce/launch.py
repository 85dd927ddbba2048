"""Launchers of the InfoNCE kernels, for one tile. Arguments and results as in `elementwise`. Imported only with Triton."""

import functools

import torch

from l2v_kernels.info_nce import config, kernel_elementwise, kernel_fused, kernel_quantize
from l2v_kernels.info_nce.quantize import Quantize
from l2v_kernels.info_nce.settings import Settings
from l2v_kernels.info_nce.tiles import Tile
from l2v_kernels.launching import architecture, cdiv, on_device, power_of_2


@on_device
def inverse_norms(x_nE: torch.Tensor, settings: Settings) -> torch.Tensor:
    """float64 [P, n]: 1 / norm of each prefix, 0 for a zero vector."""
    n, P = len(x_nE), len(settings.prefixes)
    out_Pn = torch.empty(P, n, dtype=torch.float64, device=x_nE.device)
    if n:
        kernel_elementwise.norms_kernel[(cdiv(n, config.NORMS["BLOCK_ROWS"]),)](
            x_nE, _bounds(settings.prefixes, x_nE.device), out_Pn, n, x_nE.stride(0), P, P=P,
            ALIGN=_alignment(settings.prefixes), **config.NORMS,
        )  # fmt: skip
    return out_Pn


@on_device
def codes(x_rE: torch.Tensor, inverse_r: torch.Tensor, kind: Quantize) -> torch.Tensor:
    """[r, E]: as `quantize.codes`."""
    (n, E), out_rE = x_rE.shape, torch.empty_like(x_rE, memory_format=torch.contiguous_format)
    if n:
        grid = (cdiv(n, config.FINISH["BLOCK_ROWS"]), cdiv(E, config.FINISH["BLOCK_E"]))
        # A product and a sum in one rounding would give another code than plain PyTorch, once in a hundred thousand.
        kernel_quantize.codes_kernel[grid](
            x_rE, inverse_r, out_rE, n, E, x_rE.stride(0), out_rE.stride(0), BINARY=kind == "binary",
            enable_fp_fusion=False, **config.FINISH,
        )  # fmt: skip
    return out_rE


@functools.partial(on_device, at=1)
def statistics(tile: Tile, planes_Prc, m_Pr, l_Pr, pair_Pr) -> None:
    """Updates m, l and pair [P, r] by a tile's planes, in place."""
    P, n_rows, n_columns = planes_Prc.shape
    if not n_rows * n_columns:
        return
    chosen = config.elementwise(P)[0]
    kernel_elementwise.statistics_kernel[(cdiv(n_rows, chosen.block_rows),)](
        planes_Prc,
        m_Pr,
        l_Pr,
        m_Pr if pair_Pr is None else pair_Pr,
        *_pointers(tile),
        n_rows,
        n_columns,
        planes_Prc.stride(1),
        planes_Prc.stride(0),
        m_Pr.stride(0),
        *_strides(tile),
        tile.first_column,
        tile.first_number,
        P,
        P=P,
        PREFIXES=power_of_2(P),
        PAIR=pair_Pr is not None,
        **_flags(tile),
        **chosen.meta(fused=False),
    )


@functools.partial(on_device, at=1)
def coefficients(
    tile: Tile, planes_Prc, lse_Pr, row_out_Pr, out_Prc, row_sums_Pr, column_sums_Pc,
) -> None:  # fmt: skip
    """Writes out [P, r, c] and adds to the sums."""
    P, n_rows, n_columns = out_Prc.shape
    if not n_rows * n_columns:
        return
    chosen = config.elementwise(P)[1]
    grid = (cdiv(n_rows, chosen.block_rows), cdiv(n_columns, chosen.block_columns))
    with _Sums(P, n_rows, n_columns, grid, out_Prc.device, row_sums_Pr, column_sums_Pc) as sums:
        kernel_elementwise.coefficients_kernel[grid](
            planes_Prc,
            out_Prc,
            *sums,
            *_pointers(tile, lse_Pr, row_out_Pr),
            n_rows,
            n_columns,
            out_Prc.stride(1),
            out_Prc.stride(0),
            *_strides(tile, lse_Pr, row_out_Pr),
            tile.first_column,
            tile.first_number,
            P,
            P=P,
            MINUS=tile.block.minus,
            **_flags(tile),
            **chosen.meta(fused=False),
        )


@functools.partial(on_device, at=1)
def fused_statistics(tile: Tile, x_rE, m_Pr, l_Pr, pair_Pr, settings: Settings) -> None:
    """As `statistics`, from the embeddings of the tile's rows."""
    y_cE = tile.block.columns.compared(tile.columns)
    (n_rows, n_columns), P = tile.shape, len(settings.prefixes)
    if not n_rows * n_columns:
        return
    chosen = _tiles(tile, x_rE, P)[0]
    row_blocks = cdiv(n_rows, chosen.block_rows)
    # Where there are few rows, columns are split, so that every multiprocessor has a few programs.
    splits = max(1, min(cdiv(n_columns, chosen.block_columns), 4 * _multiprocessors(x_rE.device) // row_blocks))
    width = cdiv(cdiv(n_columns, splits), chosen.block_columns) * chosen.block_columns
    splits = cdiv(n_columns, width)
    parts = torch.empty(3, splits, P, n_rows, dtype=torch.float32, device=x_rE.device)
    kernel_fused.fused_statistics_kernel[(row_blocks, splits)](
        x_rE,
        y_cE,
        _bounds(settings.prefixes, x_rE.device),
        *parts,
        *_pointers(tile),
        n_rows,
        n_columns,
        width,
        x_rE.stride(0),
        y_cE.stride(0),
        *_strides(tile),
        tile.first_column,
        tile.first_number,
        P,
        P=P,
        PREFIXES=power_of_2(P),
        **_flags(tile),
        **_matmul_meta(settings, chosen, x_rE.dtype),
    )
    part_m, part_l, part_pair = parts
    top_Pr = torch.maximum(m_Pr, part_m.amax(0))
    shift_Pr = torch.where(top_Pr == -torch.inf, 0, top_Pr)
    l_Pr.mul_((m_Pr - shift_Pr).exp()).add_((part_l * (part_m - shift_Pr).exp()).sum(0))
    m_Pr.copy_(top_Pr)
    if pair_Pr is not None:
        own_r = tile.targets_r - tile.first_column
        pair_Pr.copy_(torch.where((own_r >= 0) & (own_r < n_columns), part_pair.sum(0), pair_Pr))


@functools.partial(on_device, at=1)
def fused_coefficients(
    tile: Tile, x_rE, lse_Pr, row_out_Pr, out_Prc, row_sums_Pr, column_sums_Pc,
    settings: Settings,
) -> None:  # fmt: skip
    """As `coefficients`, from the embeddings of the tile's rows."""
    y_cE = tile.block.columns.compared(tile.columns)
    P, n_rows, n_columns = out_Prc.shape
    if not n_rows * n_columns:
        return
    chosen = _tiles(tile, x_rE, P)[1]
    grid = (cdiv(n_rows, chosen.block_rows), cdiv(n_columns, chosen.block_columns))
    with _Sums(P, n_rows, n_columns, grid, out_Prc.device, row_sums_Pr, column_sums_Pc) as sums:
        kernel_fused.fused_coefficients_kernel[(grid[0] * grid[1],)](
            x_rE,
            y_cE,
            _bounds(settings.prefixes, x_rE.device),
            out_Prc,
            *sums,
            *_pointers(tile, lse_Pr, row_out_Pr),
            n_rows,
            n_columns,
            x_rE.stride(0),
            y_cE.stride(0),
            out_Prc.stride(1),
            out_Prc.stride(0),
            *_strides(tile, lse_Pr, row_out_Pr),
            tile.first_column,
            tile.first_number,
            P,
            P=P,
            MINUS=tile.block.minus,
            GROUP=config.GROUP,
            **_flags(tile),
            **_matmul_meta(settings, chosen, x_rE.dtype),
        )


@on_device
def finish(sum_rE, x_rE, along_Pr, unscale, out_rE, settings: Settings, factor_r=None) -> None:
    """out [r, E] = (sum * unscale - x * along) * factor, slice by slice; 0 beyond the last prefix."""
    for s, (begin, end) in enumerate(settings.prefix_slices):
        grid = (cdiv(len(x_rE), config.FINISH["BLOCK_ROWS"]), cdiv(end - begin, config.FINISH["BLOCK_E"]))
        if not len(x_rE):
            break
        kernel_elementwise.finish_kernel[grid](
            sum_rE,
            x_rE,
            along_Pr[s],
            sum_rE if unscale is None else unscale,
            sum_rE if factor_r is None else factor_r,
            out_rE,
            len(x_rE),
            begin,
            end,
            sum_rE.stride(0),
            x_rE.stride(0),
            out_rE.stride(0),
            UNSCALE=unscale is not None,
            FACTOR=factor_r is not None,
            **config.FINISH,
        )
    if settings.prefixes[-1] < out_rE.shape[1]:
        out_rE[:, settings.prefixes[-1] :] = 0


class _Sums:
    """Row and column sums of a launch: one entry a program, added to the totals in a fixed order at the end."""

    def __init__(self, P, n_rows, n_columns, grid, device, row_sums_Pr, column_sums_Pc) -> None:
        new = {"dtype": torch.float32, "device": device}
        self.parts = torch.empty(grid[1], P, n_rows, **new), torch.empty(grid[0], P, n_columns, **new)
        self.totals = row_sums_Pr, column_sums_Pc

    def __enter__(self):
        return self.parts

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            for part, total in zip(self.parts, self.totals, strict=True):
                total += part.sum(0)


def _pointers(tile: Tile, lse=None, row_out=None):
    """The pointers of a tile, in the kernels' order. For what is absent a tensor is passed that is never read."""
    none = tile.targets_r
    outs = () if lse is None else (lse, row_out)
    return (
        tile.row_scale_Pr,
        tile.column_scale_Pc,
        *outs,
        tile.row_scale_Pr if tile.limit_Pr is None else tile.limit_Pr,
        tile.targets_r,
        none if tile.row_ids_rI is None else tile.row_ids_rI,
        none if tile.column_ids_cI is None else tile.column_ids_cI,
        none if tile.owners_c is None else tile.owners_c,
        none if tile.restricted_c is None else tile.restricted_c.view(torch.uint8),
    )


def _strides(tile: Tile, *outs):
    limit = tile.row_scale_Pr if tile.limit_Pr is None else tile.limit_Pr
    return (x.stride(0) for x in (tile.row_scale_Pr, tile.column_scale_Pc, *outs, limit))


def _flags(tile: Tile):
    ids, restricted = tile.row_ids_rI is not None, tile.restricted_c is not None
    return {
        "HIDE": ids or tile.hide_own or restricted,
        "IDS": 0 if tile.row_ids_rI is None else tile.row_ids_rI.shape[1],
        "OWN": tile.hide_own,
        "RESTRICTED": restricted,
        "LIMIT": tile.limit_Pr is not None,
        "KEEP": tile.block.keep_target,
    }


def _tiles(tile: Tile, x_rE: torch.Tensor, P: int) -> tuple[config.Config, config.Config]:
    many = tile.row_ids_rI is not None and tile.row_ids_rI.shape[1] > 1
    heavy = many or tile.limit_Pr is not None or tile.restricted_c is not None
    return config.fused(_architecture(x_rE.device), x_rE.element_size(), P, heavy)


def _matmul_meta(settings: Settings, chosen: config.Config, dtype: torch.dtype):
    return {
        "ALIGN": _alignment(settings.prefixes),
        "EVEN": all(p % chosen.block_e == 0 for p in settings.prefixes),
        # fp32 is multiplied exactly; rounded to TF32 it would be no better than half precision.
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        **chosen.meta(fused=True),
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
    return architecture(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else 90


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
