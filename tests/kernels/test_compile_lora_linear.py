"""Ahead-of-time builds of the LoRA kernels, without a GPU: no register spills, wide loads, tensor cores."""

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("no Triton on this platform", allow_module_level=True)

from benchmarks.kernels.aot import SHARED_LIMIT, available, build

pytestmark = pytest.mark.skipif(not available(), reason="this Triton bundles no NVIDIA tools")

POINTERS = ("x_ptr", "a_ptr", "xa_ptr", "dxa_ptr", "dx_ptr")


def used_by(kernel_name, dtype, capability, *, ranks=(16, 16, 16), dropout=True, want_dx=True, add_dx=False):
    from l2v_kernels.lora_linear import kernel_down

    function = getattr(kernel_down, f"lora_{kernel_name}_kernel")
    config = dict(
        (kernel_down.DOWN_CONFIG if kernel_name == "down" else kernel_down.DOWN_BACKWARD_CONFIG)[
            2 if dtype == "bf16" else 4
        ]
    )
    warps, stages = config.pop("num_warps"), config.pop("num_stages")
    constants = {f"RANK_{i}": rank for i, rank in enumerate(ranks)} | config
    constants |= {"BLOCK_R": max(16, max(ranks)), "DROPOUT": dropout, "PRECISION": "ieee"}
    if kernel_name == "backward":
        constants |= {"WANT_DX": want_dx, "ADD_DX": add_dx}
    types = dict.fromkeys(POINTERS, f"*{dtype}") | {"da_ptr": "*fp32", "seeds_ptr": "*i64", "rows_ptr": "*i64"}
    types |= dict.fromkeys(("factor_0", "factor_1", "factor_2"), "fp32")
    signature = {p.name: types.get(p.name, "i32") for p in function.params if not p.is_constexpr}
    return build(function, signature, constants, capability, warps, stages, disassemble=dtype == "bf16")


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kernel_name", ["down", "backward"])
def test_what_the_recipe_launches(kernel_name, dtype, capability):
    """Rank 16 with dropout on q, k and v, which needs the most registers."""
    used = used_by(kernel_name, dtype, capability)
    # Tiles of 16 ranks are below the 64 rows of HGMMA and UTCHMMA: HMMA everywhere.
    assert not used.problems(capability, "HMMA" if dtype == "bf16" else None), used.registers
    assert "cp.async.cg.shared.global" in used.ptx or "ld.global.v4.b32" in used.ptx


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("ranks", [(16, 0, 0), (64, 64, 64), (7, 16, 0)])
@pytest.mark.parametrize("kernel_name", ["down", "backward"])
def test_other_ranks(kernel_name, ranks, capability):
    used = used_by(kernel_name, "bf16", capability, ranks=ranks)
    problems = used.problems(capability)
    if ranks[0] == 64 and used.stack <= 8:
        # Known: for sm_100 ptxas aims at 128 registers a thread and parks two scalars.
        problems = [x for x in problems if "spills" not in x]
    assert not problems


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_gradients_on_top_of_frozen_ones(capability):
    used = used_by("backward", "bf16", capability, add_dx=True)
    assert not used.problems(capability, "HMMA"), used.registers


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("rank", [7, 16, 32])
def test_gradients_of_outputs(rank, dtype, capability):
    from l2v_kernels.lora_linear import kernel_up

    block_r = 32 if rank > 16 else 16
    config = dict(kernel_up.UP_BACKWARD_CONFIG[2 if dtype == "bf16" else 4, block_r])
    warps, stages = config.pop("num_warps"), config.pop("num_stages")
    types = dict.fromkeys(("dy_ptr", "b_ptr", "xa_ptr"), f"*{dtype}") | {"dxa_ptr": "*fp32", "db_ptr": "*fp32"}
    function = kernel_up.lora_up_backward_kernel
    signature = {p.name: types.get(p.name, "i32") for p in function.params if not p.is_constexpr}
    constants = config | {"RANK": rank, "BLOCK_R": block_r, "PRECISION": "ieee"}
    used = build(function, signature, constants, capability, warps, stages, disassemble=dtype == "bf16")
    assert not used.problems(capability, "HMMA" if dtype == "bf16" else None), used.registers
    assert "cp.async.cg.shared.global" in used.ptx or "ld.global.v4.b32" in used.ptx


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("name", ["ordered_sum_kernel", "up_sums_kernel"])
def test_ordered_sums(name, capability):
    from l2v_kernels.lora_linear import kernel_up

    config = dict(kernel_up.ORDERED_SUM_CONFIG)
    types = dict.fromkeys(("parts_ptr", "dxa_parts_ptr", "db_parts_ptr", "pending_parts_ptr"), "*fp32")
    types |= dict.fromkeys(("out_ptr", "dxa_ptr", "db_ptr", "pending_ptr"), "*bf16") | {
        f"factor_{i}": "fp32" for i in range(3)
    }
    function = getattr(kernel_up, name)
    signature = {p.name: types.get(p.name, "i32") for p in function.params if not p.is_constexpr}
    warps = config.pop("num_warps")
    constants = config | ({"RANK": 16} if name == "up_sums_kernel" else {})
    used = build(function, signature, constants, capability, warps, disassemble=False)
    assert not used.problems(capability) and "ld.global.v4" in used.ptx
