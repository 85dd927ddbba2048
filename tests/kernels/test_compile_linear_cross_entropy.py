"""Ahead-of-time builds of the look at logits, without a GPU: no spills, 16 bytes a load and store."""

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("no Triton on this platform", allow_module_level=True)

from benchmarks.kernels.aot import SHARED_LIMIT, available, build
from l2v_kernels.linear_cross_entropy.kernel import CONFIG, softmax_stats_kernel

pytestmark = pytest.mark.skipif(not available(), reason="this Triton bundles no NVIDIA tools")

POINTERS = {"logits_ptr": "*fp32", "labels_ptr": "*i64", "losses_ptr": "*fp32", "hits_ptr": "*u8"}


def usage(capability, dtype, *, bias, gradient):
    signature = POINTERS | {"bias_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "n_columns": "i32"}
    constants = {"BIAS": bias, "GRADIENT": gradient, "BLOCK": CONFIG["BLOCK"]}
    return build(softmax_stats_kernel, signature, constants, capability, CONFIG["num_warps"], disassemble=False)


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("bias", [False, True])
def test_training(capability, dtype, bias):
    used = usage(capability, dtype, bias=bias, gradient=True)
    assert not used.problems(capability)
    # Five programs of four warps on a multiprocessor of 65,536 registers, but for a bias on sm_80 and 120: four.
    assert used.registers <= (128 if bias else 96)
    assert "ld.global.v4.b32" in used.ptx and "st.global.v4.b32" in used.ptx
    # Logits and out: nothing but the label, its logit and the row's results goes a word at a time.
    assert used.ptx.count("ld.global.b32") <= (3 if bias else 2)


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_evaluation(capability):
    used = usage(capability, "bf16", bias=False, gradient=False)
    assert not used.problems(capability) and used.registers <= 96
    assert "ld.global.v4.b32" in used.ptx
