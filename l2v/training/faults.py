"""What happens when a step cannot be applied: its values are NaN or Inf, or memory ran out."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from l2v.batch import PackedBatch, Segment, pack
from l2v.errors import UserError, first_line
from l2v.files import follow_umask, reason, replace_text
from l2v.model.memory import is_out_of_memory
from l2v.recipe import Stage
from l2v.training.norm import GradientNorm

BUDGET = "budget.json"


class OutOfMemory(Exception):
    """This rank ran out of memory where the step cannot be repeated; the job restarts with smaller micro-batches."""


class OutOfMemoryGuard:
    """Keeps a rank in step with the others after it ran out of memory.

    The other ranks wait for this one in collectives, so it finishes the step with one-token batches that carry no loss. At
    the end of the step all ranks learn of it, discard the step and repeat it in smaller micro-batches. Under ZeRO-3 the
    weights are gathered inside layers, and a layer that stopped halfway cannot be repaired: there `OutOfMemory` ends the job.
    """

    def __init__(self, engine) -> None:
        self.engine, self.happened = engine, False

    def run(self, work: Callable[[], Any], instead: Callable[[], Any]) -> Any:
        """Returns `work()`; once memory ran out, `instead()` until the end of the step.

        Raises:
            OutOfMemory: the step cannot be repeated (ZeRO-3, or a gradient bucket that is sent before the backward ends).
        """
        if not self.happened:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.engine.zero_optimization_stage() == 3 or not self._whole_bucket():
                    raise OutOfMemory(first_line(error)) from None
                self.happened = True
            # Outside the handler, because the traceback would keep the step's tensors alive.
            self.free()
        return instead()

    def _whole_bucket(self) -> bool:
        """Whether no gradient is sent before the backward ends; the user's DeepSpeed file may set a smaller bucket."""
        count = sum(p.numel() for p in self.engine.module.parameters() if p.requires_grad)
        return getattr(self.engine.optimizer, "reduce_bucket_size", count) >= count

    def free(self) -> None:
        """Drop the gradients of an unfinished backward and release their memory."""
        optimizer = self.engine.optimizer
        for bucket in getattr(optimizer, "ipg_buckets", {}).values():
            bucket.clear()
        if (order := getattr(optimizer, "gradient_order", None)) is not None:
            order.clear()
        reduced = getattr(optimizer, "params_already_reduced", [])
        reduced[:] = [False] * len(reduced)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def filler(device: torch.device) -> PackedBatch:
    """One token that carries no loss."""
    return pack([Segment(np.zeros(1, dtype=np.int64), example=-1, column=-1, text_key=0)]).to(device)


def discard(engine) -> None:
    """End a step without applying its gradients; weights, Adam moments and step count keep every bit.

    Under every ZeRO stage but 0, DeepSpeed itself skips a step whose gradients are NaN or Inf and clears what it
    accumulated, so the gradients are filled with NaN. It looks for them in this step also where it is configured not to.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 0 and not hasattr(optimizer, "averaged_gradients"):
        clear = getattr(optimizer, "clear_hp_grads", None)  # DeepSpeed's bf16 optimizer has it
        if clear:
            clear()
            optimizer.clear_lp_grads()
        engine.zero_grad()
        return
    for gradients in optimizer.averaged_gradients.values():
        for gradient in gradients or ():
            gradient.fill_(float("nan"))
    if hasattr(optimizer, "local_overflow"):
        optimizer.local_overflow = True  # an optimizer in host memory keeps no list of gradients
    from deepspeed.utils.logging import logger

    level, searches = logger.level, getattr(optimizer, "check_grad_overflow", True)
    logger.setLevel(logging.ERROR)  # hides its overflow warning; this program logs the skipped step itself
    optimizer.check_grad_overflow = True
    try:
        engine.step()
    finally:
        logger.setLevel(level)
        optimizer.check_grad_overflow = searches
    if engine.was_step_applied():
        raise AssertionError("a step that was to be discarded was applied")


def gradient_norm(engine) -> torch.Tensor | None:
    """Norm of the gradients before clipping, float32 [] on the device; NaN or Inf if a gradient is.

    Only for ZeRO 0, where DeepSpeed does not check gradients for NaN and Inf. None under the other stages, which give the
    norm after the step (`get_global_grad_norm`).
    """
    if engine.zero_optimization_stage() != 0:
        return None
    norms = [p.grad.norm(dtype=torch.float32) for p in engine.module.parameters() if p.grad is not None]
    return torch.stack(norms).norm() if norms else None


def broken_gradients(engine) -> torch.Tensor | None:
    """Whether a gradient of this rank's partition is NaN or Inf: bool [] on the device.

    For ZeRO 1 and 2 where `deepspeed_config` keeps DeepSpeed from searching for them; None elsewhere. One norm of all, where
    DeepSpeed's search takes several launches a tensor.
    """
    own: GradientNorm | None = getattr(engine.optimizer, "gradient_norm", None)
    norm = own.local() if own is not None else None
    return None if norm is None else ~norm.isfinite()


def smaller(stage: Stage, micro_tokens: int, longest: int) -> int:
    """Half the tokens of a forward, but at least one example.

    Raises:
        UserError: a single example already needs too much memory.
    """
    if micro_tokens <= longest:
        raise UserError(
            f"out of memory with one example of {longest} tokens in a forward; lower length, set recompute: layer, or use a "
            "higher zero.stage or base_precision: nf4"
        )
    return max(longest, micro_tokens // 2)


def read_budget(folder: Path, micro_tokens: int) -> int:
    """Tokens of a forward: the recipe's, or fewer if this stage ran out of memory before or if fewer were chosen."""
    found = _budget(folder)
    if found.get("chosen_from", micro_tokens) != micro_tokens:  # chosen when the recipe had another value
        return micro_tokens
    return min(micro_tokens, found.get("micro_tokens", micro_tokens))


def is_chosen(folder: Path, micro_tokens: int) -> bool:
    """Whether this stage has chosen fewer than the recipe's `micro_tokens`, or ran out of memory."""
    return _budget(folder).get("chosen_from", micro_tokens) == micro_tokens and bool(_budget(folder))


def _budget(folder: Path) -> dict[str, int]:
    try:
        found = json.loads((folder / BUDGET).read_text(encoding="utf-8"))
        return {key: int(found[key]) for key in ("micro_tokens", "chosen_from") if key in found}
    except (OSError, ValueError, TypeError):
        return {}


def write_budget(folder: Path, micro_tokens: int, chosen_from: int | None = None) -> None:
    """Store what fits, or is fastest, for the next start. If the file cannot be written, the next start finds it out again.

    chosen_from: the recipe's `micro_tokens` if fewer were chosen for speed; with another value there is a new choice.
    """
    facts = {"micro_tokens": micro_tokens} | ({"chosen_from": chosen_from} if chosen_from else {})
    with contextlib.suppress(OSError):
        replace_text(folder / BUDGET, json.dumps(facts) + "\n")


def keep_batch(folder: Path, step: int, units: Sequence[Sequence[PackedBatch]], why: str) -> Path:
    """Save this rank's part of a batch with NaN or Inf for inspection: token ids, and the example and column of each text.

    Returns its path, with a note if it could not be written.
    """
    micros = [micro for unit in units for micro in unit]
    path = folder / "broken" / f"step-{step:06d}-rank-{dist.get_rank()}.safetensors"
    names = ("input_ids_T", "pool_mask_T", "example_ids_S", "columns_S", "labels_L", "label_index_L")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"{at}.{name}": getattr(m, name).contiguous() for at, m in enumerate(micros) for name in names}
        tensors |= {f"{at}.lengths_S": torch.tensor(m.lengths) for at, m in enumerate(micros)}
        save_file(tensors, path, {"why": why, "step": str(step)})
        follow_umask(path)
    except (OSError, SafetensorError) as error:
        return Path(f"{path} (not written: {reason(error)})")
    return path
