"""Versions of packages that do not work together, for a skipped test to name."""

from importlib.metadata import version

import pytest


def parsed(text: str) -> tuple[int, int]:
    """Major and minor version."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def interpreter_obstacle(triton: str, numpy: str) -> str | None:
    """Why Triton's interpreter cannot run a kernel, and what to install; None if it can."""
    if parsed(triton) < (3, 7) and parsed(numpy) >= (2, 4):
        return f"the interpreter of triton {triton} does not work with numpy {numpy}: pip install 'numpy<2.4', or 'triton>=3.7'"
    return None


def need_interpreter() -> None:
    """Skip the test where Triton's interpreter cannot run a kernel."""
    if why := interpreter_obstacle(version("triton"), version("numpy")):
        pytest.skip(why)
