"""The frozen linears of a group: one product where their weights lie together, one each where they do not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn


class FrozenLinears(Protocol):
    """Linears that read one input x [T, E] and write side by side into y [T, N]; no gradient of their own."""

    sizes: tuple[int, ...]
    """N of each."""
    adds: bool
    """Whether a product can add to what is there. If so the adapters' share is written first and the frozen products are
    added to it; if not, the frozen products come first and the adapters add to them: no pass over memory more either way."""

    def product(self, x_TE: torch.Tensor) -> torch.Tensor:
        """y [T, N] = x W^T + bias."""

    def gradient(self, dy_TN: torch.Tensor) -> torch.Tensor:
        """dx [T, E] = dy W."""


class AddingLinears(FrozenLinears, Protocol):
    """Those of which `adds` is true."""

    biases: tuple[torch.Tensor | None, ...]

    def add_product_(self, y_TN: torch.Tensor, x_TE: torch.Tensor) -> None:
        """y += x W^T, without biases."""

    def add_gradient_(self, dx_TE: torch.Tensor, dy_TN: torch.Tensor) -> None:
        """dx += dy W."""


class Linears:
    """Weights [N, E] as they are. Every product adds to its output, which costs its epilogue a read and spares a pass."""

    adds = True

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> None:
        self.weights = tuple(weights)
        self.biases = tuple(biases)
        self.sizes = tuple(w.shape[0] for w in self.weights)
        self.together = _together(self.weights)

    def product(self, x_TE: torch.Tensor) -> torch.Tensor:
        """y [T, N] = x W^T + bias."""
        if self.together is not None and not any(b is not None for b in self.biases):
            return x_TE @ self.together.t()
        y_TN = x_TE.new_empty((x_TE.shape[0], sum(self.sizes)))
        for y, w, b in zip(y_TN.split(self.sizes, 1), self.weights, self.biases, strict=True):
            torch.mm(x_TE, w.t(), out=y) if b is None else torch.addmm(b, x_TE, w.t(), out=y)
        return y_TN

    def add_product_(self, y_TN: torch.Tensor, x_TE: torch.Tensor) -> None:
        """y += x W^T, without biases."""
        if self.together is not None:
            y_TN.addmm_(x_TE, self.together.t())
            return
        for y, w in zip(y_TN.split(self.sizes, 1), self.weights, strict=True):
            y.addmm_(x_TE, w.t())

    def gradient(self, dy_TN: torch.Tensor) -> torch.Tensor:
        """dx [T, E] = dy W."""
        if self.together is not None:
            return dy_TN @ self.together
        first, *others = zip(dy_TN.split(self.sizes, 1), self.weights, strict=True)
        dx_TE = first[0] @ first[1]
        for dy, w in others:
            dx_TE.addmm_(dy, w)
        return dx_TE

    def add_gradient_(self, dx_TE: torch.Tensor, dy_TN: torch.Tensor) -> None:
        """dx += dy W."""
        if self.together is not None:
            dx_TE.addmm_(dy_TN, self.together)
            return
        for dy, w in zip(dy_TN.split(self.sizes, 1), self.weights, strict=True):
            dx_TE.addmm_(dy, w)


def lay_together(linears: Sequence[nn.Linear]) -> None:
    """Move the weights of several linears into one buffer, one below the other.

    Each parameter stays itself: the same object, contiguous, of its own shape; only its storage is shared, by rows that
    no other owns. Moving or casting a model parts them again, and the products then go one by one.
    """
    weights = [linear.weight for linear in linears]
    if _together(weights) is not None or len(weights) == 1:
        return
    with torch.no_grad():
        whole = torch.cat([w.detach() for w in weights])
        for weight, rows in zip(weights, whole.split([w.shape[0] for w in weights]), strict=True):
            weight.data = rows


def _together(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The weights as one [N, E], if that is how they lie in memory."""
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
