"""What the ranks decide together at the end of a step's backward, before its update."""

from __future__ import annotations

import signal
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Agreement:
    """What holds on any rank, the same on all: stop after this step, the step has NaN or Inf, memory ran out, the next
    step's data cannot be read."""

    stop: bool
    broken: bool
    memory: bool
    data: bool


class StopRequest:
    """SIGINT, SIGTERM and SIGUSR1 ask for a stop after the current step; all ranks decide together."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> StopRequest:
        self.old = {s: signal.signal(s, self._ask) for s in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        self.asked = True

    def agree(self, broken: torch.Tensor, *, memory: bool, data: bool) -> Agreement:
        """broken: bool [] on the device, whether this rank's step has NaN or Inf. memory, data: of this rank.

        The step's one wait for the device, and one small collective; before the update, so that a broken step has none.
        """
        mine = torch.tensor([self.asked, memory, data], device=broken.device)
        flags = torch.cat([mine, broken[None]]).float()
        if dist.get_world_size() > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        stop, memory, data, any_broken = flags.bool().tolist()
        return Agreement(stop, any_broken, memory, data)
