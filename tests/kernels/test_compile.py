"""Ahead-of-time builds of the kernels, without a GPU: no register spills, shared memory within limits."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("no Triton on this platform", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
needs_ptxas = pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this Triton bundles no NVIDIA tools")

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory one block may use (CUDA programming guide, compute capabilities)."""


def build(kernel, signature, constants, capability, num_warps, tmp_path):
    """Compiles as a launch would: what the kernel specialises is divisible by 16."""
    arguments = {**signature, **dict.fromkeys(constants, "constexpr")}
    aligned = [
        (i,)
        for i, name in enumerate(arguments)
        if name in signature and arguments[name] != "fp32" and name not in (kernel.do_not_specialize or ())
    ]
    source = ASTSource(
        kernel,
        signature=arguments,
        constexprs=constants,
        attrs={i: [["tt.divisibility", 16]] for i in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [CUOBJDUMP, "--dump-resource-usage", cubin], check=True, capture_output=True, text=True
    ).stdout
    return compiled, {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}


def check(compiled, usage, capability):
    assert usage["REG"] > 0
    assert usage["STACK"] == 0 and usage["LOCAL"] == 0, f"registers spill: {usage}"
    assert compiled.metadata.shared <= SHARED_LIMIT[capability]


@needs_ptxas
@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_dropout(capability, dtype, tmp_path):
    from l2v_kernels.dropout.kernel import CONFIG, dropout_kernel

    signature = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "seeds_ptr": "*i64", "rows_ptr": "*i32"}
    names = ("n_tokens", "n_columns", "stride_x", "stride_y", "stream", "drop_below")
    signature |= dict.fromkeys(names, "i32") | {"scale": "fp32"}
    constants = {name: CONFIG[name] for name in ("BLOCK_T", "BLOCK_E")}
    compiled, usage = build(dropout_kernel, signature, constants, capability, CONFIG["num_warps"], tmp_path)
    check(compiled, usage, capability)
    # 128-bit accesses: one byte of mask an element would otherwise cost as much as the element.
    assert "ld.global.v4.b32" in compiled.asm["ptx"] and "st.global.v4.b32" in compiled.asm["ptx"]
