"""All adapters of a fused model as one trainable parameter.

Their gradients are written side by side into one tensor and reach the engine once a backward. With a parameter for each
matrix, accumulation, reduction and update take several launches for each of them: thousands a step in a model of 8B.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from l2v.model.fused.spec import Group
from l2v_kernels.lora_linear.op import MatrixGradients, finish
from l2v_kernels.lora_linear.settings import PendingSum

ALIGNMENT = 16
"""Elements to which a group's matrices are aligned: kernels read 16 bytes at once, and compile for pointers that allow it."""


@dataclass(frozen=True)
class Place:
    """Where a group's matrices lie: all A one below the other [ranks, inputs] from `a`, then all B, flat, from `b`."""

    a: int
    ranks: int
    inputs: int
    b: int
    n_b: int


class FlatAdapters(nn.Module):
    """weight [N]: A and B of every adapter of the groups, in the adapters' dtype; padding between them is zero.

    PEFT's matrices stay parameters of their modules, under their own names, and become views of it without gradients of their
    own. An engine that moves the weight's storage must be followed by `bind`.
    """

    def __init__(self, groups: Iterable[Group]) -> None:
        """Copy the current matrices of the groups' active adapters."""
        super().__init__()
        self.places: dict[Group, Place] = {}
        self.matrices: dict[nn.Parameter, tuple[int, int]] = {}
        """Begin and end of each matrix."""
        end = used = 0
        for group in groups:
            adapters = group.adapters()
            if not adapters:
                continue
            a = _aligned(end)
            b = _aligned(a + sum(adapters.sizes[0]))
            self.places[group] = Place(a, adapters.ranks, adapters[0].a_RE.shape[1], b, sum(adapters.sizes[1]))
            end = b + sum(adapters.sizes[1])
            for at, matrices in ((a, [x.a_RE for x in adapters]), (b, [x.b_OR for x in adapters])):
                for matrix in matrices:
                    assert isinstance(matrix, nn.Parameter)
                    self.matrices[matrix] = (at, at := at + matrix.numel())
                    used += matrix.numel()
        first = next(iter(self.matrices))
        self.padded = used < end
        flat = torch.zeros(end, dtype=first.dtype, device=first.device)
        for matrix, (begin, stop) in self.matrices.items():
            flat[begin:stop] = matrix.detach().flatten()
            matrix.requires_grad_(False)
        self.weight = nn.Parameter(flat)
        self.bind()

    def bind(self) -> None:
        """Make the matrices views of the weight again, after it moved."""
        for matrix in self.matrices:
            matrix.data = self.part(self.weight.detach(), matrix)

    def part(self, whole: torch.Tensor, matrix: nn.Parameter) -> torch.Tensor:
        """A matrix's part of a tensor like the weight, as a view of the matrix's shape."""
        begin, end = self.matrices[matrix]
        return whole[begin:end].view(matrix.shape)

    def split(self, whole: torch.Tensor, names: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        """A tensor like the weight, by the names of the matrices."""
        return {name: self.part(whole, matrix) for name, matrix in names.items()}

    def join(self, parts: Mapping[str, torch.Tensor], names: Mapping[str, nn.Parameter]) -> torch.Tensor:
        """The reverse of `split`; what no part covers is zero."""
        first = next(iter(parts.values()))
        whole = torch.zeros(len(self.weight), dtype=first.dtype, device=first.device)
        for name, matrix in names.items():
            self.part(whole, matrix).copy_(parts[name])
        return whole

    def collector(self) -> Collector:
        """Collects the gradients of one forward; call it with gradients enabled."""
        return Collector(self)


class Collector:
    """The gradients of all adapters of one forward.

    token: a tensor without elements that every function with adapters takes as an argument. Autograd runs its backward when
    all of them have written their gradients, and the whole becomes the gradient of the flat weight.
    """

    def __init__(self, flat: FlatAdapters) -> None:
        self.flat = flat
        self._whole: torch.Tensor | None = None
        self._missing: set[Group] = set()
        self._pending = PendingSum()
        self.token = _Deliver.apply(flat.weight, self)

    def of(self, group: Group) -> MatrixGradients:
        """Where a backward writes the gradients of a group, all of them."""
        if self._whole is None:
            new = torch.zeros_like if self.flat.padded else torch.empty_like
            self._whole = new(self.flat.weight)
            self._missing = set(self.flat.places)
        self._missing.discard(group)
        return self._part(group)

    def _part(self, group: Group) -> MatrixGradients:
        assert self._whole is not None
        place, whole = self.flat.places[group], self._whole
        da_RE = whole.as_strided((place.ranks, place.inputs), (place.inputs, 1), place.a)
        return MatrixGradients(da_RE, whole.as_strided((place.n_b,), (1,), place.b), self._pending)

    def take(self) -> torch.Tensor | None:
        """The gradient of the flat weight, given away."""
        finish(self._pending)
        for group in self._missing:  # whose adapters were switched off
            part = self._part(group)
            part.da_RE.zero_()
            part.db.zero_()
        self._missing = set()
        whole, self._whole = self._whole, None
        return whole


class _Deliver(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: torch.Tensor, collector: Collector) -> torch.Tensor:
        ctx.collector = collector
        ctx.set_materialize_grads(False)
        return weight.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        return ctx.collector.take(), None


def _aligned(at: int) -> int:
    return -(-at // ALIGNMENT) * ALIGNMENT
