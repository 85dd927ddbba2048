"""The loop: three objectives, one way through. Plan a step, collate, backward, update, write metrics, save."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from l2v.data.collate import Masking
from l2v.data.sampler import StepPlan
from l2v.errors import UserError
from l2v.recipe import Contrastive, Stage, Tracking
from l2v.training import checkpoint
from l2v.training.ahead import Ahead
from l2v.training.engine import read_state, write_state
from l2v.training.faults import Guard, discard, gradient_norm
from l2v.training.finite import Skips, is_broken
from l2v.training.metrics import Metrics, Progress
from l2v.training.profile import Profile
from l2v.training.ranks import on_every_rank, on_first_rank
from l2v.training.saver import Log, Saver
from l2v.training.steps import contrastive_step, mntp_step
from l2v.training.throughput import Throughput, peak_memory, told
from l2v.training.watchdog import Watchdog
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
    watchdog: Watchdog
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
    start = resume.step if resume else 0
    ahead = Ahead(job, rank, world)  # before anything is written: it refuses examples that fit no micro-batch
    if resume:
        write_state(engine, job.parameters, resume.tensors, resume.step - resume.facts.get("skipped", 0))
    seen = resume.facts["tokens"] if resume else 0
    bar = Progress(stage.steps, start, job.name, active=rank == 0)

    def tell(text: str) -> None:
        bar.note(f"{job.name}: {text}")

    metrics = on_every_rank(
        lambda: Metrics(job.folder, job.tracking, name=job.name, active=rank == 0, resumed_at=start, log=tell)
    )
    stop = _StopFlag()
    saver = Saver(job.folder / "checkpoints", keep=stage.keep, active=rank == 0, log=tell)
    watch = job.watchdog
    watch.last_words.append(saver.wait)
    engine.train()
    log = _Log(job, metrics, bar, engine, seen)
    profile = Profile(
        engine.module, job.folder / "profile", active=job.profile and rank == 0, start=start, steps=stage.steps,
        device=engine.device, aside=log.speed.paused, log=bar.note,
    )  # fmt: skip
    saved_at, skips = start, Skips.of(resume)
    try:
        with ahead, stop:
            if start < stage.steps:
                on_every_rank(lambda: ahead.check(start))
            if job.evaluate and start == 0:
                with log.speed.paused():
                    _evaluate(engine, job, metrics, 0)
            for step in range(start, stage.steps):
                with profile.step(step + 1):
                    rate = learning_rate(stage, step, ahead.sampler.steps_per_epoch)
                    for group in engine.optimizer.param_groups:
                        group["lr"] = rate
                    plan, shares, flags, norm = _whole_step(engine, job, ahead, step, stop, bar, tell)
                    if flags.broken:
                        with span("optimizer"):
                            discard(engine)
                    else:
                        watch.at(f"step {step + 1}: update")
                        with span("optimizer"):
                            engine.step()
                    applied = not flags.broken and engine.was_step_applied()
                    norm = (engine.get_global_grad_norm() if norm is None else norm) if applied else None
                    seen += int(job.examples.lengths[plan.examples].sum())
                    skips.count(applied)
                    ahead.note(step, plan)
                    log.step(step + 1, plan.epoch, shares, rate, norm, seen, skips)
                done = step + 1
                if not applied:
                    bad = shares.get("not_finite_S"), shares["loss"]
                    ending = skips.say(done, stage, ahead.units, *bad, tell, job.folder)
                else:
                    ending = None
                ending = ending or ahead.trouble(flags)
                last = done == stage.steps
                if last or flags.stop or ending or (stage.save_every and done % stage.save_every == 0):
                    watch.at(f"step {done}: checkpoint")
                    with log.speed.paused():
                        _save(engine, job, saver, done, seen, skips)
                    saved_at = done
                saver.poll()
                if ending:
                    raise ending
                if flags.stop and not last:
                    raise Interrupted(_stopped(saver, done))
                if job.evaluate and (last or (stage.eval_every and done % stage.eval_every == 0)):
                    with log.speed.paused():
                        _evaluate(engine, job, metrics, done)
            watch.at(None)
    finally:
        watch.pause()
        saver.close()
        watch.last_words.clear()
        profile.close()
        bar.close()
        metrics.close()
    if saved_at == start and start == stage.steps and resume:
        return resume.tensors
    return read_state(engine, job.parameters)


def _whole_step(engine, job: Job, ahead: Ahead, step: int, stop: _StopFlag, bar: Progress, tell: Log):
    """Forward and backward of a step, again in smaller micro-batches where memory ran out on any rank."""
    while True:
        job.watchdog.at(f"step {step + 1}: data")
        plan, units = ahead.take(step)
        guard = Guard(engine)
        job.watchdog.at(f"step {step + 1}: forward and backward")
        shares = _backward(engine, job, plan, units, bar, guard)
        job.watchdog.at(f"step {step + 1}: agreement of ranks")
        broken = is_broken(shares["loss"], shares.get("not_finite_S"))
        if (norm := gradient_norm(engine)) is not None:
            broken = broken | ~norm.isfinite()
        flags = stop.agreed(broken, guard.happened, ahead.failed(step + 1))
        if not flags.memory:
            return plan, shares, flags, norm
        discard(engine)
        ahead.shrink(step)
        tell(
            f"WARNING: out of memory at step {step + 1}; all ranks take the step back and go on with micro_tokens "
            f"{ahead.micro_tokens}, which changes nothing that is learned"
        )


def _backward(engine, job: Job, plan: StepPlan, units, bar: Progress, guard: Guard) -> dict[str, torch.Tensor]:
    if not isinstance(job.stage, Contrastive):
        return mntp_step(engine, units, engine.device, guard)
    shares = [[i for unit in rank_units for i in unit.examples] for rank_units in plan.units]
    counts = [int((job.examples.segments[share] - 1).sum()) for share in shares]
    queries = [len(share) for share in shares]
    return contrastive_step(
        engine, units, job.stage, counts, sum(queries), engine.device, progress=bar.within, query_counts=queries,
        guard=guard,
    )  # fmt: skip


def _evaluate(engine, job: Job, metrics: Metrics, step: int) -> None:
    job.watchdog.at(None)  # as long as it takes
    engine.eval()
    with torch.no_grad():
        metrics.write(step, job.evaluate(step))
    engine.train()


def _save(engine, job: Job, saver: Saver, step: int, tokens: int, skips: Skips) -> None:
    """A collective call: every rank gives its part, rank 0 writes beside the training."""
    tensors = read_state(engine, job.parameters)
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:  # the same on every rank: the state is whole on each
        raise UserError(
            f"after step {step} {len(broken)} adapter tensors hold values that are not finite ({broken[0]}); no checkpoint was "
            "written of that, the one before is whole: lower lr or use base.precision: fp32, then start anew from there"
        )
    saver.submit(checkpoint.Checkpoint(step, tensors, job.facts | {"tokens": tokens} | skips.facts()))


def _stopped(saver: Saver, done: int) -> str:
    """What a run that was asked to stop says; a collective call, since only one rank knows what reached the disk."""
    failed = on_first_rank(lambda: (saver.wait(), saver.failed)[1])
    if failed:
        return f"stopped after step {done}, but {failed}"
    return f"stopped after step {done}; the same command goes on from there"


class _Log:
    """Turns device scalars into rows: read once every `log_every` steps, so that the device is not kept waiting."""

    def __init__(self, job: Job, metrics: Metrics, bar: Progress, engine, seen: int) -> None:
        self.job, self.metrics, self.bar, self.device = job, metrics, bar, engine.device
        dtype = next(iter(job.parameters.values())).dtype  # adapters have that of the base
        self.speed = Throughput(engine.module.decoder, engine.device, dtype, world=dist.get_world_size(), tokens=seen)

    def step(
        self, step: int, epoch: float, shares: dict[str, torch.Tensor], rate: float, norm: float | torch.Tensor | None,
        seen: int, skips: Skips,
    ) -> None:  # fmt: skip
        self.bar.step()
        if step % self.job.stage.log_every and step != self.job.stage.steps:
            return
        shares = {key: value for key, value in shares.items() if value.dim() == 0}
        values = torch.stack([value.float() for value in shares.values()])
        dist.all_reduce(values)
        memory = torch.tensor(float(peak_memory(self.device)), device=self.device)
        dist.all_reduce(memory, op=dist.ReduceOp.MAX)
        row = {key: value if math.isfinite(value) else None for key, value in zip(shares, values.tolist(), strict=True)}
        row |= {
            "epoch": round(epoch, 4),
            "learning_rate": rate,
            "gradient_norm": float(norm) if norm is not None else None,
            "tokens": seen,
        }
        if skips.total:
            row["skipped_steps"] = skips.total
        row |= self.speed.row(seen) | {"peak_memory_gib": round(memory.item() / 2**30, 2)}
        self.metrics.write(step, row)
        self.bar.say(told(row))


@dataclass
class _Flags:
    """What the ranks agreed on at a step's end: stop after it, it is broken, memory ran out, the next one's data fail."""

    stop: bool
    broken: bool
    memory: bool
    data: bool


class _StopFlag:
    """SIGINT, SIGTERM and SIGUSR1 ask for a stop after the current step; all ranks decide together."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self):
        self.old = {s: signal.signal(s, self._ask) for s in self.SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def _ask(self, *_) -> None:
        self.asked = True

    def agreed(self, broken: torch.Tensor, memory: bool, data: bool) -> _Flags:
        """What any rank says, the same on all. broken: a device bool, whether this rank's step is.

        The step's one wait for the device, and one small collective; before the update, so that a broken step has none.
        """
        mine = torch.tensor([self.asked, memory, data], device=broken.device)
        flags = torch.cat([mine, broken[None]]).float()
        if dist.get_world_size() > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        asked, memory, data, broken = flags.bool().tolist()
        return _Flags(asked, broken, memory, data)
