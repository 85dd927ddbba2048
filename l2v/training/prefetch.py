"""Collate the next step's batches in a thread while the current step computes."""

from __future__ import annotations

import json
import os
import socket
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist

from l2v.data.collate import collate
from l2v.data.sampler import Sampler, StepPlan
from l2v.errors import UserError
from l2v.recipe import Contrastive
from l2v.training.agreement import Agreement
from l2v.training.alone import queries_alone
from l2v.training.faults import read_budget, smaller, write_budget
from l2v.training.saver import retried
from l2v.training.spread import spread_groups


class BatchPrefetcher:
    """A context manager that prepares the batches of one step after another; `shrink` lowers `micro_tokens` when memory ran
    out.

    With L2V_CHECK=1 every rank records the examples it trained on in `audit/rank-N.jsonl`, one line per step.
    """

    def __init__(self, job, rank: int, world: int) -> None:
        self.job, self.rank, self.world = job, rank, world
        self.micro_tokens = read_budget(job.folder, job.stage.micro_tokens)
        self.sampler = self._sampler()
        self.units: list = []
        self.alone = 0
        """This rank's queries of the step without a negative."""
        self.spread: list = []
        """The groups whose losses this rank computes, for every unit of the step; see `l2v.training.spread`."""
        self._work: dict[int, Future] = {}
        # The thread gets one OpenMP thread: a second team would spin on the cores that training needs.
        self._thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
        self._audit_file = job.folder / "audit" / f"rank-{rank}.jsonl" if os.environ.get("L2V_CHECK") == "1" else None

    def __enter__(self) -> BatchPrefetcher:
        return self

    def __exit__(self, *_) -> None:
        self._thread.shutdown(cancel_futures=True)

    def get(self, step: int) -> tuple[StepPlan, list]:
        """The plan of a step and this rank's micro-batches; starts preparing the next step."""
        plan, self.units, self.alone, self.spread = self._submit(step).result()
        self._work = {at: work for at, work in self._work.items() if at >= step}
        if step + 1 < self.job.stage.steps:
            self._submit(step + 1)
        return plan, self.units

    def check(self, step: int) -> None:
        """Wait for the first step's data.

        Raises:
            UserError: the data cannot be read on this rank.
        """
        try:
            self._submit(step).result()
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"the examples of step {step + 1} cannot be read on {socket.gethostname()}: {type(error).__name__}: {error}"
            ) from None

    def failed(self, step: int) -> bool:
        """Whether the data of a step in preparation cannot be read; waits until that is known."""
        return step in self._work and self._work[step].exception() is not None

    def error_on_any_rank(self, agreed: Agreement) -> UserError | None:
        """The same error on all ranks if any cannot read the next step's data, else None. A collective call if so."""
        if not agreed.data:
            return None
        mine = next((work.exception() for work in self._work.values() if work.done() and work.exception()), None)
        message = f"rank {self.rank} on {socket.gethostname()}: {type(mine).__name__}: {mine}" if mine else None
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, message)
        first = next(each for each in everyone if each)
        return UserError(
            f"the examples of the next step cannot be read on {first}; the steps so far are saved: fix the data or its disk and "
            "run the same command again"
        )

    def shrink(self, step: int) -> None:
        """Halve the tokens of a forward from this step on, also for later starts; the same on every rank."""
        self.micro_tokens = smaller(self.job.stage, self.micro_tokens, int(self.job.examples.lengths.max()))
        write_budget(self.job.folder, self.micro_tokens)
        for work in self._work.values():
            work.cancel()
        self._work = {}
        self.sampler = self._sampler()

    def audit(self, step: int, plan: StepPlan) -> None:
        """Record the examples of a step if L2V_CHECK=1."""
        if self._audit_file is None:
            return
        self._audit_file.parent.mkdir(exist_ok=True)
        mine = [i for unit in plan.units[self.rank] for i in unit.examples]
        with self._audit_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "world": self.world, "examples": mine}) + "\n")

    def _submit(self, step: int) -> Future:
        if step not in self._work:
            self._work[step] = self._thread.submit(retried, lambda: self._prepare(step))
        return self._work[step]

    def _sampler(self) -> Sampler:
        stage = self.job.stage
        return Sampler(
            self.job.examples, batch=stage.batch, micro_tokens=self.micro_tokens, seed=self.job.seed, world=self.world,
            group=getattr(stage, "group", None), cost=self.job.cost,
        )  # fmt: skip

    def _prepare(self, step: int):
        job, sampler = self.job, self.sampler
        plan = sampler.plan(step)
        units = [
            [collate(job.examples, micro, seed=job.seed, step=step, masking=job.masking) for micro in unit.micros]
            for unit in plan.units[self.rank]
        ]
        alone = 0
        spread = spread_groups(plan, self.rank, job.examples, job.seed)
        if isinstance(job.stage, Contrastive):
            alone = queries_alone(plan, units, self.rank, job.examples, job.stage, job.seed, spread)
        return plan, units, alone, spread
