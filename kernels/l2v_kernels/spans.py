"""Spans: which kind of work an operation belongs to, for a profiler. While nothing records, a span costs the test of a flag.

A launch belongs to the innermost span around it. The backward that autograd runs belongs to the span of its forward.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch

PREFIX = "l2v::"

_recording = False
_nothing = contextlib.nullcontext()


def span(kind: str) -> contextlib.AbstractContextManager:
    """Marks what runs inside as this kind of work: `torch.profiler.record_function("l2v::KIND")` while `recording()`."""
    return torch.profiler.record_function(PREFIX + kind) if _recording else _nothing


def spanned(kind: str) -> Callable[[Callable], Callable]:
    """Decorator: each call of the function is a span of this kind."""

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
    """Inside, spans reach the profiler, in all threads: autograd runs the backward in another one."""
    global _recording
    before, _recording = _recording, True
    try:
        yield
    finally:
        _recording = before
