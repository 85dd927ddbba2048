"""A quick launch takes the compiled kernel that Triton would take, and leaves everything unusual to Triton."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton")
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from l2v_kernels import jit as jit_module  # noqa: E402
from l2v_kernels.jit import KNOWN_VERSIONS, QuickKernel, jit, kind_of  # noqa: E402


def four(x_ptr, y, n, m, SIZE: "triton.language.constexpr", FLAG: "triton.language.constexpr"):
    """Never compiled."""


INTEGERS = st.sampled_from(
    [0, 1, 2, 15, 16, 17, 32, -1, -16, 2**31 - 1, 2**31, 2**32, -(2**31), -(2**31) - 1, 2**62, 2**63]
)
BUFFER = torch.zeros(64, dtype=torch.float64)
TENSORS = st.builds(
    lambda dtype, start: BUFFER.view(torch.uint8)[start * 8 :].view(dtype),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int32, torch.int64]),
    st.integers(0, 3),
)
DESCRIPTORS = st.builds(
    lambda dtype, rows: TensorDescriptor.from_tensor(torch.zeros(32, 16, dtype=dtype), [rows, 16]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([8, 16]),
)
CONSTANTS = st.sampled_from([0, 1, 1.0, True, False, None, "ieee"])
ARGUMENTS = st.tuples(st.one_of(TENSORS, DESCRIPTORS), st.one_of(INTEGERS, st.floats(-2, 2)), INTEGERS, INTEGERS)


def specialisation(kernel):
    binder = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    return lambda arguments, constants: str(binder(*arguments, **constants)[1:])


@pytest.fixture(scope="module")
def triton_says():
    return specialisation(QuickKernel(four, do_not_specialize=["m"]))


@settings(max_examples=300, deadline=None)
@given(one=ARGUMENTS, two=ARGUMENTS, constants=st.tuples(CONSTANTS, CONSTANTS), others=st.tuples(CONSTANTS, CONSTANTS))
def test_arguments_of_one_kind_are_one_kernel_for_triton(triton_says, one, two, constants, others):
    named = [
        {"SIZE": size, "FLAG": flag, "debug": False, "instrumentation_mode": ""} for size, flag in (constants, others)
    ]
    kinds = [kind_of(arguments, 0, given) for arguments, given in zip((one, two), named, strict=True)]
    if kinds[0] == kinds[1]:
        assert triton_says(one, named[0]) == triton_says(two, named[1])
    assert kind_of(one, 0, named[0]) != kind_of(one, 1, named[0]), "devices have kernels of their own"


def test_what_triton_tells_apart_has_another_kind(triton_says):
    """The reverse of the test above would pass with one kind for everything."""
    x, constants = BUFFER, {"SIZE": 1, "FLAG": True}
    told_apart = [
        (x, 1.0, 16, 2), (x, 1.0, 1, 2), (x, 1.0, 3, 2), (x, 1.0, 2**40 + 1, 2), (x[1:], 1.0, 16, 2), (x.float(), 1.0, 16, 2),
        (x, 2, 16, 2),
    ]  # fmt: skip
    kinds = [kind_of(arguments, 0, constants) for arguments in told_apart]
    assert len(set(kinds)) == len(told_apart)
    for other in (
        {"SIZE": 2, "FLAG": True},
        {"SIZE": 1, "FLAG": 1},
        {"SIZE": 1.0, "FLAG": True},
        {"SIZE": True, "FLAG": 1},
    ):
        assert kind_of(told_apart[0], 0, other) != kinds[0]


class Compiled:
    """What Triton returns after a launch; notes the launches made with it directly."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.launches = []

    def run(self, *args):
        self.launches.append(args)


@pytest.fixture
def launched(monkeypatch):
    """A kernel, the launches that went through Triton, and what it compiled."""
    kernel, compiled, through = QuickKernel(four, do_not_specialize=["m"]), Compiled(), []

    def run(self, *args, grid, warmup, **constants):
        through.append((args, grid, constants))
        return compiled

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    return SimpleNamespace(kernel=kernel, compiled=compiled, through=through)


def test_the_second_launch_of_a_kind_is_quick(launched):
    x = BUFFER
    for n in (3, 5):
        assert launched.kernel[(n, 2)](x, 0.5, n, 16, SIZE=4, FLAG=True, num_warps=8) is launched.compiled
    assert len(launched.through) == 1
    (found,) = launched.compiled.launches
    assert found == (5, 2, 1, 7, "function", "metadata", None, None, None, x, 0.5, 5, 16, 4, True)
    launched.kernel[(1,)](x, 0.5, 16, 16, SIZE=4, FLAG=True, num_warps=8)  # a multiple of 16
    launched.kernel[(1,)](x, 0.5, 5, 16, SIZE=4, FLAG=True, num_warps=4)  # another option
    assert len(launched.through) == 3 and len(launched.compiled.launches) == 1


def test_constants_in_another_order_are_launched_in_the_kernels(launched):
    for _ in range(2):
        launched.kernel[(1,)](BUFFER, 0.5, 3, 16, FLAG=True, SIZE=4)
    assert launched.compiled.launches[0][-2:] == (4, True)


@pytest.mark.parametrize("unusual", ["bool", "list", "grid", "hook", "warmup", "default"])
def test_what_is_unusual_goes_through_triton_each_time(launched, unusual):
    arguments = [BUFFER, 0.5, 3, 16]
    grid = (lambda meta: (1,)) if unusual == "grid" else (1,)
    if unusual in ("bool", "list"):
        arguments[2] = True if unusual == "bool" else [1]
    constants = {"SIZE": 4} if unusual == "default" else {"SIZE": 4, "FLAG": True}
    hooks = mock.patch.object(knobs.runtime.launch_enter_hook, "calls", [print] if unusual == "hook" else [])
    with hooks:
        for _ in range(3):
            if unusual == "warmup":
                launched.kernel.run(*arguments, grid=grid, warmup=True, **constants)
            else:
                launched.kernel[grid](*arguments, **constants)
    assert len(launched.through) == 3 and not launched.compiled.launches


def test_an_unknown_version_launches_by_itself(monkeypatch):
    assert type(jit()(four)) is QuickKernel or knobs.runtime.interpret
    monkeypatch.setattr(triton, "__version__", "4.0.0")
    assert type(jit()(four)) is not QuickKernel
    assert triton.__version__.rsplit(".", 1)[0] not in KNOWN_VERSIONS and jit_module.triton is triton
