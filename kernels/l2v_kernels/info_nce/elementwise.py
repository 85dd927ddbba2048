"""What happens to a tile of dot products, in plain PyTorch: the CPU's path. `kernel_elementwise` is the same in Triton."""

from collections.abc import Iterator

import torch

from l2v_kernels.info_nce.tiles import Tile


def statistics(
    tile: Tile, planes_PRC: torch.Tensor, m_PR: torch.Tensor, l_PR: torch.Tensor, pair_PR: torch.Tensor | None
) -> None:
    """Carries the running maximum m and sum l of exp(score - m) over a tile, in place.

    planes_PRC: dot products of each segment of E (prefix p is the sum of the first p + 1). pair_PR takes the score of
    each row's own column where it lies in this tile.
    """
    own_R, in_tile_R = _own(tile)
    for p, scores_RC in enumerate(_scores(tile, planes_PRC)):
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
    grad_PR: torch.Tensor,
    row_out_PR: torch.Tensor,
    column_out_PC: torch.Tensor,
    out_PRC: torch.Tensor,
    row_sums_PR: torch.Tensor,
    column_sums_PC: torch.Tensor,
) -> None:
    """From dot products to what multiplies the embeddings in the gradient.

    With e = grad * (softmax - 1 at the pair), adds the sums of e * score over a row and over a column, and writes into
    out[s] the sum over all prefixes that contain segment s of e * row_out * column_out.
    """
    own_R, in_tile_R = _own(tile)
    for p, scores_RC in enumerate(_scores(tile, planes_PRC)):
        e_RC = (_hide(tile, scores_RC, p, own_R, in_tile_R) - lse_PR[p].unsqueeze(1)).exp_()
        if tile.block.minus and len(own_R):
            e_RC.scatter_add_(1, own_R.unsqueeze(1), -in_tile_R.to(e_RC.dtype).unsqueeze(1))
        e_RC *= grad_PR[p].unsqueeze(1)
        moment_RC = e_RC * scores_RC
        row_sums_PR[p] += moment_RC.sum(1)
        column_sums_PC[p] += moment_RC.sum(0)
        out_PRC[p] = e_RC.mul_(row_out_PR[p].unsqueeze(1)).mul_(column_out_PC[p])
    for p in range(len(out_PRC) - 2, -1, -1):
        out_PRC[p] += out_PRC[p + 1]


def _scores(tile: Tile, planes_PRC: torch.Tensor) -> Iterator[torch.Tensor]:
    """Each prefix's scores [R, C]."""
    total_RC = None
    for p, plane_RC in enumerate(planes_PRC):
        total_RC = plane_RC if total_RC is None else total_RC + plane_RC
        yield total_RC * tile.row_scale_PR[p].unsqueeze(1) * tile.column_scale_PC[p]


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
