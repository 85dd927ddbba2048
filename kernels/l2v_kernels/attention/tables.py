"""Where every token's segment lies, on the device: all that the kernels need to know about a pack."""

from dataclasses import dataclass

import torch

from l2v_kernels.philox import COLUMNS_PER_CALL


@dataclass(frozen=True)
class TokenTables:
    """Segments as seen from each token. A q tile is simply the next BLOCK_M tokens of the pack, whatever segments
    they belong to: the first token's `start` and the last one's `end` bound the keys that the tile needs, and a
    row's own start and end say which of those it may see. So there is no list of tiles to build, and nothing to wait
    for.

    Dropout needs columns counted within a segment, 16 to a philox call. Keys are then walked in blocks of 16 that
    never cross a segment's end (the last block of a segment is ragged), so one call serves one block of one row.
    """

    segment_T: torch.Tensor
    start_T: torch.Tensor
    end_T: torch.Tensor
    """int32 [T]: the segment of each token, its first token, and one past its last."""
    first_block_T: torch.Tensor
    """int32 [T]: the first key block of the token's segment."""
    block_first_B: torch.Tensor
    block_end_B: torch.Tensor
    """int32 [B], B = T // 16 + S: a block's first token and one past its segment's last; both T for spare blocks,
    which stand at the end. B is an upper bound, so that its size is known without asking the device."""
    n_segments: int

    @property
    def n_tokens(self) -> int:
        return self.segment_T.shape[0]

    @property
    def n_blocks(self) -> int:
        return self.block_first_B.shape[0]

    @classmethod
    def build(cls, cu_seqlens: torch.Tensor, n_tokens: int) -> "TokenTables":
        """From cu_seqlens, int32 or int64 [S + 1], on its device and without waiting for it.

        The values cannot be looked at here, so wrong ones must not hurt: everything is clamped into the pack, and
        where cu_seqlens does not start at 0, falls, or does not end at n_tokens, every segment is made empty, which
        turns the whole output into NaN.
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
        block_B = torch.arange(n_tokens // COLUMNS_PER_CALL + n_segments, device=device)
        segment_B = torch.searchsorted(last_block_S, block_B, right=True).clamp_(max=n_segments - 1)
        first_B = cu[segment_B] + COLUMNS_PER_CALL * (block_B - first_block_S[segment_B])
        spare_B = block_B >= last_block_S[-1]
        first_B = first_B.masked_fill(spare_B, n_tokens).clamp_(0, n_tokens)
        end_B = cu[segment_B + 1].masked_fill(spare_B, n_tokens).clamp_(0, n_tokens)
        first_block_T = first_block_S[segment_T].clamp_(max=block_B.shape[0] - 1)
        parts = (segment_T, start_T, end_T, first_block_T, first_B, end_B)
        return cls(*(x.int() for x in parts), n_segments)
