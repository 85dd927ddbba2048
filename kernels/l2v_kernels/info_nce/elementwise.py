"""What happens to a tile of dot products, in plain PyTorch: the CPU's path. `kernel_elementwise` is the same in Triton."""

from collections.abc import Iterator

import torch

from l2v_kernels.info_nce.settings import Settings
from l2v_kernels.info_nce.tiles import Tile


def inverse_norms(x_nE: torch.Tensor, settings: Settings) -> torch.Tensor:
    """float64 [P, n]: 1 / norm of each prefix, 0 for a zero vector; a million elements at a time, which are widened."""
    squares_Pn = torch.empty(len(settings.prefixes), len(x_nE), dtype=torch.float64, device=x_nE.device)
    rows = max(1, (1 << 20) // x_nE.shape[1])
    for at in range(0, len(x_nE), rows):
        part = x_nE[at : at + rows].double()
        for p, (begin, end) in enumerate(settings.segments):
            squares_Pn[p, at : at + rows] = torch.linalg.vector_norm(part[:, begin:end], dim=1).square()
    norms_Pn = squares_Pn.cumsum(0).sqrt()
    # A norm of zero becomes 0 and not infinity; NaN stays NaN.
    return torch.where(norms_Pn == 0, 0, 1 / norms_Pn)


def statistics(
    tile: Tile, planes_PRC: torch.Tensor, m_PR: torch.Tensor, l_PR: torch.Tensor, pair_PR: torch.Tensor | None
) -> None:
    """Carries the running maximum m and sum l of exp(score - m) over a tile, in place.

    planes_PRC: dot products of each segment of E (prefix p is the sum of the first p + 1). pair_PR takes the score of
    each row's own column where it lies in this tile.
    """
    own_R, in_tile_R = _own(tile)
    for p, (_, scores_RC) in enumerate(_scores(tile, planes_PRC)):
        if pair_PR is not None and len(own_R):
            picked_R = scores_RC.gather(1, own_R.unsqueeze(1)).squeeze(1)
            pair_PR[p] = torch.where(in_tile_R, picked_R, pair_PR[p])
        scores_RC = _hide(tile, scores_RC, p, own_R, in_tile_R)
        top_R = torch.maximum(m_PR[p], scores_RC.amax(1))
        shift_R = top_R.masked_fill(top_R == -torch.inf, 0)
        l_PR[p] = l_PR[p] * (m_PR[p] - shift_R).exp() + (scores_RC - shift_R.unsqueeze(1)).exp_().sum(1)
        m_PR[p] = top_R


def coefficients(
    tile: Tile,
    planes_PRC: torch.Tensor,
    lse_PR: torch.Tensor,
    row_out_PR: torch.Tensor,
    out_PRC: torch.Tensor,
    row_sums_PR: torch.Tensor,
    column_sums_PC: torch.Tensor,
) -> None:
    """From dot products to what multiplies the embeddings in the gradient.

    The coefficient of a pair and prefix is (softmax - 1 at the pair) * row_out * column_scale. Writes into out[s] the sum
    of coefficients over all prefixes that contain segment s; adds to the sums those of coefficient * dot product.
    """
    own_R, in_tile_R = _own(tile)
    for p, (dots_RC, scores_RC) in enumerate(_scores(tile, planes_PRC)):
        e_RC = (_hide(tile, scores_RC, p, own_R, in_tile_R) - lse_PR[p].unsqueeze(1)).exp_()
        if tile.block.minus and len(own_R):
            e_RC.scatter_add_(1, own_R.unsqueeze(1), -in_tile_R.to(e_RC.dtype).unsqueeze(1))
        e_RC *= row_out_PR[p].unsqueeze(1)
        out_PRC[p] = e_RC.mul_(tile.column_scale_PC[p])
        moment_RC = e_RC.mul_(dots_RC)
        row_sums_PR[p] += moment_RC.sum(1)
        column_sums_PC[p] += moment_RC.sum(0)
    for p in range(len(out_PRC) - 2, -1, -1):
        out_PRC[p] += out_PRC[p + 1]


def finish(
    sum_RE: torch.Tensor,
    x_RE: torch.Tensor,
    along_PR: torch.Tensor,
    unscale: torch.Tensor | None,
    out_RE: torch.Tensor,
    settings: Settings,
) -> None:
    """out = sum * unscale - x * along, segment by segment; what lies beyond the last prefix is 0. out may be sum."""
    for s, (begin, end) in enumerate(settings.segments):
        for at in range(0, len(x_RE), 1024):
            rows = slice(at, at + 1024)
            total = sum_RE[rows, begin:end] if unscale is None else sum_RE[rows, begin:end] * unscale
            out_RE[rows, begin:end] = total - x_RE[rows, begin:end] * along_PR[s, rows].unsqueeze(1)
    out_RE[:, settings.prefixes[-1] :] = 0


def _scores(tile: Tile, planes_PRC: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each prefix's dot products and scores [R, C]."""
    total_RC = None
    for p, plane_RC in enumerate(planes_PRC):
        total_RC = plane_RC if total_RC is None else total_RC + plane_RC
        yield total_RC, total_RC * tile.row_scale_PR[p].unsqueeze(1) * tile.column_scale_PC[p]


def _own(tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's own column within the tile, int64 [R], and whether it lies there, bool [R]."""
    own_R = tile.targets_R - tile.first_column
    in_tile_R = (own_R >= 0) & (own_R < tile.shape[1])
    return own_R.clamp(0, max(0, tile.shape[1] - 1)), in_tile_R


def _hide(tile: Tile, scores_RC: torch.Tensor, p: int, own_R: torch.Tensor, in_tile_R: torch.Tensor) -> torch.Tensor:
    """The scores with minus infinity where a row does not compare."""
    mask_RC = _hidden(tile)
    if tile.limit_PR is not None:
        above_RC = scores_RC > tile.limit_PR[p].unsqueeze(1)
        mask_RC = above_RC if mask_RC is None else mask_RC.logical_or_(above_RC)
    if mask_RC is None:
        if tile.block.keep_target:
            return scores_RC
        mask_RC = torch.zeros_like(scores_RC, dtype=torch.bool)
    own_R1, in_tile_R1 = own_R.unsqueeze(1), in_tile_R.unsqueeze(1)
    kept_R1 = mask_RC.gather(1, own_R1) & ~in_tile_R1
    mask_RC.scatter_(1, own_R1, kept_R1 if tile.block.keep_target else kept_R1 | in_tile_R1)
    return scores_RC.masked_fill(mask_RC, -torch.inf)


def _hidden(tile: Tile) -> torch.Tensor | None:
    """bool [R, C]: what ids and owners hide; None if nothing."""
    mask_RC = None
    if tile.row_ids_RK is not None:
        for rows, columns in zip(tile.row_ids_RK.unbind(1), tile.column_ids_CK.unbind(1), strict=True):
            same_RC = (rows.unsqueeze(1) == columns) & (columns >= 0)
            mask_RC = same_RC if mask_RC is None else mask_RC.logical_or_(same_RC)
    if tile.owners_C is not None:
        numbers_R = torch.arange(tile.first_number, tile.first_number + tile.shape[0], device=tile.owners_C.device)
        own_RC = tile.owners_C == numbers_R.unsqueeze(1)
        if tile.restricted_C is not None:
            foreign_RC = ~own_RC & tile.restricted_C
            mask_RC = foreign_RC if mask_RC is None else mask_RC.logical_or_(foreign_RC)
        if tile.hide_own:
            mask_RC = own_RC if mask_RC is None else mask_RC.logical_or_(own_RC)
    return mask_RC
