import os
import sys
from pathlib import Path

import pytest
import torch
from support.forked import KERNELS, output_of
from support.versions import need_interpreter

PACKAGE = Path(__file__).resolve().parents[2] / "kernels"
# An installed distribution puts l2v_kernels on the path itself; a bare checkout does not.
for folder in (PACKAGE, PACKAGE.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import support.interpreter  # noqa: F401 (it patches Triton's interpreter)


@pytest.fixture(autouse=True)
def _same_start():
    # On tensors this small threads mostly wait for each other, for long where the cores are shared.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(config, items):
    """Tests named test_interpreted... run in the process that `run_interpreted` starts, and only there."""
    here = Path(__file__).parent
    wrong = [
        item for item in items if here in item.path.parents and item.name.startswith("test_interpreted") != INTERPRETED
    ]
    config.hook.pytest_deselected(items=wrong)
    items[:] = [item for item in items if item not in wrong]


@pytest.fixture
def run_interpreted():
    """Runs the tests of a file named test_interpreted... in a process where Triton interprets its kernels.

    Triton decides at import whether it interprets, so this process, which also compiles, cannot do both.
    """

    need_interpreter()

    def run(path):
        command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
        said = output_of(command, os.environ | {"TRITON_INTERPRET": "1"}, KERNELS)
        assert "skipped" not in said, said

    return run
