"""The passes over a tile of dot products in plain PyTorch: the CPU's path. `kernel_elementwise` is the same in Triton."""

from collections.abc import Iterator

import torch

from l2v_kernels.info_nce.quantize import codes
from l2v_kernels.info_nce.settings import Settings
from l2v_kernels.info_nce.tiles import Tile

__all__ = ["codes", "coefficients", "finish", "inverse_norms", "statistics"]


def inverse_norms(x_nE: torch.Tensor, settings: Settings) -> torch.Tensor:
    """float64 [P, n]: 1 / norm of each prefix, 0 for a zero vector. Converts a million elements at a time to float64."""
    squares_Pn = torch.empty(len(settings.prefixes), len(x_nE), dtype=torch.float64, device=x_nE.device)
    rows = max(1, (1 << 20) // x_nE.shape[1])
    for at in range(0, len(x_nE), rows):
        part = x_nE[at : at + rows].double()
        for p, (begin, end) in enumerate(settings.prefix_slices):
            squares_Pn[p, at : at + rows] = torch.linalg.vector_norm(part[:, begin:end], dim=1).square()
    norms_Pn = squares_Pn.cumsum(0).sqrt()
    # A norm of 0 gives 0, not infinity; NaN stays NaN.
    return torch.where(norms_Pn == 0, 0, 1 / norms_Pn)


def statistics(
    tile: Tile, planes_Prc: torch.Tensor, m_Pr: torch.Tensor, l_Pr: torch.Tensor, pair_Pr: torch.Tensor | None
) -> None:
    """Updates the running maximum m [P, r] and sum l [P, r] of exp(score - m) by a tile, in place.

    planes_Prc: dot products of each slice of E (those of prefix p are the sum of the first p + 1). pair_Pr receives the
    score of each row's own column where it lies in this tile.
    """
    own_r, in_tile_r = _own(tile)
    for p, (_, scores_rc) in enumerate(_scores(tile, planes_Prc)):
        if pair_Pr is not None and len(own_r):
            picked_r = scores_rc.gather(1, own_r.unsqueeze(1)).squeeze(1)
            pair_Pr[p] = torch.where(in_tile_r, picked_r, pair_Pr[p])
        scores_rc = _hide(tile, scores_rc, p, own_r, in_tile_r)
        top_r = torch.maximum(m_Pr[p], scores_rc.amax(1))
        shift_r = top_r.masked_fill(top_r == -torch.inf, 0)
        l_Pr[p] = l_Pr[p] * (m_Pr[p] - shift_r).exp() + (scores_rc - shift_r.unsqueeze(1)).exp_().sum(1)
        m_Pr[p] = top_r


def coefficients(
    tile: Tile,
    planes_Prc: torch.Tensor,
    lse_Pr: torch.Tensor,
    row_out_Pr: torch.Tensor,
    out_Prc: torch.Tensor,
    row_sums_Pr: torch.Tensor,
    column_sums_Pc: torch.Tensor,
) -> None:
    """From dot products to the coefficients that multiply the embeddings in the gradient.

    The coefficient of a pair and prefix is (softmax - 1 at the pair) * row_out * column_scale. Writes into out[s] the sum
    of the coefficients of all prefixes that contain slice s; adds sums of coefficient * dot product to row_sums and
    column_sums.
    """
    own_r, in_tile_r = _own(tile)
    for p, (dots_rc, scores_rc) in enumerate(_scores(tile, planes_Prc)):
        e_rc = (_hide(tile, scores_rc, p, own_r, in_tile_r) - lse_Pr[p].unsqueeze(1)).exp_()
        if tile.block.minus and len(own_r):
            e_rc.scatter_add_(1, own_r.unsqueeze(1), -in_tile_r.to(e_rc.dtype).unsqueeze(1))
        e_rc *= row_out_Pr[p].unsqueeze(1)
        out_Prc[p] = e_rc.mul_(tile.column_scale_Pc[p])
        moment_rc = e_rc.mul_(dots_rc)
        row_sums_Pr[p] += moment_rc.sum(1)
        column_sums_Pc[p] += moment_rc.sum(0)
    for p in range(len(out_Prc) - 2, -1, -1):
        out_Prc[p] += out_Prc[p + 1]


def finish(
    sum_rE: torch.Tensor,
    x_rE: torch.Tensor,
    along_Pr: torch.Tensor,
    unscale: torch.Tensor | None,
    out_rE: torch.Tensor,
    settings: Settings,
    factor_r: torch.Tensor | None = None,
) -> None:
    """out [r, E] = (sum * unscale - x * along) * factor, slice by slice; 0 beyond the last prefix. out may be sum."""
    for s, (begin, end) in enumerate(settings.prefix_slices):
        for at in range(0, len(x_rE), 1024):
            rows = slice(at, at + 1024)
            total = sum_rE[rows, begin:end] if unscale is None else sum_rE[rows, begin:end] * unscale
            total = total - x_rE[rows, begin:end] * along_Pr[s, rows].unsqueeze(1)
            out_rE[rows, begin:end] = total if factor_r is None else total * factor_r[rows].unsqueeze(1)
    out_rE[:, settings.prefixes[-1] :] = 0


def _scores(tile: Tile, planes_Prc: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(dot products [r, c], scores [r, c]) of each prefix."""
    total_rc = None
    for p, plane_rc in enumerate(planes_Prc):
        total_rc = plane_rc if total_rc is None else total_rc + plane_rc
        yield total_rc, total_rc * tile.row_scale_Pr[p].unsqueeze(1) * tile.column_scale_Pc[p]


def _own(tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
    """(each row's own column within the tile, int64 [r]; whether it lies there, bool [r])."""
    own_r = tile.targets_r - tile.first_column
    in_tile_r = (own_r >= 0) & (own_r < tile.shape[1])
    return own_r.clamp(0, max(0, tile.shape[1] - 1)), in_tile_r


def _hide(tile: Tile, scores_rc: torch.Tensor, p: int, own_r: torch.Tensor, in_tile_r: torch.Tensor) -> torch.Tensor:
    """The scores, minus infinity where a row is not compared with a column."""
    mask_rc = _hidden(tile)
    if tile.limit_Pr is not None:
        above_rc = scores_rc > tile.limit_Pr[p].unsqueeze(1)
        mask_rc = above_rc if mask_rc is None else mask_rc.logical_or_(above_rc)
    if mask_rc is None:
        if tile.block.keep_target:
            return scores_rc
        mask_rc = torch.zeros_like(scores_rc, dtype=torch.bool)
    own_r1, in_tile_r1 = own_r.unsqueeze(1), in_tile_r.unsqueeze(1)
    kept_r1 = mask_rc.gather(1, own_r1) & ~in_tile_r1
    mask_rc.scatter_(1, own_r1, kept_r1 if tile.block.keep_target else kept_r1 | in_tile_r1)
    return scores_rc.masked_fill(mask_rc, -torch.inf)


def _hidden(tile: Tile) -> torch.Tensor | None:
    """bool [r, c]: what ids and owners hide; None if nothing."""
    mask_rc = None
    if tile.row_ids_rI is not None and tile.column_ids_cI is not None:
        for rows, columns in zip(tile.row_ids_rI.unbind(1), tile.column_ids_cI.unbind(1), strict=True):
            same_rc = (rows.unsqueeze(1) == columns) & (columns >= 0)
            mask_rc = same_rc if mask_rc is None else mask_rc.logical_or_(same_rc)
    if tile.owners_c is not None:
        numbers_r = torch.arange(tile.first_number, tile.first_number + tile.shape[0], device=tile.owners_c.device)
        own_rc = tile.owners_c == numbers_r.unsqueeze(1)
        if tile.restricted_c is not None:
            foreign_rc = ~own_rc & tile.restricted_c
            mask_rc = foreign_rc if mask_rc is None else mask_rc.logical_or_(foreign_rc)
        if tile.hide_own:
            mask_rc = own_rc if mask_rc is None else mask_rc.logical_or_(own_rc)
    return mask_rc
