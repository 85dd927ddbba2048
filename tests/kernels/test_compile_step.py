"""Ahead-of-time builds of rms_norm, sandwich_norm, swiglu and segment_pool: no register spills, accesses 16 bytes wide."""

import importlib.util
import os
import re

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("no Triton on this platform", allow_module_level=True)

from benchmarks.kernels.aot import SHARED_LIMIT, available, build
from l2v_kernels.rms_norm import kernel as rms_norm
from l2v_kernels.sandwich_norm import kernel as sandwich_norm
from l2v_kernels.segment_pool import kernel as segment_pool
from l2v_kernels.swiglu import kernel as swiglu

pytestmark = pytest.mark.skipif(not available(), reason="this Triton bundles no NVIDIA tools")

# In the dtype of the model; whatever else a kernel points to is fp32.
STATES = {
    "x", "delta", "weight", "sum", "y", "dy", "dsum", "dx", "gate_up", "product", "dproduct", "out", "norm_weight",
    "xa_gate", "b_gate", "xa_up", "b_up", "residual", "after", "before", "dresidual", "ddelta",
}  # fmt: skip
WIDTHS = (384, 576, 896, 1024, 2048, 3584, 5120, 8192, 14336, 16384)
"""Hidden sizes of SmolLM2 and of the Llama, Mistral and Qwen families, up to the widest that the kernels are made for."""
GEMMA_WIDTHS = (640, 1152, 2048, 2304, 2560, 3584, 3840, 4608, 5376)
"""Hidden sizes of the Gemma 2 and Gemma 3 families."""


def check(kernel, constants, chosen, dtype, arch, wide=("ld", "st")):
    """Builds a kernel of a tile; wide: whether it is loads, stores or both that must come 16 bytes at a time."""
    kinds = {"cu_ptr": "*i32", "eps": "fp32"} | {f"{name}_ptr": f"*{dtype}" for name in STATES}
    signature = {
        p.name: kinds.get(p.name, "*fp32" if p.name.endswith("_ptr") else "i32")
        for p in kernel.params
        if not p.is_constexpr
    }
    sizes = {name: value for name, value in chosen.items() if name != "num_warps"}
    used = build(kernel, signature, constants | sizes, arch, chosen["num_warps"], disassemble=False)
    problems = used.problems(arch)
    if dtype == "fp32" and constants.get("WIDTH") not in (None, 128, 4096) and used.stack <= 8:
        # Known: at some widths ptxas parks one number, outside of the loop, to fit more programs at a time.
        problems = [x for x in problems if "spills" not in x]
    assert not problems
    assert all(f"{way}.global.v4" in used.ptx for way in wide)
    return used


def check_rms_norm(heads, width, dtype, arch, residual, offset=0.0):
    chosen = rms_norm.config(width)
    constants = {"HEADS": heads, "WIDTH": width, "OFFSET": offset}
    builds = [
        check(rms_norm.rms_norm_forward_kernel, constants | {"DELTA": residual}, chosen, dtype, arch),
        check(rms_norm.rms_norm_backward_kernel, constants | {"DSUM": residual}, chosen, dtype, arch),
    ]
    if chosen["BLOCK_E"] >= 2048:
        for used in builds:
            # Long rows are read 16 bytes at a time alone; what is narrower is a number a row.
            assert not re.search(r"ld\.global\.\S*b16", used.ptx)


def check_sandwich_norm(width, dtype, arch):
    chosen, constants = sandwich_norm.config(width), {"OFFSET": 1.0, "WIDTH": width}
    for norm in (True, False):
        check(sandwich_norm.sandwich_forward_kernel, constants | {"NORM": norm}, chosen, dtype, arch)
    chosen = sandwich_norm.backward_config(width)
    check(sandwich_norm.sandwich_backward_kernel, constants | {"DSUM": True}, chosen, dtype, arch)


def check_segment_pool(width, dtype, arch, norm, offset=0.0):
    constants = {"NORM": norm, "OFFSET": offset, "WIDTH": width, "PIECE": segment_pool.PIECE}
    chosen = segment_pool.config(width)
    check(segment_pool.pool_kernel, constants, chosen, dtype, arch, wide=["ld"])
    # Without a norm the backward reads a row a piece, and writes a row a token.
    check(segment_pool.pool_backward_kernel, constants, chosen, dtype, arch, wide=("ld", "st") if norm else ["st"])


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("heads", "width", "residual"), [(1, 4096, True), (32, 128, False)])
def test_rms_norm(heads, width, residual, dtype, arch):
    check_rms_norm(heads, width, dtype, arch, residual)


@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_norms_of_gemma(arch):
    """Those of Gemma 3 270M between blocks, and of its query heads."""
    check_sandwich_norm(640, "bf16", arch)
    check_rms_norm(4, 256, "bf16", arch, residual=False, offset=1.0)


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_rms_norm_weight_gradient(dtype, arch):
    constants = {"HEADS": 1, "WIDTH": 4096}
    check(rms_norm.rms_norm_weight_gradient_kernel, constants, rms_norm.WEIGHT_GRADIENT, dtype, arch, wide=["ld"])


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize(("dtype", "gelu"), [("bf16", False), ("fp32", False), ("bf16", True)])
def test_swiglu(dtype, gelu, arch):
    for kernel in (swiglu.swiglu_forward_kernel, swiglu.swiglu_backward_kernel):
        constants = {"RANK_GATE": 0, "RANK_UP": 0, "PRECISION": "ieee", "GELU": gelu}
        assert not re.search(r"global\.b(16|32)", check(kernel, constants, swiglu.CONFIG, dtype, arch).ptx)


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("ranks", [(16, 16), (64, 64), (0, 16)])
def test_swiglu_with_lora(ranks, dtype, arch, gelu=False):
    chosen = swiglu.LORA_CONFIG[4 if dtype == "fp32" else 2]
    for kernel in (swiglu.swiglu_forward_kernel, swiglu.swiglu_backward_kernel):
        constants = {"RANK_GATE": ranks[0], "RANK_UP": ranks[1], "PRECISION": "ieee", "GELU": gelu}
        assert "global.b16" not in check(kernel, constants, chosen, dtype, arch).ptx


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_segment_pool(dtype, arch):
    check_segment_pool(4096, dtype, arch, norm=True)
    constants = {"NORM": True, "OFFSET": 0.0, "WIDTH": 4096, "PIECE": segment_pool.PIECE}
    check(segment_pool.combine_kernel, constants, segment_pool.COMBINE_CONFIG, dtype, arch, wide=["ld"])


if os.environ.get("L2V_SLOW") == "1":

    @pytest.mark.parametrize("arch", SHARED_LIMIT)
    @pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
    @pytest.mark.parametrize("width", WIDTHS)
    def test_everywhere(width, dtype, arch):
        for residual in (False, True):
            check_rms_norm(1, width, dtype, arch, residual)
        for norm in (False, True):
            check_segment_pool(width, dtype, arch, norm)

    @pytest.mark.parametrize("arch", SHARED_LIMIT)
    @pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
    @pytest.mark.parametrize("width", GEMMA_WIDTHS)
    def test_gemma_everywhere(width, dtype, arch):
        check_rms_norm(1, width, dtype, arch, residual=False, offset=1.0)
        check_sandwich_norm(width, dtype, arch)
        check_segment_pool(width, dtype, arch, norm=True, offset=1.0)

    @pytest.mark.parametrize("arch", SHARED_LIMIT)
    @pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
    @pytest.mark.parametrize("ranks", [(16, 16), (64, 64), (0, 16)])
    def test_gelu_everywhere(ranks, dtype, arch):
        test_swiglu(dtype, True, arch)
        test_swiglu_with_lora(ranks, dtype, arch, gelu=True)

    @pytest.mark.parametrize("arch", SHARED_LIMIT)
    @pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
    @pytest.mark.parametrize("width", [64, 96, 128, 256])
    def test_heads_everywhere(width, dtype, arch):
        check_rms_norm(8, width, dtype, arch, residual=False)
