"""What every layer of a batch needs to know about its segments, computed once and shared by all layers."""

import functools
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from l2v_kernels.attention.tables import TokenTables


@dataclass(frozen=True)
class LengthGroup:
    """The segments that share one length t."""

    length: int
    tokens_st: torch.Tensor
    """int64 [s, t]: each token's place in the pack."""
    segments_s: torch.Tensor
    """int64 [s]: which segments these are."""


@dataclass(frozen=True)
class LikeLengths:
    """Segments of nearly one length, as a batch [s, t] for batched matmuls. Of t the longest; never an empty segment."""

    tokens_st: torch.Tensor
    """int64 [s, t]: each token's place in the pack; beyond a segment's end that of its last token."""
    segments_s: torch.Tensor
    """int64 [s]: which segments these are."""
    padding_st: torch.Tensor | None
    """bool [s, t], true beyond a segment's end; None where all have the length t."""
    begin: int | None
    """Where the batch lies in the pack, if it is one run of tokens there."""


class AttentionPlan:
    """The segments of a pack, in the form each path needs, computed at first use and cached.

    The kernels read `tables`, built on the device; batched matmuls on a CPU read `like_lengths`. The reference reads the
    segments grouped by length: `groups`, each one dense batch (without empty segments), `order_T`, int64 [T], the tokens
    group by group, and `inverse_T`, its inverse; both None where the pack is already in that order and groups are slices.
    """

    def __init__(
        self,
        n_segments: int,
        n_tokens: int,
        device: torch.device,
        lengths: tuple[int, ...] | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> None:
        """Called by `from_lengths`, `from_cu_seqlens` and `on_device`, with either lengths or cu_seqlens."""
        self.n_segments, self.n_tokens, self.device = n_segments, n_tokens, device
        self._lengths, self._cu_seqlens = lengths, cu_seqlens

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> "AttentionPlan":
        """The plan of segments of these lengths, in the order of the pack.

        Raises:
            ValueError: a length is negative.
        """
        lengths = tuple(int(length) for length in lengths)
        if any(length < 0 for length in lengths):
            raise ValueError(f"segment lengths must not be negative, got {lengths}")
        # "cuda" becomes "cuda:0", as tensors name it.
        device = torch.empty(0, device=device).device
        return cls(len(lengths), sum(lengths), device, lengths=lengths)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: torch.Tensor, device: torch.device | str | None = None) -> "AttentionPlan":
        """The plan of cu_seqlens, read on the host: a CPU tensor avoids a sync.

        Args:
            cu_seqlens: int32 or int64 [S + 1].
            device: where the plan will be used, by default that of cu_seqlens.

        Raises:
            ValueError: cu_seqlens is not one-dimensional, does not start at 0, or decreases.
        """
        _check_form(cu_seqlens)
        bounds = cu_seqlens.tolist()
        lengths = [after - before for before, after in itertools.pairwise(bounds)]
        if bounds[0] != 0 or any(length < 0 for length in lengths):
            raise ValueError(f"cu_seqlens must start at 0 and never decrease, got {bounds}")
        return cls.from_lengths(lengths, cu_seqlens.device if device is None else device)

    @classmethod
    def on_device(cls, cu_seqlens: torch.Tensor, n_tokens: int) -> "AttentionPlan":
        """The plan of cu_seqlens whose values the host does not read, so without a sync.

        Values that are not segments of n_tokens tokens make the kernels' outputs NaN.

        Args:
            cu_seqlens: int32 or int64 [S + 1], on the device of use.
            n_tokens: T.

        Raises:
            ValueError: cu_seqlens has another form; with L2V_CHECK=1 in the environment also for its values.
        """
        _check_form(cu_seqlens)
        if os.environ.get("L2V_CHECK") == "1":
            plan = cls.from_cu_seqlens(cu_seqlens)
            if plan.n_tokens != n_tokens:
                raise ValueError(f"cu_seqlens ends at {plan.n_tokens} in a pack of {n_tokens} tokens")
        return cls(cu_seqlens.shape[0] - 1, n_tokens, cu_seqlens.device, cu_seqlens=cu_seqlens)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of each segment. A plan made by `on_device` syncs with the device here."""
        if self._lengths is None:
            assert self._cu_seqlens is not None
            plan = AttentionPlan.from_cu_seqlens(self._cu_seqlens)
            if plan.n_tokens != self.n_tokens:
                raise ValueError(f"cu_seqlens ends at {plan.n_tokens} in a pack of {self.n_tokens} tokens")
            self._lengths = plan.lengths
        return self._lengths

    @functools.cached_property
    def tables(self) -> TokenTables:
        """For the kernels, on `device`."""
        cu_seqlens = self._cu_seqlens
        if cu_seqlens is None:
            cu_seqlens = torch.tensor([0, *itertools.accumulate(self.lengths)])
            if self.device.type == "cuda":
                # From pageable memory the copy would wait for everything queued on the device.
                cu_seqlens = cu_seqlens.pin_memory().to(self.device, non_blocking=True)
        return TokenTables.build(cu_seqlens, self.n_tokens)

    @property
    def groups(self) -> tuple[LengthGroup, ...]:
        return self._grouped[0]

    @property
    def order_T(self) -> torch.Tensor | None:
        return self._grouped[1]

    @property
    def inverse_T(self) -> torch.Tensor | None:
        return self._grouped[2]

    @functools.cached_property
    def like_lengths(self) -> tuple[LikeLengths, ...]:
        """All segments but empty ones, longest first, in batches with few padded places; on the host."""
        starts = [0, *itertools.accumulate(self.lengths)]
        members: list[list[int]] = []
        for segment in sorted(range(len(self.lengths)), key=lambda i: -self.lengths[i]):
            length = self.lengths[segment]
            if not length:
                break
            longest = self.lengths[members[-1][0]] if members else 0
            if longest - length <= max(8, min(longest // 4, 16)) and members:
                members[-1].append(segment)
            else:
                members.append([segment])
        return tuple(_batch(which, self.lengths, starts) for which in members)

    @functools.cached_property
    def _grouped(self) -> tuple[tuple[LengthGroup, ...], torch.Tensor | None, torch.Tensor | None]:
        starts: list[int] = []
        by_length: dict[int, list[int]] = {}
        position, device = 0, self.device
        for segment, length in enumerate(self.lengths):
            starts.append(position)
            position += length
            if length:
                by_length.setdefault(length, []).append(segment)
        parts = []
        for length, members in by_length.items():
            first_s = torch.tensor([starts[segment] for segment in members])
            parts.append((length, first_s[:, None] + torch.arange(length), torch.tensor(members)))

        tokens = [tokens_st.flatten() for _, tokens_st, _ in parts]
        order_T = torch.cat(tokens) if parts else torch.empty(0, dtype=torch.int64)
        identity_T = torch.arange(position)
        groups = tuple(LengthGroup(length, at.to(device), members.to(device)) for length, at, members in parts)
        if torch.equal(order_T, identity_T):
            return groups, None, None
        inverse_T = torch.empty_like(order_T).scatter_(0, order_T, identity_T)
        return groups, order_T.to(device), inverse_T.to(device)


def _batch(segments: list[int], lengths: Sequence[int], starts: Sequence[int]) -> LikeLengths:
    longest, begin = lengths[segments[0]], starts[segments[0]]
    which_s, places_t = torch.tensor(segments), torch.arange(longest)
    lengths_s1 = torch.tensor([lengths[i] for i in segments])[:, None]
    first_s1 = torch.tensor([starts[i] for i in segments])[:, None]
    tokens_st = first_s1 + torch.minimum(places_t, lengths_s1 - 1)
    # Asked of numbers and not of tensors, so that the plan of a pack can be made of fake ones.
    if any(lengths[i] < longest for i in segments):
        return LikeLengths(tokens_st, which_s, places_t >= lengths_s1, None)
    run = all(starts[segment] == begin + longest * place for place, segment in enumerate(segments))
    return LikeLengths(tokens_st, which_s, None, begin if run else None)


def _check_form(cu_seqlens):
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens must be int32 or int64 [S + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
