"""Spans: which kind of work an operation belongs to, for a profiler. Where nobody records, one costs a look at a flag.

A launch belongs to the innermost span around it. The backward of an op that autograd runs belongs to the span of its forward.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch

PREFIX = "l2v::"

_recording = False
_nothing = contextlib.nullcontext()


def span(kind: str) -> contextlib.AbstractContextManager:
    """What runs inside is of this kind: `torch.profiler.record_function("l2v::KIND")` while `recording()`."""
    return torch.profiler.record_function(PREFIX + kind) if _recording else _nothing


def spanned(kind: str) -> Callable[[Callable], Callable]:
    """A function whose every call is a span."""

    def wrap(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            if not _recording:
                return function(*args, **kwargs)
            with span(kind):
                return function(*args, **kwargs)

        return call

    return wrap


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Spans reach the profiler, in all threads: the backward runs in one of its own."""
    global _recording
    before, _recording = _recording, True
    try:
        yield
    finally:
        _recording = before
