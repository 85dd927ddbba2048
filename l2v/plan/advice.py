"""What training asks of the plan at the start of a stage: how ranks are balanced, what fits and is fastest, what is the limit."""

from __future__ import annotations

import torch

from l2v.errors import RecipeError, UserError
from l2v.model.fused import Recompute
from l2v.plan.estimate import Choice, Context, model_of
from l2v.plan.gpus import at_hand
from l2v.plan.memory import largest_micro_batches
from l2v.plan.report import host_limit
from l2v.plan.work import Lengths, work_of
from l2v.training.advice import Advice, Question


def advise(question: Question) -> Advice:
    """The balance of the ranks and the device share of a stage, predicted, and the choice of `recompute: auto`.

    On a CPU, or a GPU whose speed is not known, ranks are balanced by tokens and nothing is chosen.
    """
    lengths = Lengths.of(question.examples)
    context = _context(question, lengths)
    if context is None:
        return Advice(None, None, question.micro_tokens, _by_tokens(question, lengths))
    choice = _choice(question, context)
    micro_tokens = choice.micro_tokens if choice else question.micro_tokens
    how: Recompute = (
        choice.recompute if choice else "none" if question.stage.recompute == "auto" else question.stage.recompute
    )
    speed = choice.speed if choice else context.speed(context.work(micro_tokens), how)
    share = f"device share {speed.device_share:.2f}"
    lines = [f"balance of ranks {speed.balance:.2f}, {share}" if question.world > 1 else share]
    lines[0] += f", about {1e3 * speed.step_seconds:,.0f} ms a step (all predicted)"
    if relief := context.relief(speed, how, micro_tokens):
        lines.append(host_limit(speed, relief, question.world))
    if micro_tokens < question.micro_tokens:
        lines.append(
            f"recompute: auto takes micro_tokens {micro_tokens:,}, the fastest of at most {question.micro_tokens:,}"
        )
    return Advice(context.cost, choice.recompute if choice else None, micro_tokens, lines)


def _context(question: Question, lengths: Lengths) -> Context | None:
    """What a prediction needs; None on a CPU, for a GPU of unknown speed, and for layers of another family."""
    if not torch.cuda.is_available():
        return None
    try:
        gpu = at_hand(question.dtype)
        model = model_of(question.recipe.base, question.config, question.stage, question.dtype.itemsize)
    except (RecipeError, UserError):
        return None
    if not gpu.timed:
        return None
    seed = question.recipe.stage_seed(question.name)
    return Context(
        question.recipe, question.stage, model, gpu, question.dtype, question.world, question.per_node, lengths, seed
    )  # fmt: skip


def _choice(question: Question, context: Context) -> Choice | None:
    if question.stage.recompute != "auto" or not question.may_choose or not context.model.fused:
        return None
    largest = largest_micro_batches(context.model.shape, question.free, question.mode, question.end)
    return context.choose(largest, question.micro_tokens)


def _by_tokens(question: Question, lengths: Lengths) -> list[str]:
    if question.world == 1:
        return []
    seed = question.recipe.stage_seed(question.name)
    works = work_of(lengths, question.stage, question.world, seed, question.micro_tokens)
    each = [[share.tokens for share in work.ranks] for work in works]
    balance = sum(sum(tokens) / len(tokens) / max(tokens) for tokens in each) / len(each)
    return [f"balance of ranks {balance:.2f} (mean over largest number of tokens)"]
