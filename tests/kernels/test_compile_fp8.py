"""Ahead-of-time builds of the FP8 kernels, without a GPU: no register spills, wide loads and stores, e4m3 made in hardware."""

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("no Triton on this platform", allow_module_level=True)

from benchmarks.kernels.aot import SHARED_LIMIT, available, build

pytestmark = pytest.mark.skipif(not available(), reason="this Triton bundles no NVIDIA tools")

CAPABILITIES = (89, 90, 100, 120)
"""sm_80 has no e4m3: `quantize_rows` takes the reference there."""


def used_by(width, dtype, capability, *, factors):
    from l2v_kernels.fp8 import kernel

    types = {"x_ptr": f"*{dtype}", "factors_ptr": "*fp32", "q_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
    if width <= kernel.MAX_WIDTH:
        function, config = kernel.rows_kernel, dict(kernel.config(width))
        constants = {"WIDTH": width}
    else:
        function, config, constants = kernel.wide_rows_kernel, dict(kernel.WIDE_CONFIG[4 if dtype == "fp32" else 2]), {}
    warps = config.pop("num_warps")
    signature = {p.name: types.get(p.name, "i32") for p in function.params if not p.is_constexpr}
    return build(function, signature, constants | config | {"FACTORS": factors}, capability, warps, disassemble=False)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=pytest.mark.slow), "fp32"])
@pytest.mark.parametrize(
    ("width", "factors"), [(576, False), (4096, False), (4096, True), (6144, True), (14336, False), (28672, True)]
)
def test_what_a_layer_launches(width, factors, dtype, capability):
    """SmolLM2's and Llama-3-8B's inputs; with factors the gradients of outputs: of o and down, of q, k, v, of gate, up."""
    used = used_by(width, dtype, capability, factors=factors)
    assert not used.stack and used.shared <= min(SHARED_LIMIT.values()), used.registers
    assert "ld.global.v4.b32" in used.ptx and "st.global.v4.b32" in used.ptx
    assert "cvt.rn.satfinite.e4m3x2." in used.ptx
