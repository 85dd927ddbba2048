"""Train one stage of a recipe: claim its folder, open its data, build its model, run the loop, save its adapter."""

from __future__ import annotations

import functools
import gc
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from l2v.data.collate import Masking
from l2v.data.examples import token_buffers
from l2v.data.open import open_examples, settled
from l2v.data.tokens import TextTokenizer, check_vocabulary, load_tokenizer
from l2v.errors import UserError
from l2v.model.embedded import resolve
from l2v.model.load import dtype_of, load_config, proof_of
from l2v.model.lora import trainable
from l2v.model.packed import PackedDecoder
from l2v.model.proof import check_model
from l2v.model.quantize import notice
from l2v.model.vocabulary import rows_with
from l2v.recipe import LLAMA_LINEARS, Base, Contrastive, Mntp, Recipe, Stage, Supervised
from l2v.recipe.load import to_dict
from l2v.runs.claim import claim, merged_adapters, publish, recorded_negatives
from l2v.runs.folder import has_begun, is_trained, result_of, run_folder
from l2v.runs.published import read_published
from l2v.training import checkpoint
from l2v.training.advice import Advise
from l2v.training.build import Placed, build, check_weights, place_memory
from l2v.training.engine import deepspeed_config, initialize
from l2v.training.faults import OutOfMemory, is_chosen, read_budget, smaller, write_budget
from l2v.training.frozen import frozen_checksum
from l2v.training.held_out import evaluator
from l2v.training.loop import Job, train
from l2v.training.ranks import agree, first_on_node, on_every_rank, on_first_rank
from l2v.training.watchdog import Watchdog

FEW_PAIRS = 500
"""Training on fewer pairs is warned of."""
EXAMPLES = "examples"
"""In a checkpoint's facts: what it was trained on."""


@dataclass
class StageData:
    """A stage's tokenizer, its examples, the held-out ones (None without `eval_data`), and lines to log."""

    texts: TextTokenizer
    examples: Any
    held_out: Any
    notes: list[str]


def train_stage(
    recipe: Recipe, name: str, rank: int, world: int, watch: Watchdog, *, advise: Advise, fresh: bool = False
) -> None:
    """Train one stage from scratch or from its newest checkpoint; a finished stage is skipped. A collective call.

    advise: predicts the balance of ranks and what is fastest (`l2v.plan.advice`).

    Raises:
        UserError: the folder belongs to another recipe, or the data, the base or an adapter cannot be used.
    """
    stage, folder = recipe.stages[name], run_folder(recipe) / name

    def log(text: str) -> None:
        if rank == 0:
            print(f"{name}: {text}", flush=True)

    _keep_negatives(stage, folder, fresh)
    facts = {"name": recipe.name, "stage": name, "recipe": to_dict(recipe)}
    claimed = on_first_rank(lambda: claim(recipe, name, folder, facts, fresh))
    if claimed.done:
        log(f"already trained, {_what(stage)} {result_of(folder)}")
        return
    data = _open_data(recipe, name)
    stage = settled(stage, data.examples.segments)
    for note in data.notes:
        log(note)
    resume = checkpoint.newest(folder / "checkpoints", log=print if rank == 0 else None)
    if on_first_rank(lambda: is_trained(folder)):
        for line in on_every_rank(functools.partial(_longer, recipe, name, resume)):
            log(line)

    watch.on_fault = [functools.partial(_keep_budget, folder)]
    _check_data(data, name, stage, resume)

    dtype, seed = dtype_of(recipe.base.precision), recipe.stage_seed(name)
    model, lineage = _build(recipe, name, dtype, seed, log)
    parameters = {n.removeprefix("decoder."): p for n, p in trainable(model).items()}
    if resume:
        _restore(parameters, resume.tensors, name)
        log(f"continues after step {resume.step}")
    masking = _masking(stage, data.texts, recipe.base.mask_token, model)
    units = model.as_units() if recipe.zero.stage == 3 else []
    count = sum(p.numel() for p in parameters.values())
    check_weights(model, recipe, name)
    engine = initialize(model, deepspeed_config(stage, recipe.zero, dtype, count), stage, units)
    place = functools.partial(place_memory, model, recipe, name, stage, dtype, data.examples, advise=advise)
    placed = _placed(place, stage, folder, resume is not None, log)
    check_model(engine, model, name=recipe.base.model)
    job = Job(
        name=name, stage=stage, seed=seed, folder=folder, examples=data.examples, masking=masking, parameters=parameters,
        facts={"world": world, EXAMPLES: _summary(data.examples)},
        tracking=recipe.tracking, watchdog=watch, profile=recipe.profile, grown_from=claimed.grown_from,
        cost=placed.cost,
        evaluate=evaluator(engine, stage, data.held_out, masking) if data.held_out else None,
    )  # fmt: skip
    weights = _train_checked(engine, job, resume, rank)
    on_first_rank(functools.partial(publish, model.decoder, weights, folder, lineage))
    log(f"done, {_what(stage)} {result_of(folder)}")
    engine.destroy()
    del engine, model, job
    gc.collect()


def _what(stage: Stage) -> str:
    """What a stage leaves, for a line with its folder."""
    return "all weights in" if stage.lora is None else "adapter in"


def _restore(parameters: dict[str, torch.nn.Parameter], tensors: Mapping[str, torch.Tensor], name: str) -> None:
    """Copy a checkpoint's weights into the adapter, or into the decoder.

    Raises:
        UserError: it has other ones.
    """
    if missing := [key for key in parameters if f"weight.{key}" not in tensors]:
        raise UserError(
            f"stage '{name}': its checkpoint has no weights for {len(missing)} trained tensors, such as {missing[0]}; it was "
            "trained with another base or other lora.targets: name those, or train from scratch with --fresh --stage "
            f"{name}"
        )
    for key, parameter in parameters.items():
        parameter.data.copy_(tensors[f"weight.{key}"])


def _keep_budget(folder: Path, facts: dict[str, Any]) -> None:
    """After a fault, the tokens of a forward for the next start."""
    if "micro_tokens" in facts:
        write_budget(folder, facts["micro_tokens"])


def _placed(
    place: Callable[..., Placed], stage: Stage, folder: Path, resumes: bool, log: Callable[[str], None]
) -> Placed:
    """How the stage uses memory; a lower micro_tokens that was chosen is kept for the next start. Logs what was chosen."""
    micro_tokens, chosen = read_budget(folder, stage.micro_tokens), is_chosen(folder, stage.micro_tokens)
    placed = place(micro_tokens=micro_tokens, may_choose=not (resumes or chosen))
    if placed.micro_tokens < micro_tokens:
        write_budget(folder, placed.micro_tokens, chosen_from=stage.micro_tokens)
    for line in placed.lines:
        log(line)
    return placed


def _build(
    recipe: Recipe, name: str, dtype: torch.dtype, seed: int, log: Callable[[str], None]
) -> tuple[PackedDecoder, dict[str, Any]]:
    """The model of a stage and its lineage, the same on all ranks; logs what makes it slower or less exact."""
    model, lineage = on_every_rank(functools.partial(build, recipe, name, dtype=dtype, seed=seed))
    agree({"the base and its adapters": lineage})
    if model.unfused_reason and recipe.base.backend == "l2v":
        log(f"plain layers, slower than fused ones: {model.unfused_reason}")
    lora = recipe.stages[name].lora
    trained = model.decoder.peft_config["default"].target_modules if lora else ()
    if lora and set(lora.targets) == set(LLAMA_LINEARS) != set(trained):
        names = ", ".join(sorted(trained))
        log(f"lora.targets: this base has other linear layers than {', '.join(LLAMA_LINEARS)}; trained are {names}")
    for line in on_first_rank(functools.partial(_unlike_published, recipe.base)):
        log(line)
    if note := proof_of(model.decoder).note():
        log(note)
    if banner := notice(recipe.base):
        log(banner)
    return model, lineage


def _unlike_published(base: Base) -> list[str]:
    """A line to log if the base is a published encoder that makes its vectors in another way than the recipe."""
    if base.init == "random":
        return []
    try:
        published = read_published(base.model)
    except UserError as error:  # its transformer can be trained all the same
        return [f"WARNING: the base is a published encoder, and only its transformer is trained: {error}"]
    if published is None:
        return []
    theirs = published.base.pooling, published.base.attention
    if theirs == (base.pooling, base.attention):
        return []
    return [
        f"WARNING: the base is a published encoder with pooling {theirs[0]} and {theirs[1]} attention; this recipe trains it "
        f"with pooling {base.pooling} and {base.attention} attention (base.pooling, base.attention)"
    ]


def _keep_negatives(stage: Stage, folder: Path, fresh: bool) -> None:
    """A stage that began with a number of hard negatives resumes with it, also if the recipe now says `auto`. Collective."""
    if isinstance(stage, Supervised) and stage.max_negatives == "auto" and not fresh:
        recorded = on_first_rank(lambda: recorded_negatives(folder))
        stage.max_negatives = "auto" if recorded is None else recorded


def _longer(recipe: Recipe, name: str, resume: checkpoint.Checkpoint | None) -> list[str]:
    """Lines to log about a trained stage that trains longer.

    Raises:
        UserError: its last checkpoint is missing.
    """
    run, steps = run_folder(recipe), recipe.stages[name].steps
    if resume is None:
        raise UserError(
            f"{run / name}: it cannot train on to step {steps:,}, because its checkpoint is missing or damaged; train it from "
            f"scratch with --fresh --stage {name}"
        )
    later = [each for each in recipe.order() if name in recipe.chain(each) and has_begun(run / each)]
    lines = [f"trained for {resume.step:,} steps before; its adapter stays until that of step {steps:,} replaces it"]
    if later:
        lines.append(
            f"WARNING: trained from its old adapter, which will be replaced: {', '.join(later)}; train each again afterwards, in "
            "this order, with --fresh --stage NAME"
        )
    return lines


def _open_data(recipe: Recipe, name: str) -> StageData:
    """The data of a stage. A collective call: one rank of each node prepares it, the others read the result."""
    stage, base = recipe.stages[name], recipe.base
    tokenizer = on_every_rank(
        lambda: load_tokenizer(
            base.tokenizer or resolve(base.model), revision=base.revision, trust_remote_code=base.trust_remote_code
        )
    )
    config = on_every_rank(lambda: load_config(base, trust_remote_code=base.trust_remote_code))
    merged = [adapter for adapter, _ in merged_adapters(recipe, name)]
    rows = on_every_rank(lambda: rows_with(merged, config.get_text_config().vocab_size))
    on_every_rank(lambda: check_vocabulary(tokenizer, rows, base, stage.lora.trainable_tokens if stage.lora else ()))
    texts = TextTokenizer.of(tokenizer, base, stage.length)
    notes = on_every_rank(functools.partial(check_prefixes, recipe, name))
    examples = first_on_node(lambda: open_examples(stage.data, stage, texts))
    held_out = first_on_node(lambda: open_examples(stage.eval_data, stage, texts)) if stage.eval_data else None
    if isinstance(stage, Supervised) and len(examples) < FEW_PAIRS:
        notes = [
            *notes,
            f"WARNING: {len(examples)} pairs are very few to learn from; measure on held-out questions (l2v eval) whether the "
            "stage helps, and add pairs (l2v data synthesize writes queries for passages)",
        ]
    held = [f"held out: {note}" for note in held_out.notes] if held_out else []
    return StageData(texts, examples, held_out, [*examples.notes, *held, *notes])


def _check_data(data: StageData, name: str, stage: Stage, resume: checkpoint.Checkpoint | None) -> None:
    """Check that all ranks read the same examples and the same checkpoint, and that the checkpoint's are these.

    Raises:
        UserError: ranks differ, the data changed since the checkpoint, or a contrastive stage has fewer than two examples.
    """
    examples = _summary(data.examples)
    agree(
        {
            f"the examples of stage '{name}'": examples,
            f"the held-out examples of stage '{name}'": _summary(data.held_out) if data.held_out else None,
            f"the checkpoint of stage '{name}'": resume and f"step {resume.step} ({resume.facts['sha256'][:12]})",
        }
    )
    if resume and (before := resume.facts.get(EXAMPLES, examples)) != examples:
        raise UserError(
            f"stage '{name}': its data have changed since the checkpoint of step {resume.step} ({before} then, {examples} now), "
            f"and what follows would not be what one run gives; restore them, or train from scratch with --fresh --stage {name}"
        )
    if len(data.examples) < 2 and isinstance(stage, Contrastive):
        raise UserError(f"stage '{name}': {len(data.examples)} example leaves no in-batch negatives; give at least 2")


def _train_checked(engine, job: Job, resume: checkpoint.Checkpoint | None, rank: int) -> dict[str, torch.Tensor]:
    """Run the loop; returns the trained weights, fp32, on rank 0 alone.

    With L2V_CHECK=1 the frozen weights are compared bit by bit.

    Raises:
        OutOfMemory: memory ran out where a step cannot be repeated; the next start uses smaller micro-batches.
        UserError: see `l2v.training.loop.train`; or frozen weights changed.
    """
    check = os.environ.get("L2V_CHECK") == "1"
    before = frozen_checksum(engine.module) if check else None
    try:
        final = train(engine, job, resume)
    except OutOfMemory as error:
        budget = read_budget(job.folder, job.stage.micro_tokens)
        budget = smaller(job.stage, budget, int(job.examples.lengths.max()))
        write_budget(job.folder, budget)
        job.watchdog.failed(f"out of memory ({error}); the next start uses micro_tokens {budget}", micro_tokens=budget)
        raise
    if check:
        after = frozen_checksum(engine.module)
        print(f"{job.name}: rank {rank}: frozen weights {before} before, {after} after", flush=True)
        agree({"the frozen weights": (before, after)})
        if before != after:
            raise UserError(
                f"stage '{job.name}': frozen weights changed during training; the adapter does not fit the base"
            )
    return {key: final[f"weight.{key}"] for key in job.parameters} if rank == 0 else {}


def check_prefixes(recipe: Recipe, name: str) -> list[str]:
    """Check the matryoshka lengths against the base; returns lines to log.

    Raises:
        UserError: a length is longer than the base's vectors.
    """
    lengths = getattr(recipe.stages[name], "matryoshka", None)
    if lengths is None:
        return []
    config = load_config(recipe.base, trust_remote_code=recipe.base.trust_remote_code)
    hidden = config.get_text_config().hidden_size
    if lengths[-1] > hidden:
        raise UserError(
            f"stage '{name}': matryoshka asks for a prefix of {lengths[-1]} and the vectors of '{recipe.base.model}' have "
            f"{hidden} dimensions; use at most {hidden}"
        )
    untrained = f"dimensions beyond {lengths[-1]} of {hidden} are in no matryoshka length and learn nothing"
    return [untrained] if lengths[-1] < hidden else []


def _summary(examples) -> str:
    """Number and contents of the examples: ranks notice if they read different rows, and a resumed stage if they changed."""
    digest = hashlib.blake2b(examples.lengths.tobytes() + examples.segments.tobytes(), digest_size=6)
    for ids in token_buffers(examples.rows):
        digest.update(ids)
    return f"{len(examples)} examples, {int(examples.lengths.sum())} tokens, hash {digest.hexdigest()}"


def _masking(stage: Stage, texts: TextTokenizer, mask_token: str, model: PackedDecoder) -> Masking | None:
    if not isinstance(stage, Mntp):
        return None
    tokenizer = texts.tokenizer
    return Masking(
        probability=stage.mask_probability,
        split=stage.mask_split,
        mask_id=texts.single(mask_token),
        vocabulary=min(len(tokenizer), model.head.weight.shape[0]),
        special_ids=frozenset(tokenizer.all_special_ids),
    )
