"""The frozen linears of a group: one matmul where their weights are stacked in memory, one for each where they are not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol, TypeGuard

import torch
from torch import nn


class FrozenLinears(Protocol):
    """Linears that read one input x [T, E] and write side by side into y [T, O]; their weights get no gradient.

    Either they write (`matmul`, `input_gradient`) and the adapters' share is added to their result, or they can also
    accumulate (`AccumulatingLinears`) and are added to the adapters' share: no extra pass over memory either way.
    """

    sizes: tuple[int, ...]
    """O of each."""

    @property
    def accumulates(self) -> bool:
        """Whether these are `AccumulatingLinears`."""

    def matmul(self, x_TE: torch.Tensor) -> torch.Tensor:
        """y [T, O] = x W^T + bias."""

    def input_gradient(self, dy_TO: torch.Tensor) -> torch.Tensor:
        """dx [T, E] = dy W."""


class AccumulatingLinears(FrozenLinears, Protocol):
    """Frozen linears whose matmuls can add to their output."""

    biases: tuple[torch.Tensor | None, ...]

    def add_matmul_(self, y_TO: torch.Tensor, x_TE: torch.Tensor) -> None:
        """y += x W^T, without biases."""

    def add_input_gradient_(self, dx_TE: torch.Tensor, dy_TO: torch.Tensor) -> None:
        """dx += dy W."""


def accumulates(linears: FrozenLinears) -> TypeGuard[AccumulatingLinears]:
    """Whether matmuls of these linears can add to their output."""
    return linears.accumulates


class Linears:
    """Weights [O, E] in their own dtype. Their matmuls accumulate: an epilogue's read in place of a pass over y."""

    accumulates = True

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> None:
        self.weights = tuple(weights)
        self.biases = tuple(biases)
        self.sizes = tuple(w.shape[0] for w in self.weights)
        self.stacked_OE = stacked_view(self.weights)

    def matmul(self, x_TE: torch.Tensor) -> torch.Tensor:
        """y [T, O] = x W^T + bias."""
        if self.stacked_OE is not None and not any(b is not None for b in self.biases):
            return x_TE @ self.stacked_OE.t()
        y_TO = x_TE.new_empty((x_TE.shape[0], sum(self.sizes)))
        for y, w, b in zip(y_TO.split(self.sizes, 1), self.weights, self.biases, strict=True):
            torch.mm(x_TE, w.t(), out=y) if b is None else torch.addmm(b, x_TE, w.t(), out=y)
        return y_TO

    def add_matmul_(self, y_TO: torch.Tensor, x_TE: torch.Tensor) -> None:
        """y += x W^T, without biases."""
        if self.stacked_OE is not None:
            y_TO.addmm_(x_TE, self.stacked_OE.t())
            return
        for y, w in zip(y_TO.split(self.sizes, 1), self.weights, strict=True):
            y.addmm_(x_TE, w.t())

    def input_gradient(self, dy_TO: torch.Tensor) -> torch.Tensor:
        """dx [T, E] = dy W."""
        if self.stacked_OE is not None:
            return dy_TO @ self.stacked_OE
        first, *others = zip(dy_TO.split(self.sizes, 1), self.weights, strict=True)
        dx_TE = first[0] @ first[1]
        for dy, w in others:
            dx_TE.addmm_(dy, w)
        return dx_TE

    def add_input_gradient_(self, dx_TE: torch.Tensor, dy_TO: torch.Tensor) -> None:
        """dx += dy W."""
        if self.stacked_OE is not None:
            dx_TE.addmm_(dy_TO, self.stacked_OE)
            return
        for dy, w in zip(dy_TO.split(self.sizes, 1), self.weights, strict=True):
            dx_TE.addmm_(dy, w)


def stack_weights(linears: Sequence[nn.Linear]) -> None:
    """Moves the weights [O, E] of several linears into one buffer, one below the other, for one matmul.

    Each parameter stays the same object, contiguous and of its own shape; it only shares its storage, of which it owns
    its rows alone. Moving or casting a model separates them again, and each linear then has its own matmul.
    """
    weights = [linear.weight for linear in linears]
    if stacked_view(weights) is not None or len(weights) == 1:
        return
    with torch.no_grad():
        whole = torch.cat([w.detach() for w in weights])
        for weight, rows in zip(weights, whole.split([w.shape[0] for w in weights]), strict=True):
            weight.data = rows


def stacked_view(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The weights as one [O, E], if they lie in memory one below the other; None if not. A single one as it is."""
    first = weights[0].detach()
    if len(weights) == 1:
        return first
    storage = first.untyped_storage().data_ptr()
    for before, after in itertools.pairwise(weights):
        follows = before.data_ptr() + before.numel() * before.element_size() == after.data_ptr()
        alike = before.shape[1:] == after.shape[1:] and before.dtype == after.dtype
        if not (follows and alike and after.untyped_storage().data_ptr() == storage):
            return None
    if storage == 0 or not all(w.is_contiguous() and w.numel() for w in weights):
        return None
    rows = sum(w.shape[0] for w in weights)
    return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))
