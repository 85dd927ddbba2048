"""A training step on fake tensors: the real decoder, its real shapes and the real launching code, without memory or time.

Fake tensors have a shape, a dtype and a storage of some size, and nothing in it. `Live` counts the bytes of the storages
that are alive. With `kernels` the path of a GPU is traced: tensors say that they are on CUDA, and a launch of a Triton
kernel does nothing, since a kernel allocates nothing; all that is allocated around it is.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeVar
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from l2v.batch import PackedBatch, Segment, pack
from l2v.model import load
from l2v.model.full import train_all
from l2v.model.load import inner_model, load_config, load_model, output_head
from l2v.model.lora import add_lora
from l2v.model.memory import LayerShape
from l2v.model.packed import PackedDecoder
from l2v.model.proof import prove
from l2v.recipe import LLAMA_LINEARS, Base, Lora, Stage, Zero

T = TypeVar("T")


class Live(TorchDispatchMode):
    """Bytes of the storages that ops have made and that still live: `now`, and the most there were, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def see(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, once, until it is gone."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type == "meta" or key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.now += self.sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf)
        return out


class FakeStep:
    """A decoder of `config` with LoRA, or with all weights trained, on fake tensors."""

    def __init__(
        self, config: dict, dtype: torch.dtype, *, kernels: bool = True, head: bool = True, layers: str = "auto",
        attention_dropout: float = 0.0, lora: Lora | None = None, trained: bool = False,
    ) -> None:  # fmt: skip
        self.mode, self.kernels = FakeTensorMode(allow_non_fake_inputs=True), kernels
        base = Base(model="fake", init="random", config=config)
        proof = prove(load_config(base), backend=base.backend, causal=False)  # it computes, which fake tensors cannot
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with self.mode, _unmoved(), mock.patch.object(load, "prove", lambda *_, **__: proof):
                whole = load_model(base, head=head, dtype=dtype)
                inner = inner_model(whole)
                decoder = train_all(inner) if trained else add_lora(inner, lora or Lora(), base_name="fake", seed=0)
        finally:
            torch.set_default_dtype(before)
        self.model = PackedDecoder(
            decoder, head=output_head(whole) if head else None, layers=layers, attention_dropout=attention_dropout
        )
        self.model.train()
        self.trained, self.config = trained, inner.config

    def shape(self) -> LayerShape:
        """What the table is asked for."""
        if self.trained:
            return LayerShape.of(self.config, rank=0, targets=(), itemsize=self.dtype.itemsize, trained=True)
        lora = self.model.decoder.peft_config["default"]
        targets = tuple(name for name in LLAMA_LINEARS if name in lora.target_modules)
        return LayerShape.of(self.config, rank=lora.r, targets=targets, itemsize=self.dtype.itemsize)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Everything inside runs on fake tensors, along the chosen path."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(self.mode)
            # Values are checked on a CPU; fake tensors have none.
            for module, name in (("linear_cross_entropy", "_check_labels"), ("segment_pool", "_check")):
                module = importlib.import_module(f"l2v_kernels.{module}")
                stack.enter_context(mock.patch.object(module, name, lambda *_: None))
            if self.kernels:
                from triton.runtime.jit import JITFunction

                stack.enter_context(mock.patch.object(torch.Tensor, "is_cuda", True))
                stack.enter_context(mock.patch.object(JITFunction, "__getitem__", lambda *_: lambda *_, **__: None))
                stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)))
            else:  # the reference of attention asks whether segments lie in order, as those of one length do
                stack.enter_context(mock.patch.object(torch, "equal", lambda *_: True))
            yield

    def batch(self, lengths: Sequence[int], labels: int = 0) -> PackedBatch:
        """A pack of segments of these lengths."""
        texts = [Segment(np.zeros(n, np.int64), example=i) for i, n in enumerate(lengths)]
        return self.fake(pack(texts, label_index=[0] * labels, labels=[0] * labels))

    def fake(self, values: T) -> T:
        """A dataclass of tensors, without their values."""
        tensors = {k: v for k, v in vars(values).items() if isinstance(v, torch.Tensor)}
        return replace(values, **{k: self.mode.from_tensor(v) for k, v in tensors.items()})

    def live(self) -> Live:
        """A count that begins with the weights."""
        live = Live()
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            live.see(tensor)
        return live

    def engine(self, stage: Stage, zero: int):
        """DeepSpeed's own engine over the fake model. Needs `fake_ranks`; call it inside `running`."""
        from l2v.training.engine import deepspeed_config, initialize

        units = self.model.as_units() if zero == 3 else []
        count = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        with _unmoved():
            config = deepspeed_config(stage, Zero(stage=zero), self.dtype, count)
            return initialize(self.model, config, stage, units)

    def kept_by_layer(self, batch: PackedBatch, recompute: str) -> list[int]:
        """Bytes of the storages that each layer saves for its backward, and that are no parameter nor shared by layers."""
        self.model.set_recompute(recompute)
        inner = self.model.decoder if self.trained else self.model.decoder.get_base_model()
        # By the storage itself: the wrappers that Python makes of it come and go, and their ids with them.
        mine = {p.untyped_storage()._cdata for p in (*self.model.parameters(), *self.model.buffers())}
        saved: dict[int, tuple[torch.UntypedStorage, set[int]]] = {}
        now = [-1]
        layers = [*inner.layers, inner.norm]
        hooks = [m.register_forward_pre_hook(lambda *_, i=i: now.__setitem__(0, i)) for i, m in enumerate(layers)]

        def pack_hook(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in mine:
                saved.setdefault(storage._cdata, (storage, set()))[1].add(now[0])
            return tensor

        with self.running(), torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
            self.model(batch, "hidden")
        for hook in hooks:
            hook.remove()
        return [
            sum(storage.nbytes() for storage, where in saved.values() if where == {i}) for i in range(len(inner.layers))
        ]


def _unmoved():
    """PEFT and DeepSpeed move a model to the place and dtype where it is already; fake parameters cannot be moved."""
    return mock.patch.object(torch.nn.Module, "to", lambda self, *_, **__: self)


@contextlib.contextmanager
def fake_ranks(world: int) -> Iterator[None]:
    """A process group of so many ranks, of which only the first exists: collectives do nothing."""
    import deepspeed
    import deepspeed.runtime.zero.partitioned_param_coordinator as coordinator
    import deepspeed.runtime.zero.utils as zero
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as `start_distributed` has it
    number = {torch.float32: 1.0, torch.bfloat16: 1.0}
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    patches = [
        mock.patch.dict(os.environ, alone | {"DS_ACCELERATOR": "cpu"}),
        mock.patch.object(torch.Tensor, "item", lambda self: number.get(self.dtype, 0)),
        mock.patch.object(torch.Tensor, "__bool__", lambda self: False),
        mock.patch.object(torch.Tensor, "__float__", lambda self: 1.0),
        # Ranks compare lists, which the missing ranks do not have.
        mock.patch.object(zero, "assert_ints_same_as_other_ranks", lambda *_: None),
        mock.patch.object(coordinator, "assert_ints_same_as_other_ranks", lambda *_: None),
    ]
    try:
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            yield
    finally:
        dist.destroy_process_group()
