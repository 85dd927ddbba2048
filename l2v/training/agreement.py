"""What the ranks decide together after a step's backward and before its update."""

from __future__ import annotations

import signal
from dataclasses import dataclass

import torch
import torch.distributed as dist

from l2v.batch import moved


@dataclass(frozen=True)
class Agreement:
    """Flags that are True if they hold on any rank, so all ranks see the same values.

    stop: stop after this step. broken: the step has NaN or Inf. memory: memory ran out. data: the next step's data cannot
    be read.
    """

    stop: bool
    broken: bool
    memory: bool
    data: bool


class StopRequest:
    """SIGINT, SIGTERM and SIGUSR1 request a stop after the current step; all ranks decide together."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopRequest:
        self.old = {s: signal.signal(s, self._request) for s in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def _request(self, *_: object) -> None:
        self.requested = True

    def agree(self, broken: torch.Tensor, *, memory: bool, data: bool) -> Agreement:
        """Combine this rank's flags with those of all ranks. A collective call.

        broken: bool [] on the device, whether this rank's step has NaN or Inf. memory, data: this rank's flags.

        This is the only point in a step that waits for the device, and it costs one small collective. It runs before the
        update, so that a broken step is never applied.
        """
        mine = moved(torch.tensor([self.requested, memory, data]), broken.device)
        flags = torch.cat([mine, broken[None]]).float()
        if dist.get_world_size() > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        stop, memory, data, any_broken = flags.bool().tolist()
        return Agreement(stop, any_broken, memory, data)
