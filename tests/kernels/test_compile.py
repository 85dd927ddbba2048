"""Ahead-of-time builds of the kernels, without a GPU: no register spills, shared memory within limits, tensor cores."""

import importlib.util
import os
from dataclasses import replace

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("no Triton on this platform", allow_module_level=True)

from benchmarks.kernels import resources_info_nce
from benchmarks.kernels.aot import SHARED_LIMIT, Usage, available, build
from benchmarks.kernels.resources_attention import HEAD_DIMS, Case, main
from benchmarks.resources.__main__ import examine, misses
from benchmarks.resources.cases import attention

pytestmark = pytest.mark.skipif(not available(), reason="this Triton bundles no NVIDIA tools")


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_dropout(capability, dtype):
    from l2v_kernels.dropout.kernel import CONFIG, dropout_kernel

    signature = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "seeds_ptr": "*i64", "rows_ptr": "*i32"}
    names = ("n_tokens", "n_columns", "stride_x", "stride_y", "stream", "drop_below")
    signature |= dict.fromkeys(names, "i32") | {"scale": "fp32"}
    constants = {name: CONFIG[name] for name in ("BLOCK_T", "BLOCK_E")}
    used = build(dropout_kernel, signature, constants, capability, CONFIG["num_warps"], disassemble=False)
    assert not used.problems(capability)
    # 128-bit accesses: one byte of mask an element would otherwise cost as much as the element.
    assert "ld.global.v4.b32" in used.ptx and "st.global.v4.b32" in used.ptx


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize(("dtype", "heads", "half"), [("bf16", 32, 64), ("fp32", 32, 64), ("bf16", 4, 128)])
def test_rope(capability, dtype, heads, half):
    from l2v_kernels.rope.kernel import CONFIG, rope_kernel

    signature = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    names = ("n_rows", "stride_xt", "stride_xh", "stride_yt", "stride_yh", "stride_cos", "stride_sin")
    signature |= dict.fromkeys(names, "i32")
    constants = {"HEADS": heads, "HALF": half, "BLOCK_HALF": half, "INVERSE": False, "BLOCK_ROWS": CONFIG["BLOCK_ROWS"]}
    used = build(rope_kernel, signature, constants, capability, CONFIG["num_warps"], disassemble=False)
    assert not used.problems(capability)
    assert "ld.global.v4.b32" in used.ptx and "st.global.v4.b32" in used.ptx


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize(("dtype", "rank"), [("bf16", 16), ("bf16", 64), ("fp32", 16)])
def test_rope_that_adds_the_adapters(capability, dtype, rank):
    from l2v_kernels.rope.kernel import HEADS_CONFIG, heads_kernel

    config = dict(HEADS_CONFIG)
    warps, stages = config.pop("num_warps"), config.pop("num_stages")
    types = dict.fromkeys(("x_ptr", "xa_ptr", "b_ptr", "cos_ptr", "sin_ptr"), f"*{dtype}")
    signature = {p.name: types.get(p.name, "i32") for p in heads_kernel.params if not p.is_constexpr}
    constants = config | {"QUERY_HEADS": 32, "KEY_HEADS": 8, "HALF": 64, "BLOCK_HALF": 64}
    constants |= {"RANK": rank, "BLOCK_R": rank, "PRECISION": "ieee"}
    used = build(heads_kernel, signature, constants, capability, warps, stages, disassemble=dtype == "bf16")
    assert not used.problems(capability, "HMMA" if dtype == "bf16" else None), used.registers
    assert "ld.global.v4.b32" in used.ptx and "st.global.v4.b32" in used.ptx


def check(case):
    used = case.build()
    problems = used.problems(case.arch, case.matrix)
    if (case.kind, case.head_dim, case.dtype) == ("query", 256, "fp32"):
        # Known: no tile of this one fits the registers. fp32 is for tests, and spilled numbers are right numbers.
        problems = [x for x in problems if "spills" not in x]
    assert not problems, f"{case} {case.config}: {problems}"
    # Loads of q, k and v are copied 16 bytes at a time, whatever the strides of the packed buffer, or by descriptors.
    assert not case.config.tma or "cp.async.bulk.tensor" in used.ptx
    assert "cp.async.cg.shared.global" in used.ptx or "ld.global.v4.b32" in used.ptx


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("kind", ["forward", "query", "key"])
def test_attention(kind, arch):
    """The shape of Llama-3-8B, with dropout, which needs the most registers."""
    check(Case(kind, arch, 128, dropout=True))


@pytest.mark.parametrize("kind", ["forward", "query", "key"])
def test_attention_of_gemma_3_270m(kind):
    """Four query heads of 256 on one key head, windowed: SimCSE's local layers, where registers are fewest."""
    check(Case(kind, 80, 256, window=True, dropout=True))


def check_on_8_9(case):
    """8.6 and 8.9 take the tiles of 12.0 (`launching.architecture`), and their code needs other registers."""
    used = replace(case, arch=89).build(case.config, disassemble=False)
    assert not used.stack and used.shared <= SHARED_LIMIT[120], f"{case} {case.config}: {used.registers} registers"


@pytest.mark.parametrize("kind", ["forward", "query", "key"])
def test_attention_of_12_0_on_8_9(kind):
    check_on_8_9(Case(kind, 120, 128, dropout=True))


@pytest.mark.parametrize(
    ("kind", "D", "dropout"), [("forward", 96, False), ("forward", 128, False), ("query", 64, True)]
)
def test_short_tiles_of_12_0_on_8_9(kind, D, dropout):
    """With a pipeline stage more they spill 8 to 24 bytes a thread there, under Triton 3.6."""
    check_on_8_9(Case(kind, 120, D, short=True, dropout=dropout))


CHOSEN = [case for case in attention(SHARED_LIMIT, dropouts=(False,)) if "dropout's tile" not in case.variant]


@pytest.mark.slow
@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: f"{case.kernel} sm_{case.arch} {case.variant}")
def test_tiles_without_dropout(case):
    """No spill, and no more issued instructions for a clock of the tensor core than the target allows."""
    row = examine(case, issue=True)
    assert not misses(row), row
    assert "other" not in row["loop"]["pipes"]


if os.environ.get("L2V_SLOW") == "1":

    @pytest.mark.parametrize("arch", SHARED_LIMIT)
    @pytest.mark.parametrize("D", HEAD_DIMS)
    @pytest.mark.parametrize("kind", ["forward", "query", "key"])
    @pytest.mark.parametrize("dropout", [False, True])
    @pytest.mark.parametrize("short", [False, True])
    @pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
    def test_attention_everywhere(kind, arch, D, dropout, short, dtype):
        check(Case(kind, arch, D, dtype, short, dropout))

    @pytest.mark.parametrize("D", HEAD_DIMS)
    @pytest.mark.parametrize("kind", ["forward", "query", "key"])
    @pytest.mark.parametrize("chosen", ["plain", "dropout", "causal", "window", "softcap"])
    @pytest.mark.parametrize("length", ["short", "medium", "long"])
    def test_attention_of_12_0_on_8_9_everywhere(kind, D, chosen, length):
        flags = {} if chosen == "plain" else {chosen: True}
        check_on_8_9(Case(kind, 120, D, short=length == "short", medium=length == "medium", **flags))

    @pytest.mark.parametrize("arch", SHARED_LIMIT)
    @pytest.mark.parametrize("kind", ["forward", "query", "key"])
    @pytest.mark.parametrize("group", [1, 2, 4])
    @pytest.mark.parametrize("short", [False, True])
    @pytest.mark.parametrize("flags", [(), ("dropout",), ("causal",), ("softcap",), ("softcap", "dropout")], ids=str)
    def test_attention_of_gemma(kind, arch, group, short, flags):
        check(Case(kind, arch, 256, window=True, short=short, group=group, **dict.fromkeys(flags, True)))

    @pytest.mark.parametrize("arch", SHARED_LIMIT)
    @pytest.mark.parametrize("kind", ["forward", "query", "key"])
    @pytest.mark.parametrize("group", [1, 8])
    @pytest.mark.parametrize("chosen", ["plain", "causal"])
    def test_attention_variants(kind, arch, group, chosen):
        check(Case(kind, arch, 128, dropout=True, causal=chosen == "causal", group=group))


def check_info_nce(case):
    used = case.build()
    problems = used.problems(case.arch, case.matrix)
    exact = case.dtype == "fp32" and case.kernel.startswith("fused")
    if (case.prefixes > 8 and used.stack <= 16) or (exact and used.stack <= 32):
        # Known: ptxas aims at 128 registers a thread and parks a few scalars outside of the loops over scores. The fused
        # kernels take fp32 only where they are asked to.
        problems = [x for x in problems if "spills" not in x]
    assert not problems, f"{case} {case.config}: {problems}"
    if case.dtype != "fp32" and case.kernel.startswith("fused"):
        # Embeddings come in 16 bytes at a time, while earlier ones are multiplied.
        assert "cp.async.cg.shared.global" in used.ptx
    else:
        assert "ld.global.v4" in used.ptx


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("kernel", resources_info_nce.KERNELS)
def test_info_nce(kernel, arch):
    """What a trainer that masks duplicates launches."""
    check_info_nce(resources_info_nce.Case(kernel, arch))


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kernel", ["norms", "finish", "codes"])
def test_info_nce_passes_over_embeddings(kernel, dtype, arch):
    from l2v_kernels.info_nce import config, kernel_elementwise, kernel_quantize

    pointers = {
        "x_ptr": f"*{dtype}",
        "bounds_ptr": "*i32",
        "sum_ptr": "*fp32",
        "along_ptr": "*fp32",
        "unscale_ptr": "*fp32",
        "factor_ptr": "*fp32",
        "inverse_ptr": "*fp32",
    }
    pointers["out_ptr"] = "*fp64" if kernel == "norms" else f"*{dtype}"
    function = getattr(kernel_quantize if kernel == "codes" else kernel_elementwise, f"{kernel}_kernel")
    chosen = dict(config.NORMS if kernel == "norms" else config.FINISH)
    warps = chosen.pop("num_warps")
    flags = {
        "norms": {"P": 6, "ALIGN": 16},
        "finish": {"UNSCALE": False, "FACTOR": True},
        "codes": {"BINARY": False},
    }
    constants = flags[kernel] | chosen
    signature = {p.name: pointers.get(p.name, "i32") for p in function.params if not p.is_constexpr}
    used = build(function, signature, constants, arch, warps, disassemble=False)
    assert not used.problems(arch)
    assert "ld.global.v4" in used.ptx


if os.environ.get("L2V_SLOW") == "1":

    @pytest.mark.parametrize("arch", SHARED_LIMIT)
    @pytest.mark.parametrize("prefixes", [1, 6, 16])
    @pytest.mark.parametrize("options", resources_info_nce.OPTIONS)
    @pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
    @pytest.mark.parametrize("kernel", resources_info_nce.KERNELS)
    def test_info_nce_everywhere(kernel, dtype, options, prefixes, arch):
        check_info_nce(resources_info_nce.Case(kernel, arch, options, prefixes, dtype))


def test_the_table_is_written(capsys, monkeypatch):
    good = Usage(registers=128, shared=40 << 10, stack=0, matrix=frozenset(["HMMA"]), ptx="")
    monkeypatch.setattr(Case, "build", lambda case: good)
    assert main(["--arch", "80", "--head-dim", "64", "--dtype", "bf16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 3 * 2 * 2 and all(line.count("|") == lines[0].count("|") for line in lines)
    monkeypatch.setattr(Case, "build", lambda case: replace(good, stack=8))
    assert main(["--arch", "80", "--head-dim", "64", "--dtype", "bf16"]) == 1
