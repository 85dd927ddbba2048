"""The training loop, the same for all three objectives. `train` lists the parts of a step; `Training` implements them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from l2v.data.balance import Cost
from l2v.data.collate import Masking
from l2v.data.sampler import StepPlan
from l2v.errors import UserError
from l2v.recipe import Contrastive, Stage, Tracking
from l2v.training import checkpoint
from l2v.training.agreement import Agreement, StopRequest
from l2v.training.engine import read_state, write_state
from l2v.training.faults import OutOfMemoryGuard, broken_gradients, discard, gradient_norm
from l2v.training.metrics import Metrics, Progress
from l2v.training.prefetch import BatchPrefetcher
from l2v.training.profile import Profile
from l2v.training.ranks import on_every_rank, on_first_rank
from l2v.training.saver import Saver
from l2v.training.schedule import changed_curve, hardly_falls, learning_rate
from l2v.training.skips import BrokenStep, Skips, is_broken
from l2v.training.steps import StepCounts, contrastive_step, mntp_step
from l2v.training.throughput import Throughput, peak_memory, summary
from l2v.training.watchdog import Watchdog
from l2v_kernels.spans import span

Evaluate = Callable[[int], dict[str, float]]


class Interrupted(Exception):
    """Training stopped at a signal, after writing a checkpoint."""


@dataclass
class Job:
    """Everything that a stage's loop needs. `evaluate` is called on every rank with the step; it may be None. grown_from: the
    recipe's steps at the start before, if it has more now. cost: by which ranks are balanced, default: tokens.
    """

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
    grown_from: int | None = None
    cost: Cost | None = None


@dataclass
class StepResult:
    """One step: its plan, this rank's shares of loss and accuracy, and what the ranks agreed on.

    norm: of the gradients before clipping; None until the update where only DeepSpeed computes it. applied: whether the
    update was applied.
    """

    plan: StepPlan
    shares: dict[str, torch.Tensor]
    agreed: Agreement
    norm: float | torch.Tensor | None
    applied: bool = False


def train(engine, job: Job, resume: checkpoint.Checkpoint | None) -> Mapping[str, torch.Tensor]:
    """Run a stage to its last step; returns the state from `read_state` (fp32 weights and moments, on rank 0 alone).

    Raises:
        Interrupted: a signal requested a stop; a checkpoint was written.
        OutOfMemory: memory ran out where a step cannot be repeated.
        UserError: too many steps in a row could not be applied, or the data, the disk or an example failed.
    """
    training = Training(engine, job, resume)
    try:
        with training.batches, training.stop:
            training.before_first_step()
            for step in range(training.start, job.stage.steps):
                with training.profile.step(step + 1):
                    training.set_learning_rate(step)
                    result = training.forward_and_backward(step)
                    training.update_or_skip(step, result)
                    training.log_step(step, result)
                error = training.error_after(step, result)
                training.save_if_due(step, result, error)
                if error:
                    raise error
                training.stop_if_asked(step, result)
                training.evaluate_if_due(step)
            job.watchdog.at(None)
    finally:
        training.close()
    return training.final_state()


class Training:
    """A stage in training: its batches, metrics, checkpoints and signals, and the parts of a step in the order they run.

    Every method that communicates is a collective call: all ranks must call it.
    """

    def __init__(self, engine, job: Job, resume: checkpoint.Checkpoint | None) -> None:
        self.engine, self.job, self.resume, self.rank = engine, job, resume, dist.get_rank()
        self.start = resume.step if resume else 0
        # Before anything is written, because it raises for examples that fit no micro-batch.
        self.batches = BatchPrefetcher(job, self.rank, dist.get_world_size())
        if resume:
            write_state(engine, job.parameters, resume.tensors, resume.step - resume.facts.get("skipped", 0))
        self.tokens = resume.facts["tokens"] if resume else 0
        self.skips = Skips.of(resume)
        self.queries = self.alone = 0
        self.said_alone = False
        self.stop = StopRequest()
        active = self.rank == 0
        self.bar = Progress(job.stage.steps, self.start, job.name, active=active)
        self.metrics = on_every_rank(
            lambda: Metrics(job.folder, job.tracking, name=job.name, active=active, resumed_at=self.start, log=self.log)
        )
        self.saver = Saver(job.folder / "checkpoints", keep=job.stage.keep, active=active, log=self.log)
        job.watchdog.last_words.append(self.saver.wait)
        engine.train()
        dtype = next(iter(job.parameters.values())).dtype  # adapters have the base's dtype
        self.speed = Throughput(
            engine.module.decoder, engine.device, dtype, world=dist.get_world_size(), tokens=self.tokens
        )
        self.profile = Profile(
            engine.module, job.folder / "profile", active=job.profile and active, start=self.start, steps=job.stage.steps,
            device=engine.device, aside=self.speed.paused, log=self.bar.note,
        )  # fmt: skip

    def log(self, text: str) -> None:
        """Print a line above the progress bar, on the first rank."""
        self.bar.note(f"{self.job.name}: {text}")

    def before_first_step(self) -> None:
        """Check on every rank that the first step's data can be read; measure the held-out loss before training."""
        if self.start < self.job.stage.steps:
            on_every_rank(lambda: self.batches.check(self.start))
        self._say_schedule()
        if self.start == 0:
            self._evaluate(0)

    def _say_schedule(self) -> None:
        """Log once in a stage what its learning rate does that the recipe may not intend."""
        job, per_epoch = self.job, self.batches.sampler.steps_per_epoch
        if job.grown_from is not None:
            before = replace(job.stage, steps=job.grown_from)
            if line := changed_curve(before, job.stage, self.start, per_epoch):
                self.log(line)
        elif self.start == 0 and (line := hardly_falls(job.stage, per_epoch)):
            self.log(line)

    def set_learning_rate(self, step: int) -> None:
        """Set this step's rate in every parameter group of the optimizer."""
        self.rate = learning_rate(self.job.stage, step, self.batches.sampler.steps_per_epoch)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.rate

    def forward_and_backward(self, step: int) -> StepResult:
        """Compute a step's gradients and agree on the outcome; if memory ran out, repeat in smaller micro-batches."""
        watch = self.job.watchdog
        while True:
            watch.at(f"step {step + 1}: data")
            plan, units = self.batches.get(step)
            guard = OutOfMemoryGuard(self.engine)
            watch.at(f"step {step + 1}: forward and backward")
            shares = self._gradients(plan, units, guard)
            watch.at(f"step {step + 1}: agreement of ranks")
            broken = is_broken(shares["loss"], shares.get("nonfinite_S"))
            if (norm := gradient_norm(self.engine)) is not None:
                broken = broken | ~norm.isfinite()
            if (of_partition := broken_gradients(self.engine)) is not None:
                broken = broken | of_partition
            agreed = self.stop.agree(broken, memory=guard.happened, data=self.batches.failed(step + 1))
            if not agreed.memory:
                return StepResult(plan, shares, agreed, norm)
            discard(self.engine)
            self.batches.shrink(step)
            self.log(
                f"WARNING: out of memory at step {step + 1}; all ranks repeat the step with micro_tokens "
                f"{self.batches.micro_tokens}; the result stays the same"
            )

    def _gradients(self, plan: StepPlan, units, guard: OutOfMemoryGuard) -> dict[str, torch.Tensor]:
        stage, engine = self.job.stage, self.engine
        if not isinstance(stage, Contrastive):
            return mntp_step(engine, units, engine.device, guard)
        examples = [[i for unit in rank_units for i in unit.examples] for rank_units in plan.units]
        candidates = [int((self.job.examples.segments[own] - 1).sum()) for own in examples]
        counts = StepCounts(candidates=candidates, queries=[len(own) for own in examples])
        spread = self.batches.spread
        return contrastive_step(engine, units, stage, counts, spread=spread, progress=self.bar.within, guard=guard)

    def update_or_skip(self, step: int, result: StepResult) -> None:
        """Apply the gradients, or drop them if any rank has NaN or Inf; count tokens and skipped steps."""
        with span("optimizer"):
            if result.agreed.broken:
                discard(self.engine)
            else:
                self.job.watchdog.at(f"step {step + 1}: update")
                self.engine.step()
        result.applied = not result.agreed.broken and self.engine.was_step_applied()
        if not result.applied:
            result.norm = None
        elif result.norm is None:
            result.norm = self.engine.get_global_grad_norm()
        self.queries += len(result.plan.examples)
        self.alone += self.batches.alone
        self.tokens += int(self.job.examples.lengths[result.plan.examples].sum())
        self.skips.count(result.applied)
        self.batches.audit(step, result.plan)

    def log_step(self, step: int, result: StepResult) -> None:
        """Write a row of metrics every `log_every` steps; device scalars are read only then, to avoid waiting each step."""
        self.bar.step()
        done, stage = step + 1, self.job.stage
        if done % stage.log_every and done != stage.steps:
            return
        device = self.engine.device
        shares = {key: value for key, value in result.shares.items() if value.dim() == 0}
        values = torch.stack([value.float() for value in shares.values()])
        if isinstance(stage, Contrastive):  # summed over ranks along with the loss
            values = torch.cat([values, values.new_tensor([float(self.alone)])])
        dist.all_reduce(values)
        memory = torch.tensor(float(peak_memory(device)), device=device)
        dist.all_reduce(memory, op=dist.ReduceOp.MAX)
        summed = values.tolist()
        row = {key: value if math.isfinite(value) else None for key, value in zip(shares, summed, strict=False)}
        row |= {
            "epoch": round(result.plan.epoch, 4),
            "learning_rate": self.rate,
            "gradient_norm": float(result.norm) if result.norm is not None else None,
            "tokens": self.tokens,
        }
        if self.skips.total:
            row["skipped_steps"] = self.skips.total
        if isinstance(stage, Contrastive) and summed[-1]:
            row["queries_without_negatives"] = int(summed[-1])
            self._say_alone(done, int(summed[-1]))
        row |= self.speed.row(self.tokens) | {"peak_memory_gib": round(memory.item() / 2**30, 2)}
        self.metrics.write(done, row)
        self.bar.status(summary(row))

    def _say_alone(self, done: int, alone: int) -> None:
        """Log once that queries have no negative; the count so far is in every row of metrics."""
        if not self.said_alone:
            self.said_alone = True
            self.log(
                f"WARNING: {alone:,} of {self.queries:,} queries of steps {self.start + 1} to {done} have no negative left, so "
                "they teach nothing: the other texts of their batch repeat the question or its answer, or are of its group; use "
                "a larger batch, or check the data for repeated texts"
            )

    def error_after(self, step: int, result: StepResult) -> UserError | None:
        """The error that ends training after this step: too many skipped steps in a row, or unreadable data for the next."""
        error = None
        if not result.applied:
            broken = BrokenStep(step + 1, self.batches.units, result.shares["loss"], result.shares.get("nonfinite_S"))
            error = self.skips.report(broken, limit=self.job.stage.skip_limit, folder=self.job.folder, log=self.log)
        return error or self.batches.error_on_any_rank(result.agreed)

    def save_if_due(self, step: int, result: StepResult, error: UserError | None) -> None:
        """Save a checkpoint after the last step, at every `save_every`, and before training ends for another reason."""
        done, stage = step + 1, self.job.stage
        due = stage.save_every and done % stage.save_every == 0
        if due or done == stage.steps or result.agreed.stop or error:
            self.job.watchdog.at(f"step {done}: checkpoint")
            with self.speed.paused():
                self._save(done)
        self.saver.poll()

    def _save(self, done: int) -> None:
        """Collect the state from all ranks; rank 0 writes it while training continues."""
        tensors = read_state(self.engine, self.job.parameters)

        def check() -> None:
            if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
                raise UserError(
                    f"after step {done} {len(broken)} trained tensors hold NaN or Inf ({broken[0]}), so no checkpoint was "
                    "written; the previous checkpoint is intact: lower lr or use base.precision: fp32, then run the same "
                    "command again"
                )

        on_first_rank(check)
        facts = self.job.facts | {"tokens": self.tokens} | self.skips.facts()
        self.saver.submit(checkpoint.Checkpoint(done, tensors, facts))

    def stop_if_asked(self, step: int, result: StepResult) -> None:
        """Stop before the last step if a signal reached any rank.

        Raises:
            Interrupted: a stop was requested.
        """
        if not result.agreed.stop or step + 1 == self.job.stage.steps:
            return

        def failure() -> str | None:
            self.saver.wait()
            return self.saver.failed

        if failed := on_first_rank(failure):  # only rank 0 writes checkpoints
            raise Interrupted(f"stopped after step {step + 1}, but {failed}")
        raise Interrupted(f"stopped after step {step + 1}; the same command continues from there")

    def evaluate_if_due(self, step: int) -> None:
        """Compute held-out metrics after the last step and at every `eval_every`."""
        done, stage = step + 1, self.job.stage
        if done == stage.steps or (stage.eval_every and done % stage.eval_every == 0):
            self._evaluate(done)

    def _evaluate(self, step: int) -> None:
        if self.job.evaluate is None:
            return
        self.job.watchdog.at(None)  # no timeout: an evaluation may take long
        with self.speed.paused():
            self.engine.eval()
            with torch.no_grad():
                self.metrics.write(step, self.job.evaluate(step))
            self.engine.train()

    def final_state(self) -> Mapping[str, torch.Tensor]:
        """The state after the last step; if no step was left to train, the checkpoint's state."""
        if self.resume and self.start == self.job.stage.steps:
            return self.resume.tensors
        return read_state(self.engine, self.job.parameters)

    def close(self) -> None:
        """Finish pending writes; called however training ends."""
        self.job.watchdog.pause()
        self.saver.close()
        self.job.watchdog.last_words.clear()
        self.profile.close()
        self.bar.close()
        self.metrics.close()
