"""Full-size steps on the null GPU: what they launch, wait for, compile and reserve; and planted faults, which must be found.

Needs no GPU, but gigabytes of CUDA wheels, so it runs only where L2V_NULLGPU_HOME names a folder that holds them:
`python -m tests.nullgpu --help` says how to make one.
"""

from __future__ import annotations

import os
import re

import pytest

from .build import build
from .cases import SUITE
from .check import findings, read_budgets
from .faults import FAULTS
from .place import VARIABLE, Home
from .run import run_case, shrunk

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(VARIABLE not in os.environ, reason=f"{VARIABLE} is not set; see python -m tests.nullgpu --help"),
]
PLANTED = {
    "item-in-backward": ("mntp", r"mntp waits for the device in its backward, 1 x \w+ at tests/nullgpu/faults.py"),
    "kernel-per-length": (
        "simcse-long",
        r"simcse compiles zero again after step 5, \d+ x at tests/nullgpu/faults.py",
    ),
    "pageable-copy": (
        "mntp",
        r"mntp copies host to device with pageable memory in its forward, 1 x at tests/nullgpu/faults",
    ),
    "idle-rank": ("mntp-2-ranks", r"rank 1 is without its share of the work in mntp: \d+% of the busiest rank's GEMMs"),
}


@pytest.fixture(scope="module")
def home() -> Home:
    found = Home.find()
    build(found, download=False)
    return found


@pytest.mark.parametrize("name", SUITE)
def test_a_case_holds(home, name):
    assert findings(run_case(home, SUITE[name]), read_budgets().get(name)) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_named(home, fault):
    name, sentence = PLANTED[fault]
    case = shrunk(SUITE[name], layers=1)
    run = run_case(home, case, fault=fault)
    assert run.codes == [0] * case.world, run.outputs[0][-2000:]
    said = "\n".join(findings(run, {}))
    assert re.search(sentence, said), said
    clean = "\n".join(findings(run_case(home, case), {}))
    assert not re.search(sentence, clean), clean
