"""Triton's interpreter without its detour: the language is patched once a launch, not once a call of a device function.

Importing this module is enough. `InterpretedFunction.__call__` patches triton.language before every call of a device function,
`tl.sum` and `tl.zeros` among them, by listing all members of three modules: milliseconds each, most of the time of a kernel.
Within a launch all of it is patched already, and a second patch of the same modules changes nothing. NumPy's dtype of a Triton
one is remembered too: the interpreter makes a dictionary of all of them to look up one.
"""

import functools
import inspect

from triton import language as tl
from triton.runtime import interpreter

_patch, _convert = interpreter._patch_lang, interpreter._get_np_dtype
_scopes: dict[frozenset[str], interpreter._LangPatchScope] = {}  # of the launch that runs, by the modules they patch


@functools.cache
def _modules(fn) -> frozenset[str]:
    """The modules that `_patch_lang` patches for a function: those that it can see."""
    return frozenset(m.__name__ for m in fn.__globals__.values() if inspect.ismodule(m) and m in (tl, tl.core))


class _Launch:
    """What the launch restores at its end: everything that was patched since it began."""

    def restore(self) -> None:
        while _scopes:
            _scopes.popitem()[1].restore()


def _patch_once(fn):
    if _modules(fn) not in _scopes:
        _scopes[_modules(fn)] = _patch(fn)
    return _Launch()


def _np_dtype(dtype, known={}):  # noqa: B006 (filled over the life of the process)
    name = dtype.scalar.name
    if name not in known:
        known[name] = _convert(dtype)
    return known[name]


interpreter._patch_lang, interpreter._get_np_dtype = _patch_once, _np_dtype


def _strict(self, *args, **kwargs):
    """A compiled kernel refuses an argument that it does not have; the interpreter would drop it."""
    options = {"grid", "warmup", "num_warps", "num_stages", "num_ctas", "maxnreg", "debug", "enable_fp_fusion"}
    unknown = kwargs.keys() - set(inspect.signature(self.fn).parameters) - options
    assert not unknown, f"{self.fn.__name__} has no argument {', '.join(sorted(unknown))}"
    return _run(self, *args, **kwargs)


_run, interpreter.InterpretedFunction.run = interpreter.InterpretedFunction.run, _strict
