"""Faults that are planted in a started process, so that the suite is seen to find them. No file is changed."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from .inside import after, replaced


def plant(name: str) -> None:
    """Register a fault for when its module is imported.

    Raises:
        KeyError: there is none of this name.
    """
    FAULTS[name]()


def _item_in_backward() -> None:
    @after("deepspeed.runtime.engine")
    def _(engine: ModuleType) -> None:
        def make(real):
            def backward(self, loss, *arguments, **named):
                loss.register_hook(_reads_a_value)
                return real(self, loss, *arguments, **named)

            return backward

        replaced(engine.DeepSpeedEngine, "backward", make)


def _reads_a_value(gradient) -> None:
    gradient.item()


def _in_forward(work: Callable) -> Callable[[], None]:
    """A fault that does `work(batch)` in every forward of the decoder."""

    def register() -> None:
        @after("l2v.model.packed")
        def _(packed: ModuleType) -> None:
            def make(real):
                def forward(self, batch, *arguments, **named):
                    work(batch)
                    return real(self, batch, *arguments, **named)

                return forward

            replaced(packed.PackedDecoder, "forward", make)

    return register


def _compiles_for_every_length(batch) -> None:
    from .fault_kernel import zero

    zero[(1,)](batch.position_ids_T.new_empty(1), T=len(batch.input_ids_T))


def _copies_pageable_memory(batch) -> None:
    import torch

    torch.zeros(1024).to(batch.input_ids_T.device, non_blocking=True)


def _idle_rank() -> None:
    @after("l2v.data.sampler")
    def _(sampler: ModuleType) -> None:
        def make(real):
            def _owners(self, examples):
                return real(self, examples) * 0

            return _owners

        replaced(sampler.Sampler, "_owners", make)


FAULTS: dict[str, Callable[[], None]] = {
    "item-in-backward": _item_in_backward,
    "kernel-per-length": _in_forward(_compiles_for_every_length),
    "pageable-copy": _in_forward(_copies_pageable_memory),
    "idle-rank": _idle_rank,
}
