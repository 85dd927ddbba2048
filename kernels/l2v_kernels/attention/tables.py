"""Where each token's segment lies, on the device: all that the kernels need to know about a pack."""

from dataclasses import dataclass

import torch

from l2v_kernels.philox import COLUMNS_PER_CALL


@dataclass(frozen=True)
class TokenTables:
    """Segments as seen from each token.

    A q tile is simply the next tokens of the pack, whatever segments they belong to: the first token's `start` and the last
    one's `end` bound the keys that the tile needs, and a row's own start and end tell which of those it may see. So no list
    of tiles has to be built, and the host reads nothing.

    Dropout needs columns counted within a segment, 16 to a Philox call. Keys are then walked in blocks of 16 that never
    cross a segment's end (the last block of a segment may be partial), so one call serves one block of one row.
    """

    segment_T: torch.Tensor
    start_T: torch.Tensor
    end_T: torch.Tensor
    """int32 [T]: the segment of each token, its first token, and one past its last."""
    first_block_T: torch.Tensor
    """int32 [T]: the first key block of the token's segment."""
    block_first_X: torch.Tensor
    block_end_X: torch.Tensor
    """int32 [X], X = T // 16 + S: a block's first token and one past its segment's last; both T for the spare blocks at
    the end. X is an upper bound on the blocks, so the host knows it without reading cu_seqlens."""
    n_segments: int

    @property
    def n_tokens(self) -> int:
        return self.segment_T.shape[0]

    @property
    def n_blocks(self) -> int:
        return self.block_first_X.shape[0]

    @classmethod
    def build(cls, cu_seqlens: torch.Tensor, n_tokens: int) -> "TokenTables":
        """From cu_seqlens, int32 or int64 [S + 1], on its device and without a host sync.

        The values cannot be checked here, so wrong ones must do no harm: everything is clamped into the pack, and where
        cu_seqlens does not start at 0, decreases, or does not end at n_tokens, every segment becomes empty, which turns the
        whole output into NaN.
        """
        device, n_segments = cu_seqlens.device, cu_seqlens.shape[0] - 1
        cu = cu_seqlens.to(torch.int64)
        token_T = torch.arange(n_tokens, device=device)
        if n_segments < 1 or n_tokens == 0:
            empty = torch.zeros(n_tokens, dtype=torch.int32, device=device)
            return cls(empty, empty, empty, empty, empty[:0], empty[:0], n_segments)
        valid = (cu[0] == 0) & (cu[-1] == n_tokens) & (cu.diff() >= 0).all()
        segment_T = torch.searchsorted(cu[1:].contiguous(), token_T, right=True).clamp_(max=n_segments - 1)
        start_T = torch.minimum(cu[segment_T].clamp_(min=0), token_T) * valid
        end_T = torch.maximum(cu[segment_T + 1], token_T + 1).clamp_(max=n_tokens) * valid

        blocks_S = (cu.diff().clamp_(min=0) + COLUMNS_PER_CALL - 1) // COLUMNS_PER_CALL
        last_block_S = blocks_S.cumsum(0)
        first_block_S = last_block_S - blocks_S
        block_X = torch.arange(n_tokens // COLUMNS_PER_CALL + n_segments, device=device)
        segment_X = torch.searchsorted(last_block_S, block_X, right=True).clamp_(max=n_segments - 1)
        first_X = cu[segment_X] + COLUMNS_PER_CALL * (block_X - first_block_S[segment_X])
        spare_X = block_X >= last_block_S[-1]
        first_X = first_X.masked_fill(spare_X, n_tokens).clamp_(0, n_tokens)
        end_X = cu[segment_X + 1].masked_fill(spare_X, n_tokens).clamp_(0, n_tokens)
        first_block_T = first_block_S[segment_T].clamp_(max=block_X.shape[0] - 1)
        return cls(
            segment_T.int(), start_T.int(), end_T.int(), first_block_T.int(), first_X.int(), end_X.int(), n_segments
        )
