"""What every layer of a batch needs to know about its segments, worked out once and shared by all layers."""

import functools
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from l2v_kernels.attention.tables import TokenTables


@dataclass(frozen=True)
class LengthGroup:
    """The n segments that share one length L."""

    length: int
    tokens_nL: torch.Tensor
    """int64 [n, L]: where in the pack each token stands."""
    segments_n: torch.Tensor
    """int64 [n]: which segments these are."""


class AttentionPlan:
    """The segments of a pack, in the form each path wants, made when first asked for and kept.

    The kernels read `tables`, built on the device. The reference reads the segments grouped by length, built from the
    lengths on the host: `groups`, each one dense batch (empty segments are in none), `order_T`, int64 [T], the tokens
    group by group, and `inverse_T`, its inverse; both None where the pack lies in that order and groups are slices.
    """

    def __init__(
        self,
        n_segments: int,
        n_tokens: int,
        device: torch.device,
        lengths: tuple[int, ...] | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> None:
        """Made by `from_lengths`, `from_cu_seqlens` and `on_device`; one of lengths and cu_seqlens is given."""
        self.n_segments, self.n_tokens, self.device = n_segments, n_tokens, device
        self._lengths, self._cu_seqlens = lengths, cu_seqlens

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> "AttentionPlan":
        """The plan of segments that follow each other in the pack. Errors: ValueError for a negative length."""
        lengths = tuple(int(length) for length in lengths)
        if any(length < 0 for length in lengths):
            raise ValueError(f"segment lengths must not be negative, got {lengths}")
        # "cuda" becomes "cuda:0", as tensors name it.
        device = torch.empty(0, device=device).device
        return cls(len(lengths), sum(lengths), device, lengths=lengths)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: torch.Tensor, device: torch.device | str | None = None) -> "AttentionPlan":
        """The plan of cu_seqlens, int32 or int64 [S + 1], read on the host: a CPU tensor avoids waiting.

        Args: device is where the plan will be used, by default that of cu_seqlens.
        Errors: ValueError unless cu_seqlens is one-dimensional, starts at 0 and never falls.
        """
        _check_form(cu_seqlens)
        bounds = cu_seqlens.tolist()
        lengths = [after - before for before, after in itertools.pairwise(bounds)]
        if bounds[0] != 0 or any(length < 0 for length in lengths):
            raise ValueError(f"cu_seqlens must start at 0 and never fall, got {bounds}")
        return cls.from_lengths(lengths, cu_seqlens.device if device is None else device)

    @classmethod
    def on_device(cls, cu_seqlens: torch.Tensor, n_tokens: int) -> "AttentionPlan":
        """The plan of cu_seqlens, int32 or int64 [S + 1], whose values are not looked at, so nothing waits.

        Values that are no segments of n_tokens tokens make the kernels' outputs NaN. With L2V_CHECK=1 in the
        environment they are looked at. Errors: ValueError on the form of cu_seqlens, and with L2V_CHECK=1 on its
        values.
        """
        _check_form(cu_seqlens)
        if os.environ.get("L2V_CHECK") == "1":
            plan = cls.from_cu_seqlens(cu_seqlens)
            if plan.n_tokens != n_tokens:
                raise ValueError(f"cu_seqlens ends at {plan.n_tokens} in a pack of {n_tokens} tokens")
        return cls(cu_seqlens.shape[0] - 1, n_tokens, cu_seqlens.device, cu_seqlens=cu_seqlens)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of each segment. A plan made by `on_device` waits for the device here."""
        if self._lengths is None:
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
            cu_seqlens = torch.tensor([0, *itertools.accumulate(self._lengths)])
            if self.device.type == "cuda":
                # From ordinary memory the copy would wait for everything queued on the device.
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
    def _grouped(self) -> tuple[tuple[LengthGroup, ...], torch.Tensor | None, torch.Tensor | None]:
        starts, by_length, position, device = [], {}, 0, self.device
        for segment, length in enumerate(self.lengths):
            starts.append(position)
            position += length
            if length:
                by_length.setdefault(length, []).append(segment)
        parts = []
        for length, members in by_length.items():
            first_n = torch.tensor([starts[segment] for segment in members])
            parts.append((length, first_n[:, None] + torch.arange(length), torch.tensor(members)))

        tokens = [tokens_nL.flatten() for _, tokens_nL, _ in parts]
        order_T = torch.cat(tokens) if parts else torch.empty(0, dtype=torch.int64)
        identity_T = torch.arange(position)
        groups = tuple(LengthGroup(n, tokens.to(device), members.to(device)) for n, tokens, members in parts)
        if torch.equal(order_T, identity_T):
            return groups, None, None
        inverse_T = torch.empty_like(order_T).scatter_(0, order_T, identity_T)
        return groups, order_T.to(device), inverse_T.to(device)


def _check_form(cu_seqlens):
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens must be int32 or int64 [S + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
