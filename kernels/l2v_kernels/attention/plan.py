"""What every layer of a batch needs to know about its segments, worked out once on the host."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LengthGroup:
    """The n segments that share one length L."""

    length: int
    tokens_nL: torch.Tensor
    """int64 [n, L]: where in the pack each token stands."""
    segments_n: torch.Tensor
    """int64 [n]: which segments these are."""


@dataclass(frozen=True)
class AttentionPlan:
    """Segments of a pack grouped by length: a group is one dense batch. Empty segments are in no group."""

    lengths: tuple[int, ...]
    groups: tuple[LengthGroup, ...]
    order_T: torch.Tensor | None
    """int64 [T]: the tokens group by group; None where the pack lies in that order and groups are slices."""
    inverse_T: torch.Tensor | None
    """int64 [T]: the inverse of order_T, None with it."""

    @property
    def n_segments(self) -> int:
        return len(self.lengths)

    @property
    def n_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def device(self) -> torch.device | None:
        """Where the index tensors are; None for a pack without tokens, which has none."""
        return self.groups[0].segments_n.device if self.groups else None

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> "AttentionPlan":
        """The plan of segments that follow each other in the pack. Errors: ValueError for a negative
        length."""
        lengths = tuple(int(length) for length in lengths)
        if any(length < 0 for length in lengths):
            raise ValueError(f"segment lengths must not be negative, got {lengths}")
        starts, by_length, position = [], {}, 0
        for segment, length in enumerate(lengths):
            starts.append(position)
            position += length
            if length:
                by_length.setdefault(length, []).append(segment)
        parts = []
        for length, members in by_length.items():
            first_n = torch.tensor([starts[segment] for segment in members])
            parts.append((length, first_n[:, None] + torch.arange(length), torch.tensor(members)))

        order_T = (
            torch.cat([tokens.flatten() for _, tokens, _ in parts]) if parts else torch.empty(0, dtype=torch.int64)
        )
        identity_T = torch.arange(position)
        in_order = torch.equal(order_T, identity_T)
        inverse_T = None if in_order else torch.empty_like(order_T).scatter_(0, order_T, identity_T).to(device)
        groups = tuple(LengthGroup(n, tokens.to(device), members.to(device)) for n, tokens, members in parts)
        return cls(lengths, groups, None if in_order else order_T.to(device), inverse_T)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: torch.Tensor, device: torch.device | str | None = None) -> "AttentionPlan":
        """The plan of cu_seqlens, int32 or int64 [S + 1], read on the host: a CPU tensor avoids waiting.

        Args: device holds the plan's tensors, by default that of cu_seqlens.
        Errors: ValueError unless cu_seqlens is one-dimensional, starts at 0 and never falls.
        """
        if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.shape[0] == 0:
            raise ValueError(
                f"cu_seqlens must be int32 or int64 [S + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
            )
        bounds = cu_seqlens.tolist()
        lengths = [after - before for before, after in itertools.pairwise(bounds)]
        if bounds[0] != 0 or any(length < 0 for length in lengths):
            raise ValueError(f"cu_seqlens must start at 0 and never fall, got {bounds}")
        return cls.from_lengths(lengths, cu_seqlens.device if device is None else device)
