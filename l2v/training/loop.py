"""The loop: three objectives, one way through. Plan a step, collate, backward, update, write metrics, save."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from l2v.data.collate import Masking, collate
from l2v.data.sampler import Sampler, StepPlan
from l2v.errors import UserError
from l2v.recipe import Contrastive, Stage, Tracking
from l2v.training import checkpoint
from l2v.training.engine import read_state, write_state
from l2v.training.finite import is_broken, refuse
from l2v.training.metrics import Metrics, Progress
from l2v.training.profile import Profile
from l2v.training.steps import contrastive_step, mntp_step
from l2v.training.throughput import Throughput, peak_memory, told
from l2v_kernels.spans import span

Evaluate = Callable[[int], dict[str, float]]


class Interrupted(Exception):
    """Training was asked to stop and left a checkpoint."""


@dataclass
class Job:
    """All that a stage's loop works with. `evaluate` is called on every rank with the step; it may be None."""

    name: str
    stage: Stage
    seed: int
    folder: Path
    examples: Any
    masking: Masking | None
    parameters: dict[str, torch.nn.Parameter]
    facts: dict[str, Any]
    tracking: Tracking
    profile: bool = False
    evaluate: Evaluate | None = None


def learning_rate(stage: Stage, step: int, steps_per_epoch: int) -> float:
    """The rate of update `step` (from 0): linear warm-up, then linear decay to 0 at `decay_steps`.

    The reference decays over `decay_epochs` full epochs and stops far earlier, so its rate hardly falls.
    """
    if step < stage.warmup:
        return stage.lr * step / stage.warmup
    if stage.decay_steps is not None:
        end = stage.decay_steps
    elif stage.decay_epochs is not None:
        end = math.ceil(stage.decay_epochs * steps_per_epoch)
    else:
        return stage.lr
    end = max(end, stage.steps)
    return stage.lr * max(0.0, (end - step) / max(1, end - stage.warmup))


def train(engine, job: Job, resume: checkpoint.Checkpoint | None) -> dict[str, torch.Tensor]:
    """Run a stage to its last step; returns the state that `read_state` gives (fp32 weights and moments)."""
    stage, rank, world = job.stage, dist.get_rank(), dist.get_world_size()
    sampler = Sampler(
        job.examples, batch=stage.batch, micro_tokens=stage.micro_tokens, seed=job.seed, world=world,
        group=getattr(stage, "group", None),
    )  # fmt: skip
    start = resume.step if resume else 0
    if resume:
        write_state(engine, job.parameters, resume.tensors, resume.step)
    seen = resume.facts["tokens"] if resume else 0
    metrics = Metrics(job.folder, job.tracking, name=job.name, active=rank == 0, resumed_at=start)
    stop = _StopFlag()
    bar = Progress(stage.steps, start, job.name, active=rank == 0)
    engine.train()
    log = _Log(job, metrics, bar, engine, seen)
    profile = Profile(
        engine.module, job.folder / "profile", active=job.profile and rank == 0, start=start, steps=stage.steps,
        device=engine.device, aside=log.speed.paused, tell=bar.note,
    )  # fmt: skip
    saved_at = start
    try:
        # One thread for the collator: a second OpenMP team would spin on the cores that training needs.
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as ahead, stop:
            work = ahead.submit(_prepare, sampler, job, start, rank) if start < stage.steps else None
            if job.evaluate and start == 0:
                with log.speed.paused():
                    _evaluate(engine, job, metrics, 0)
            for step in range(start, stage.steps):
                with profile.step(step + 1):
                    plan, units = work.result()
                    if step + 1 < stage.steps:
                        work = ahead.submit(_prepare, sampler, job, step + 1, rank)
                    rate = learning_rate(stage, step, sampler.steps_per_epoch)
                    for group in engine.optimizer.param_groups:
                        group["lr"] = rate
                    shares = _backward(engine, job, plan, units, bar)
                    not_finite_S = shares.pop("not_finite_S", None)
                    stopping, broken = stop.agreed(is_broken(shares["loss"], not_finite_S))
                    if broken:
                        raise refuse(step + 1, units, not_finite_S)
                    with span("optimizer"):
                        engine.step()
                    seen += int(job.examples.lengths[_examples(plan)].sum())
                    log.step(step + 1, plan.epoch, shares, rate, engine.get_global_grad_norm(), seen)
                done = step + 1
                if done == stage.steps or stopping or (stage.save_every and done % stage.save_every == 0):
                    with log.speed.paused():
                        _save(engine, job, done, seen)
                    saved_at = done
                if stopping and done < stage.steps:
                    raise Interrupted(f"stopped after step {done}; the same command goes on from there")
                if job.evaluate and (done == stage.steps or (stage.eval_every and done % stage.eval_every == 0)):
                    with log.speed.paused():
                        _evaluate(engine, job, metrics, done)
    finally:
        profile.close()
        bar.close()
        metrics.close()
    if saved_at == start and start == stage.steps and resume:
        return resume.tensors
    return read_state(engine, job.parameters)


def _prepare(sampler: Sampler, job: Job, step: int, rank: int):
    plan = sampler.plan(step)
    units = [
        [collate(job.examples, micro, seed=job.seed, step=step, masking=job.masking) for micro in unit.micros]
        for unit in plan.units[rank]
    ]
    return plan, units


def _examples(plan: StepPlan) -> list[int]:
    return [i for units in plan.units for unit in units for i in unit.examples]


def _backward(engine, job: Job, plan: StepPlan, units, bar: Progress) -> dict[str, torch.Tensor]:
    if not isinstance(job.stage, Contrastive):
        return mntp_step(engine, units, engine.device)
    shares = [[i for unit in rank_units for i in unit.examples] for rank_units in plan.units]
    counts = [int((job.examples.segments[share] - 1).sum()) for share in shares]
    queries = [len(share) for share in shares]
    return contrastive_step(
        engine, units, job.stage, counts, sum(queries), engine.device, progress=bar.within, query_counts=queries
    )


def _evaluate(engine, job: Job, metrics: Metrics, step: int) -> None:
    engine.eval()
    with torch.no_grad():
        metrics.write(step, job.evaluate(step))
    engine.train()


def _save(engine, job: Job, step: int, tokens: int) -> None:
    tensors = read_state(engine, job.parameters)
    error = None
    if dist.get_rank() == 0:
        try:
            state = checkpoint.Checkpoint(step, tensors, job.facts | {"tokens": tokens})
            checkpoint.save(job.folder / "checkpoints", state, keep=job.stage.keep)
        except UserError as caught:
            error = str(caught)
    errors = [error]
    dist.broadcast_object_list(errors, src=0, device=engine.device)
    if errors[0]:
        raise UserError(errors[0])


class _Log:
    """Turns device scalars into rows: read once every `log_every` steps, so that the device is not kept waiting."""

    def __init__(self, job: Job, metrics: Metrics, bar: Progress, engine, seen: int) -> None:
        self.job, self.metrics, self.bar, self.device = job, metrics, bar, engine.device
        dtype = next(iter(job.parameters.values())).dtype  # adapters have that of the base
        self.speed = Throughput(engine.module.decoder, engine.device, dtype, world=dist.get_world_size(), tokens=seen)

    def step(
        self, step: int, epoch: float, shares: dict[str, torch.Tensor], rate: float, norm: float | None, seen: int
    ) -> None:
        self.bar.step()
        if step % self.job.stage.log_every and step != self.job.stage.steps:
            return
        values = torch.stack([value.float() for value in shares.values()])
        dist.all_reduce(values)
        memory = torch.tensor(float(peak_memory(self.device)), device=self.device)
        dist.all_reduce(memory, op=dist.ReduceOp.MAX)
        row = dict(zip(shares, values.tolist(), strict=True))
        row |= {
            "epoch": round(epoch, 4),
            "learning_rate": rate,
            "gradient_norm": float(norm) if norm is not None else None,
            "tokens": seen,
        }
        row |= self.speed.row(seen) | {"peak_memory_gib": round(memory.item() / 2**30, 2)}
        self.metrics.write(step, row)
        self.bar.say(told(row))


class _StopFlag:
    """SIGINT and SIGTERM ask for a stop after the current step; all ranks decide together."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self):
        self.old = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def _ask(self, *_) -> None:
        self.asked = True

    def agreed(self, broken: torch.Tensor) -> tuple[bool, bool]:
        """Whether any rank was asked to stop, and whether any rank's step is `broken` (a device bool); the same on all.

        The step's one wait for the device, and one small collective; before the update, so that a broken step has none.
        """
        flags = torch.stack([torch.tensor(self.asked, device=broken.device), broken]).float()
        if dist.get_world_size() > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return tuple(flags.bool().tolist())
