"""What is changed inside a process on the null GPU, each when its module has been imported.

The product's code has no part in it. Values are zero here, so what would act on a value is answered: objects of all ranks
travel by gloo, weights of `init: random` are made on the device (16 GB of them would take minutes on the host), comparisons
that a load depends on come out equal.
"""

from __future__ import annotations

import atexit
import functools
import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from .place import SYSTEM, Plan

AFTER: dict[str, list[Callable[[ModuleType], None]]] = {}
"""Module -> what to do with it once it is imported."""


def after(name: str) -> Callable[[Callable[[ModuleType], None]], Callable[[ModuleType], None]]:
    """Decorator: the function is called with the module `name` when that has been imported."""

    def register(function: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        AFTER.setdefault(name, []).append(function)
        return function

    return register


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of AFTER as Python does, and adds to their loading."""

    def find_spec(self, name, path=None, target=None):
        if name not in AFTER:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader.exec_module = _then(spec.loader.exec_module, AFTER[name])  # type: ignore[method-assign]
                return spec
        return None


def _then(execute: Callable[[ModuleType], None], functions: list[Callable]) -> Callable[[ModuleType], None]:
    def exec_module(module: ModuleType) -> None:
        execute(module)
        for function in functions:
            function(module)

    return exec_module


def install() -> None:
    """Register the changes of this process's plan. Imports nothing of torch."""
    plan = Plan.here()
    if plan.ignore_values:
        from . import ignore  # noqa: F401 (it registers)
    if plan.fault:
        from . import faults

        faults.plant(plan.fault)
    if plan.record:
        from . import phases

        phases.register(plan)
    sys.meta_path.insert(0, _Finder())


def replaced(module: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replace a function of a module or class by make(function).

    Raises:
        AttributeError: it has moved.
    """
    real = getattr(module, name)
    setattr(module, name, functools.wraps(real)(make(real)))


@after("l2v.machine.gpus")
def _device_files(gpus: ModuleType) -> None:
    gpus.has_nvidia_gpu.__defaults__ = (SYSTEM,)


@after("l2v.commands.main")
def _device_files_again(main: ModuleType) -> None:
    main.may_have_gpu.__defaults__ = (SYSTEM / "dev",)


@after("torch.distributed")
def _objects(distributed: ModuleType) -> None:
    """Objects of all ranks by gloo, since NCCL moves nothing here; one rank has only its own."""
    if "all_gather_object" not in vars(distributed):
        return
    gather, broadcast = distributed.all_gather_object, distributed.broadcast_object_list
    groups: list[Any] = []

    def gloo() -> Any:
        if not groups:
            groups.append(distributed.new_group(backend="gloo"))
        return groups[0]

    def all_gather_object(found: list, value: Any, group: Any = None) -> None:
        if distributed.get_world_size() == 1:
            found[0] = value
        else:
            gather(found, value, group=gloo())

    def broadcast_object_list(values: list, src: int = 0, group: Any = None, device: Any = None) -> None:
        if distributed.get_world_size() > 1:
            broadcast(values, src=src, group=gloo())

    distributed.all_gather_object, distributed.broadcast_object_list = all_gather_object, broadcast_object_list


@after("l2v.model.load")
def _random_weights(load: ModuleType) -> None:
    def make(real):
        def _load(base, config, *, head, dtype, **rest):
            import torch

            if base.init != "random" or not torch.cuda.is_available():  # a test hides the GPU and trains on the CPU
                return real(base, config, head=head, dtype=dtype, **rest)
            auto = load.AutoModelForCausalLM if head else load.AutoModel
            load._prepare_attention(base)
            with torch.device("cuda"):
                return auto.from_config(config, dtype=dtype, attn_implementation=rest["path"].attention)

        return _load

    replaced(load, "_load", make)


@after("l2v.model.merge")
def _loaded_adapters(merge: ModuleType) -> None:
    """What is read back of an adapter is zero, and so is the answer whether it is finite."""
    for name in ("_same", "_finite"):
        replaced(merge, name, lambda real: lambda *_: True)


@after("l2v.model.proof")
def _real_model(proof: ModuleType) -> None:
    """The real model runs; that its first state never moves says nothing on this device."""

    def make(real):
        def check_model(run, model, **named):
            try:
                return real(run, model, **named)
            except proof.UserError as error:
                if "never moves the first state" not in str(error) or next(model.parameters()).device.type == "cpu":
                    raise
                return 0.0

        return check_model

    replaced(proof, "check_model", make)


@after("l2v.training.build")
def _fp8(build: ModuleType) -> None:
    """Quantising checks that parts of a stack are the linears' own weights, by comparing on the device."""

    def make(real):
        def to_fp8(*arguments, **named):
            from .events import Stub

            Stub().set_byte_read(1)
            try:
                return real(*arguments, **named)
            finally:
                Stub().set_byte_read(0)

        return to_fp8

    replaced(build, "to_fp8", make)


def _no_comparison(module: ModuleType) -> None:
    """ZeRO 3 compares integers of all ranks through the device."""
    if hasattr(module, "assert_ints_same_as_other_ranks"):
        module.assert_ints_same_as_other_ranks = lambda *_: None  # type: ignore[attr-defined]


for _name in ("deepspeed.runtime.zero.utils", "deepspeed.runtime.zero.partitioned_param_coordinator"):
    after(_name)(_no_comparison)


@after("torch.backends.cuda")
def _no_cudnn(cuda: ModuleType) -> None:
    """cuDNN has its own way to the driver and crashes here; scaled_dot_product_attention takes torch's own kernels."""
    cuda.enable_cudnn_sdp(False)


def record_path(plan: Plan) -> Path:
    """The file of this process's recording."""
    rank = os.environ.get("RANK", "0")
    return Path(f"{plan.record}.rank{rank}.json")


def at_exit(function: Callable[[], None]) -> None:
    """Call a function when the process ends by itself."""
    atexit.register(function)
