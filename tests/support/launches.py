"""Which Triton kernels a piece of code launches, in the interpreter."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock


@contextmanager
def launches() -> Iterator[list[str]]:
    """The names of the kernels launched inside, in order."""
    from triton.runtime.interpreter import InterpretedFunction

    names: list[str] = []
    run = InterpretedFunction.run

    def recorded(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    with mock.patch.object(InterpretedFunction, "run", recorded):
        yield names
