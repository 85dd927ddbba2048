"""The processes of a launcher that encode one file together; one process without a launcher is a group of one."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from l2v.errors import UserError, first_line

T = TypeVar("T")
WAIT = timedelta(days=14)
"""Of a collective: ranks meet only at the beginning and at the end. A rank that dies is noticed at once by its connection."""


class Ranks:
    """This process among all: `rank` of `world`. Under torchrun or the deepspeed launcher it joins their group (gloo).

    A context: leaving it ends the group.
    """

    def __init__(self) -> None:
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    def __enter__(self) -> Ranks:
        if self.world > 1:
            import torch
            import torch.distributed as dist

            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            dist.init_process_group("gloo", timeout=WAIT)
        return self

    def __exit__(self, *_: Any) -> None:
        if self.world > 1:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()

    def first(self, work: Callable[[], T]) -> T:
        """Call `work` on rank 0; every rank has its result, or its UserError."""
        return work() if self.world == 1 else _together("on_first_rank", work)

    def every(self, work: Callable[[], T]) -> T:
        """Call `work` on every rank; the UserError of one is raised on all."""
        return work() if self.world == 1 else _together("on_every_rank", work)

    def agree(self, facts: dict[str, Any]) -> None:
        """Check that plain facts are equal on all ranks.

        Raises:
            UserError: they are not.
        """
        if self.world > 1:
            _together("agree", facts)


def _together(name: str, argument: Any) -> Any:
    from l2v.training import ranks

    try:
        return getattr(ranks, name)(argument)
    except RuntimeError as error:
        raise UserError(
            f"another process has ended ({first_line(error)[:80]}); what is finished is kept, and the same command resumes"
        ) from None
