"""The builds whose machine code is counted: every kernel of the library, at the shapes of Llama-3-8B in bf16."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.kernels import resources_attention, resources_info_nce
from benchmarks.kernels.aot import Usage, build
from l2v_kernels.attention.config import Config, default

ARCHITECTURES = (80, 90, 100, 120)
MATMULS = {"forward": 2, "query": 3, "key": 4}
"""Matmuls of a step of each attention kernel."""
GROUP = 4
"""Query heads that read one key head of Llama-3-8B."""


@dataclass(frozen=True)
class Case:
    """One build of one kernel."""

    op: str
    kernel: str
    arch: int
    variant: str
    tile: str
    warps: int
    build: Callable[[], Usage]
    step_flops: int | None = None
    """Matrix FLOPs of a block in a step of its main loop; None for a kernel without matmuls."""
    step_bytes: int | None = None
    """Bytes a block reads from global memory in a step."""
    config: Config | None = None
    """Of an attention kernel."""
    target: float | None = None
    """The issue/tensor ratio that this build must not exceed."""


def attention(archs, head_dims=(128,), lengths=("short", "medium", "long"), dropouts=(False, True)) -> Iterator[Case]:
    """Packed attention; without dropout also with the tile that dropout takes, for comparison.

    Targets hold without dropout, for segments of 512 tokens and more, head dimension 128.
    """
    for arch in archs:
        for head_dim in head_dims:
            for kind in MATMULS:
                for length in lengths:
                    for dropout in dropouts:
                        if not (dropout and length == "medium"):  # no tile of its own
                            yield attention_case(kind, arch, head_dim, length, dropout)
                    shared = default(kind, arch, head_dim, 2, length == "short")
                    if False in dropouts and shared != attention_case(kind, arch, head_dim, length, False).config:
                        yield attention_case(kind, arch, head_dim, length, False, shared)


def attention_case(kind, arch, head_dim, length, dropout, config: Config | None = None, group: int = GROUP) -> Case:
    """One build of packed attention, with the tile of the table or with another."""
    case = resources_attention.Case(kind, arch, head_dim, short=length == "short", dropout=dropout, group=group,
                                    medium=length == "medium")  # fmt: skip
    other, config = config is not None, config or case.config
    width = resources_attention.block_d(head_dim)
    passed = config.block_m if kind == "key" else config.block_n
    asked = not dropout and length == "long" and head_dim == 128 and group == GROUP and not other
    target = {90: 0.65, 80: 0.6 if kind == "forward" else None}.get(arch) if asked else None
    variant = f"D {head_dim}, {length} segments{', dropout' if dropout else ''}"
    variant += ", with dropout's tile" if other else ""
    return Case(
        "attention", kind, arch, variant, tile_of(config), config.num_warps,
        lambda: case.build(config, disassemble=False),
        MATMULS[kind] * 2 * config.block_m * config.block_n * width, 2 * passed * width * 2, config, target,
    )  # fmt: skip


def tile_of(config: Config) -> str:
    """As the tables print a tile."""
    loads = ", TMA" if config.tma else ""
    return f"{config.block_m} x {config.block_n}, {config.num_warps} warps, {config.num_stages} stages{loads}"


def info_nce(archs) -> Iterator[Case]:
    """InfoNCE: the fused kernels have a matmul over E in their main loop."""
    for arch in archs:
        for kernel in resources_info_nce.KERNELS:
            case = resources_info_nce.Case(kernel, arch)
            config, fused = case.config, kernel.startswith("fused")
            tile = f"{config.block_rows} x {config.block_columns}" + (f" x {config.block_e}" if fused else "")
            loads = 2 * (config.block_rows + config.block_columns) * config.block_e if fused else None
            flops = 2 * config.block_rows * config.block_columns * config.block_e if fused else None
            yield Case(
                "info_nce", kernel, arch, "ids", f"{tile}, {config.num_warps} warps, {config.num_stages} stages",
                config.num_warps, lambda case=case: case.build(disassemble=False), flops, loads,
                target=0.7 if fused and arch == 90 else None,
            )  # fmt: skip


def others(archs) -> Iterator[Case]:
    """The ops whose time is that of the bytes they move, and the skinny matmuls of LoRA."""
    for arch in archs:
        yield from _linear_cross_entropy(arch)
        yield from _lora_linear(arch)
        yield from _rms_norm(arch)
        yield from _sandwich_norm(arch)
        yield from _swiglu(arch)
        if arch > 80:  # sm_80 has no e4m3: the reference runs there
            yield from _fp8(arch)


def _case(op, kernel, arch, variant, function, pointers, constants, config, flops=None, scalars=()):
    config = dict(config)
    warps, stages = config.pop("num_warps"), config.pop("num_stages", 3)
    tile = " x ".join(str(value) for name, value in config.items() if name.startswith("BLOCK"))

    def compiled():
        types = {
            p.name: pointers.get(p.name, "*bf16" if p.name.endswith("_ptr") else "i32")
            for p in function.params
            if not p.is_constexpr
        }
        return build(function, types | dict.fromkeys(scalars, "fp32"), constants | config, arch, warps, stages, False)

    return Case(op, kernel, arch, variant, f"{tile}, {warps} warps", warps, compiled, flops)


def _linear_cross_entropy(arch):
    from l2v_kernels.linear_cross_entropy.kernel import CONFIG, softmax_stats_kernel

    pointers = {"logits_ptr": "*fp32", "labels_ptr": "*i64", "losses_ptr": "*fp32", "hits_ptr": "*u8"}
    for gradient in (False, True):
        constants = {"BIAS": False, "GRADIENT": gradient}
        variant = "training" if gradient else "evaluation"
        yield _case(
            "linear_cross_entropy", "softmax_stats", arch, variant, softmax_stats_kernel, pointers, constants, CONFIG
        )


def _lora_linear(arch):
    from l2v_kernels.lora_linear import kernel_down, kernel_up

    pointers = {"da_ptr": "*fp32", "seeds_ptr": "*i64", "rows_ptr": "*i64"}
    constants = {f"RANK_{i}": 16 for i in range(3)} | {"BLOCK_R": 16, "DROPOUT": True, "PRECISION": "ieee"}
    factors = ("factor_0", "factor_1", "factor_2")
    for name, config in (("down", kernel_down.DOWN_CONFIG), ("backward", kernel_down.DOWN_BACKWARD_CONFIG)):
        more = {"WANT_DX": True, "ADD_DX": False} if name == "backward" else {}
        function = getattr(kernel_down, f"lora_{name}_kernel")
        yield _case("lora_linear", name, arch, "q, k, v, rank 16, dropout", function, pointers, constants | more, config[2],
                    scalars=factors)  # fmt: skip
    pointers = {"dxa_ptr": "*fp32", "db_ptr": "*fp32"}
    constants = {"RANK": 16, "BLOCK_R": 16, "PRECISION": "ieee"}
    config = kernel_up.UP_BACKWARD_CONFIG[2, 16]
    yield _case(
        "lora_linear", "up backward", arch, "rank 16", kernel_up.lora_up_backward_kernel, pointers, constants, config
    )


def _rms_norm(arch):
    from l2v_kernels.rms_norm import kernel

    states = {"x_ptr", "delta_ptr", "weight_ptr", "sum_ptr", "y_ptr", "dy_ptr", "dsum_ptr", "dx_ptr"}
    for name, flags in (("forward", {"DELTA": True}), ("backward", {"DSUM": True})):
        function = getattr(kernel, f"rms_norm_{name}_kernel")
        pointers = {p.name: "*fp32" for p in function.params if p.name.endswith("_ptr") and p.name not in states}
        constants = {"HEADS": 1, "OFFSET": 0.0, "WIDTH": 4096} | flags
        yield _case("rms_norm", name, arch, "4,096 wide, residual", function, pointers, constants, kernel.config(4096),
                    scalars=("eps",) if name == "forward" else ())  # fmt: skip


def _sandwich_norm(arch):
    from l2v_kernels.sandwich_norm import kernel

    for name, flags in (("forward", {"NORM": True}), ("backward", {"DSUM": True})):
        function = getattr(kernel, f"sandwich_{name}_kernel")
        pointers = {p.name: "*fp32" for p in function.params if p.name.endswith("rstd_ptr")}
        constants = {"OFFSET": 1.0, "WIDTH": 640} | flags
        config = kernel.config(640) if name == "forward" else kernel.backward_config(640)
        yield _case("sandwich_norm", name, arch, "640 wide", function, pointers, constants, config,
                    scalars=("eps",) if name == "forward" else ())  # fmt: skip


def _swiglu(arch):
    from l2v_kernels.swiglu import kernel

    for name in ("forward", "backward"):
        function = getattr(kernel, f"swiglu_{name}_kernel")
        states = {"gate_up_ptr", "product_ptr", "dproduct_ptr", "xa_gate_ptr", "b_gate_ptr", "xa_up_ptr", "b_up_ptr"}
        pointers = {p.name: "*fp32" for p in function.params if p.name.endswith("_ptr") and p.name not in states}
        constants = {"RANK_GATE": 16, "RANK_UP": 16, "PRECISION": "ieee", "GELU": False}
        yield _case("swiglu", name, arch, "LoRA rank 16", function, pointers, constants, kernel.LORA_CONFIG[2])


def _fp8(arch):
    from l2v_kernels.fp8 import kernel

    pointers = {"factors_ptr": "*fp32", "q_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
    constants = {"WIDTH": 4096, "FACTORS": False}
    yield _case(
        "fp8", "quantize rows", arch, "4,096 wide", kernel.rows_kernel, pointers, constants, kernel.config(4096)
    )
    config = kernel.WIDE_CONFIG[2]
    yield _case("fp8", "quantize rows", arch, "wide", kernel.wide_rows_kernel, pointers, {"FACTORS": True}, config)
