"""DeepSpeed: its configuration from a recipe, and its optimizer state as plain tensors (no pickle)."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from l2v.errors import RecipeError
from l2v.model.fused import FlatAdapters
from l2v.model.packed import PackedDecoder
from l2v.recipe import Stage, Zero
from l2v.recipe.zero import find_config, read_config
from l2v.training.norm import GradientNorm
from l2v.training.order import GradientOrder

MOMENTS = ("exp_avg", "exp_avg_sq")
MAX_BUCKET = 500_000_000
"""Elements of a gradient bucket at most: DeepSpeed's default. Only all weights of a large model are more."""


def start_distributed(timeout: float = 3600.0) -> tuple[int, int]:
    """Join the launcher's process group; returns (rank, world size). timeout: seconds that a collective may take."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils.logging import logger

    logger.setLevel(logging.WARNING)
    if not dist.is_initialized():
        if not torch.cuda.is_available():
            # On a CPU DeepSpeed would compile a shared-memory collective now. That takes half a minute and needs a compiler
            # that a laptop may not have; gloo does the same work.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        deepspeed.init_distributed(backend, timeout=timedelta(seconds=timeout), verbose=False)
    return dist.get_rank(), dist.get_world_size()


def be_deterministic() -> None:
    """Make every run on the same hardware give the same bits; an op without a deterministic implementation raises.

    This package's own kernels are always deterministic. Choices made by timing (L2V_AUTOTUNE) are switched off.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it creates its first handle
    os.environ["L2V_AUTOTUNE"] = "0"
    torch.use_deterministic_algorithms(True)
    # A debugging aid that costs a pass over every new tensor. torch defines it as a property of the module, which its type
    # stubs lack.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def deepspeed_config(stage: Stage, zero: Zero, dtype: torch.dtype, trainable: int) -> dict[str, Any]:
    """DeepSpeed's configuration. The loop decides where a step ends, so gradient_accumulation_steps is 1.

    trainable: number of trained weights. One bucket holds all their gradients, up to MAX_BUCKET. For adapters DeepSpeed's
    default would take 1 to 2 GiB, of which they fill a tenth. With a single bucket, a backward that fails halfway has sent no
    gradient yet (see `l2v.training.faults`).

    Raises:
        RecipeError: zero.offload_parameters without zero.stage: 3, or zero.config cannot be read.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": stage.clip,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "communication_data_type": "fp32",
        "steps_per_print": 10**9,
        # From its third step on it would wait for the device in every forward, for a log that nobody reads.
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": {
            "stage": zero.stage,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_bucket_size": min(max(1, trainable), MAX_BUCKET),
        },
    }
    if zero.offload_optimizer:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False
    if zero.offload_parameters:
        if zero.stage != 3:
            raise RecipeError("zero.offload_parameters needs zero.stage: 3")
        config["zero_optimization"]["offload_param"] = {"device": "cpu"}
    if zero.config:
        _merge(config, read_config(find_config(zero.config)))
    partitioned = config["zero_optimization"]
    if partitioned["stage"] in (1, 2) and partitioned.get("offload_optimizer", {}).get("device", "none") == "none":
        # DeepSpeed would search every gradient for NaN and Inf by itself, with several launches each, and wait for the
        # answer. The ranks agree on that before the update (`faults.broken_gradients`).
        config["bf16"].setdefault("check_grad_overflow", False)
    return config


def initialize(model: nn.Module, config: dict[str, Any], stage: Stage, units: Sequence[nn.Module] = ()):
    """The DeepSpeed engine over the trainable parameters, with torch's AdamW; adapters of fused layers become one of them.

    units: modules whose forward uses the parameters of its submodules directly; ZeRO-3 gathers each as a whole.
    """
    import deepspeed

    for unit in units:
        deepspeed.utils.set_z3_leaf_module(unit, True)
    zero, trainable = config["zero_optimization"], sum(p.numel() for p in model.parameters() if p.requires_grad)
    if isinstance(model, PackedDecoder):
        model.flatten_adapters()
    parameters = [p for p in model.parameters() if p.requires_grad]
    if (
        zero.get("reduce_bucket_size") == trainable < MAX_BUCKET
    ):  # `deepspeed_config` meant all of them; flat ones may be padded
        zero["reduce_bucket_size"] = sum(p.numel() for p in parameters)
    groups = _groups(parameters, stage.weight_decay, flat=getattr(model, "flat", None) is not None)
    optimizer = torch.optim.AdamW(groups, lr=stage.lr, betas=stage.betas, eps=1e-8)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, model_parameters=parameters, config=config)
    if getattr(engine.optimizer, "check_grad_overflow", True) is False:
        GradientNorm.install(engine.optimizer)
    GradientOrder.install(engine.optimizer, parameters)
    if isinstance(model, PackedDecoder) and model.flat is not None:
        model.flat.bind()  # the engine moved the model and its trainable parameters
    return engine


def _groups(parameters: list[nn.Parameter], weight_decay: float, *, flat: bool) -> list[dict[str, Any]]:
    """The optimizer's parameter groups: weight decay is for matrices; norms and biases have none. flat: of adapters alone."""
    if not weight_decay or flat:
        return [{"params": parameters, "weight_decay": weight_decay}]
    matrices = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) > 1]
    others = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) <= 1]
    decayed = {"params": matrices, "weight_decay": weight_decay}
    return [decayed, {"params": others, "weight_decay": 0.0}] if others else [decayed]


def read_state(engine, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Unsharded fp32 weights and Adam moments of every parameter, on the CPU of rank 0; nothing on the others, because all
    ranks of a node share its memory. A collective call.

    The result does not depend on the ZeRO stage or the world size. Keys: `weight.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME`.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    optimizer = _flat_optimizer(engine)
    if optimizer.state and len(optimizer.param_groups) > 1 and hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        # DeepSpeed links moments to parameters after the first group's update, when the other groups have none yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    state: dict[str, torch.Tensor] = {}
    for part in _parts(engine, parameters):
        if engine.zero_optimization_stage() == 0 and not hasattr(part.parameter, "_hp_mapping"):
            moments = engine.optimizer.state.get(part.parameter, {})
            whole = [part.parameter, *(moments.get(key) for key in MOMENTS)]
        else:
            whole = [safe_get_full_fp32_param(part.parameter)]
            has_moments = bool(_flat_optimizer(engine).state)
            whole += [safe_get_full_optimizer_state(part.parameter, key) if has_moments else None for key in MOMENTS]
        for key, value in zip(("weight", *MOMENTS), whole, strict=True):
            if value is not None and dist.get_rank() == 0:
                values = part.split(value.detach().float().cpu().view(-1).reshape(value.shape))
                state |= {f"{key}.{name}": each.clone() for name, each in values.items()}
    return state


def write_state(engine, parameters: Mapping[str, nn.Parameter], state: Mapping[str, torch.Tensor], steps: int) -> None:
    """Load a state that `read_state` returned on rank 0 into a new engine whose weights are already loaded."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    optimizer = _flat_optimizer(engine)
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO 3
    if flat is None:
        flat = [p for group in optimizer.param_groups for p in group["params"]]
    for p in flat:
        optimizer.state[p] = {"step": torch.tensor(float(steps))} | {key: torch.zeros_like(p.data) for key in MOMENTS}
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for part in _parts(engine, parameters):
        # Without an applied update there are no moments, which is what the zeros above say.
        moments = {key: whole for key in MOMENTS if (whole := part.join(key, state)) is not None}
        if engine.zero_optimization_stage() == 0 and not hasattr(part.parameter, "_hp_mapping"):
            for key, value in moments.items():
                optimizer.state[part.parameter][key].copy_(value)
            continue
        on = engine.device
        weight = part.join("weight", state)
        assert weight is not None
        safe_set_full_fp32_param(part.parameter, weight.to(on))
        for key, value in moments.items():
            safe_set_full_optimizer_state(part.parameter, value.to(on), key)


@dataclass(frozen=True)
class _Part:
    """A parameter of the optimizer, and the named ones that it holds: itself, or the matrices of flat adapters."""

    parameter: nn.Parameter
    names: Mapping[str, nn.Parameter]
    flat: FlatAdapters | None = None

    def split(self, whole: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.flat.split(whole, self.names) if self.flat else dict.fromkeys(self.names, whole)

    def join(self, key: str, state: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Its part of the state under a key, None if the state has none."""
        parts = {name: state[f"{key}.{name}"] for name in self.names if f"{key}.{name}" in state}
        if not parts:
            return None
        return self.flat.join(parts, self.names) if self.flat else next(iter(parts.values()))


def _parts(engine, parameters: Mapping[str, nn.Parameter]) -> list[_Part]:
    flat = getattr(engine.module, "flat", None)
    if flat is None:
        return [_Part(parameter, {name: parameter}) for name, parameter in parameters.items()]
    inside = {name: p for name, p in parameters.items() if p in flat.matrices}
    others = [_Part(p, {name: p}) for name, p in parameters.items() if name not in inside]
    return [_Part(flat.weight, inside, flat), *others]


def _flat_optimizer(engine) -> torch.optim.Optimizer:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
