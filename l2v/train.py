"""The training program: `deepspeed launch/train.py`, `deepspeed --module l2v.train` and `l2v train` all run this.

It composes recipe, data, model and loop; each stage of the recipe is one adapter in a folder of its own.
"""

from __future__ import annotations

import argparse
import functools
import gc
import hashlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from l2v.data.collate import Masking
from l2v.data.examples import MntpBlocks, Pairs, Views
from l2v.data.mixture import mix_sources
from l2v.data.sources import open_parts, together
from l2v.data.tokens import TextTokenizer, load_tokenizer
from l2v.errors import UserError
from l2v.held_out import evaluator
from l2v.launcher import launch, launched
from l2v.machine import gpu_trouble
from l2v.model.embedded import resolve
from l2v.model.load import device, dtype_of, fingerprint, inner_model, load_config, load_model, output_head
from l2v.model.lora import add_lora, describe_adapter, merge_adapters, trainable
from l2v.model.memory import LayerShape, activation_bytes, choose_recompute, free_bytes
from l2v.model.packed import PackedDecoder
from l2v.model.quantize import check_base_precision, check_fused, notice, to_fp8, to_nf4
from l2v.recipe import Contrastive, Mntp, Recipe, Simcse, Stage, Supervised
from l2v.recipe.load import load_recipe, to_dict
from l2v.runs.claim import claim, merged_adapters, publish
from l2v.runs.folder import run_folder
from l2v.training import checkpoint
from l2v.training.engine import be_deterministic, deepspeed_config, initialize, start_distributed
from l2v.training.faults import OutOfMemory, read_budget, smaller, write_budget
from l2v.training.frozen import frozen_checksum
from l2v.training.loop import Interrupted, Job, train
from l2v.training.memory import bucket_in_backward, end_of, engine_bytes, largest_micro, way_of, yet_to_come
from l2v.training.ranks import agree, first_on_node, on_every_rank, on_first_rank, ranks_here
from l2v.training.watchdog import Watchdog
from l2v.tuned import apply_tuned


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train the stages in order, return the exit code: 0 done, 1 and 2 a user's to mend, others a fault."""
    args = parser().parse_intermixed_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # advice to PEFT, not to our users
    watch = None
    try:
        read = functools.partial(_read, args)
        if trouble := gpu_trouble():  # torch would train on the CPU without a word
            raise UserError(trouble)
        if not launched():
            read()  # a mistake is said before twenty seconds of launching
            own = list(sys.argv[1:] if argv is None else argv)
            return launch("l2v.train", own, processes(args), restarts=args.restarts)
        rank, world = start_distributed(_timeout(args))
        recipe, told = on_every_rank(read)
        watch = Watchdog(recipe.timeout).start()
        for line in told if rank == 0 else ():
            print(line, flush=True)
        agree(to_dict(recipe) | {"--stage": args.stage, "--fresh": args.fresh} | _place(recipe, world))
        if recipe.deterministic:
            be_deterministic()
        if recipe.base.tokenizer is None and recipe.base.model:
            first_on_node(lambda: resolve(recipe.base.model))
        for name in [args.stage] if args.stage else recipe.order():
            train_stage(recipe, name, rank, world, watch, fresh=args.fresh)
    except UserError as error:
        # Before the ranks have met, each node speaks for itself: its error is known to no other.
        if int(os.environ.get("RANK" if dist.is_initialized() else "LOCAL_RANK", 0)) == 0:
            print(f"l2v: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except (Interrupted, KeyboardInterrupt) as stopped:
        if int(os.environ.get("RANK", 0)) == 0:
            print(
                f"l2v: {str(stopped) or 'stopped before the first step; nothing was changed'}",
                file=sys.stderr,
                flush=True,
            )
        return 1
    except Exception as error:
        if watch is None:
            raise
        return watch.crashed(error)
    finally:
        if watch:
            watch.leave()
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def _timeout(args: argparse.Namespace) -> float:
    """Seconds that ranks wait for each other in a collective: far more than the watchdog, which can say who is missing.

    A recipe that cannot be read is said by all ranks together later, so here it gives the default.
    """
    try:
        return 4 * _read(args)[0].timeout
    except UserError:
        return 4 * Recipe.timeout


def parser() -> argparse.ArgumentParser:
    """The arguments of the training program."""
    p = argparse.ArgumentParser(
        prog="l2v train", description="Train the stages of a recipe, in order, under DeepSpeed."
    )
    p.add_argument("recipe", help="a YAML file, or the name of a recipe that comes with l2v")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. stages.mntp.steps=100")
    p.add_argument("--stage", help="train only this stage; bare keys then belong to it")
    p.add_argument("--fresh", action="store_true", help="forget what was trained of these stages before and start anew")
    p.add_argument(
        "--gpus", "--processes", dest="processes", type=int, help="processes on this machine (default: every GPU, or 1)"
    )
    p.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="N",
        help="start again after a fault, up to N times",
    )
    p.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher passes it
    return p


def _read(args: argparse.Namespace) -> tuple[Recipe, list[str]]:
    """The recipe, with what `l2v tune` found for this machine, and what to tell of that."""
    recipe = load_recipe(args.recipe, args.overrides, args.stage)
    if os.environ.get("L2V_TUNED") == "0":  # tuning itself
        return recipe, []
    return recipe, apply_tuned(recipe, args.recipe, args.overrides, ranks_here() or processes(args))


def processes(args: argparse.Namespace) -> int:
    """How many the launcher is to start here."""
    return args.processes or max(1, torch.cuda.device_count())


def _place(recipe: Recipe, world: int) -> dict[str, Any]:
    """What a rank sees of itself that must be the same for all."""
    seen = {"world size": world, "device": device().type, "precision": str(dtype_of(recipe.base.precision))}
    return seen | {"version of torch": torch.__version__}


def train_stage(recipe: Recipe, name: str, rank: int, world: int, watch: Watchdog, *, fresh: bool = False) -> None:
    """Train one stage, or go on with it, or find that it is done."""
    stage, folder = recipe.stages[name], run_folder(recipe) / name
    facts = {"name": recipe.name, "stage": name, "recipe": to_dict(recipe)}
    state = on_first_rank(lambda: claim(recipe, name, folder, facts, fresh))
    if state == "done":
        if rank == 0:
            print(f"{name}: already trained, its adapter is {folder / 'adapter'}", flush=True)
        return
    dtype, seed = dtype_of(recipe.base.precision), recipe.stage_seed(name)
    tokenizer = on_every_rank(
        lambda: load_tokenizer(
            recipe.base.tokenizer or resolve(recipe.base.model),
            revision=recipe.base.revision,
            trust_remote_code=recipe.base.trust_remote_code,
        )
    )
    texts = TextTokenizer(tokenizer, recipe.base.template, stage.length)
    notes = on_every_rank(functools.partial(check_prefixes, recipe, name))
    examples = first_on_node(lambda: open_examples(stage.data, stage, texts))
    held_out = first_on_node(lambda: open_examples(stage.eval_data, stage, texts)) if stage.eval_data else None
    if rank == 0:
        for note in [*examples.notes, *notes]:
            print(f"{name}: {note}", flush=True)
    resume = checkpoint.newest(folder / "checkpoints", tell=print if rank == 0 else None)
    watch.on_fault = [lambda facts: "micro_tokens" in facts and write_budget(folder, facts["micro_tokens"])]
    agree(
        {
            f"the examples of stage '{name}'": _summary(examples),
            f"the held-out examples of stage '{name}'": _summary(held_out) if held_out else None,
            f"the checkpoint of stage '{name}'": resume and f"step {resume.step} ({resume.facts['sha256'][:12]})",
        }
    )
    if len(examples) < 2 and isinstance(stage, Contrastive):
        raise UserError(f"stage '{name}': {len(examples)} example leaves no in-batch negatives; give at least 2")

    model, lineage = on_every_rank(functools.partial(build, recipe, name, dtype=dtype, seed=seed))
    agree({"the base and its adapters": lineage})
    if rank == 0 and model.plain_because and recipe.base.backend == "l2v":
        print(f"{name}: plain layers, slower than fused ones: {model.plain_because}", flush=True)
    if rank == 0 and (banner := notice(recipe.base)):
        print(f"{name}: {banner}", flush=True)
    parameters = {n.removeprefix("decoder."): p for n, p in trainable(model).items()}
    if resume:
        for key, parameter in parameters.items():
            parameter.data.copy_(resume.tensors[f"weight.{key}"])
        if rank == 0:
            print(f"{name}: going on after step {resume.step}", flush=True)
    masking = _masking(stage, texts, recipe.base.mask_token, model)
    units = model.as_units() if recipe.zero.stage == 3 else []
    count = sum(p.numel() for p in parameters.values())
    engine = initialize(model, deepspeed_config(stage, recipe.zero, dtype, count), stage, units)
    note = _place_memory(model, recipe, stage, dtype, int(examples.lengths.max()))
    if rank == 0 and note:
        print(f"{name}: {note}", flush=True)
    job = Job(
        name=name, stage=stage, seed=seed, folder=folder, examples=examples, masking=masking, parameters=parameters,
        facts={"world": world}, tracking=recipe.tracking, watchdog=watch, profile=recipe.profile,
        evaluate=evaluator(engine, stage, held_out, masking) if held_out else None,
    )  # fmt: skip
    check = os.environ.get("L2V_CHECK") == "1"
    before = frozen_checksum(model) if check else None
    try:
        final = train(engine, job, resume)
    except OutOfMemory as error:
        budget = smaller(stage, read_budget(folder, stage.micro_tokens), int(examples.lengths.max()))
        write_budget(folder, budget)
        watch.failed(f"out of memory ({error}); the next start goes on with micro_tokens {budget}", micro_tokens=budget)
        raise
    if check:
        after = frozen_checksum(model)
        print(f"{name}: rank {rank}: frozen weights {before} before, {after} after", flush=True)
        agree({"the frozen weights": (before, after)})
        if before != after:
            raise UserError(
                f"stage '{name}': frozen weights changed in training; the adapter does not belong to the base"
            )
    weights = {key: final[f"weight.{key}"] for key in parameters}
    on_first_rank(functools.partial(publish, model.decoder, weights, folder, lineage))
    if rank == 0:
        print(f"{name}: done, adapter in {folder / 'adapter'}", flush=True)
    engine.destroy()
    del engine, model, job
    gc.collect()


def _place_memory(model: PackedDecoder, recipe: Recipe, stage: Stage, dtype: torch.dtype, longest: int) -> str | None:
    """Once weights lie where they stay: put together what is multiplied together, decide what the backward makes again.

    longest: tokens of the longest example.
    Returns what was chosen, for the user. It changes no bit of what is learned, so ranks may choose apart.
    """
    if model.fused is None:
        model.set_recompute(stage.recompute)
        return None
    if recipe.base.base_precision == "fp8":
        to_fp8(model.fused, model.decoder)
    elif recipe.zero.stage < 3:
        model.fused.lay_together()
    where = device()
    shape = LayerShape.of(
        model.fused.inner.config, rank=stage.lora.r, targets=tuple(stage.lora.targets), itemsize=dtype.itemsize
    )
    world, kernels = dist.get_world_size(), where.type == "cuda"
    sizes = [p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in model.parameters() if p.requires_grad]
    config = deepspeed_config(stage, recipe.zero, dtype, sum(sizes))
    engine = engine_bytes(sum(sizes), config, dtype.itemsize, world, max(sizes), gpu=kernels)
    free = free_bytes(where, max(1, ranks_here())) - yet_to_come(engine, recipe.zero.stage)
    tokens, way = largest_micro(stage, world, longest), way_of(stage, fused=True, kernels=kernels)
    vocabulary = model.fused.inner.config.get_text_config().vocab_size
    bucket = bucket_in_backward(engine, recipe.zero.stage)
    end = end_of(stage, shape, vocabulary, tokens, world, kernels=kernels, bucket=bucket)
    chosen = stage.recompute
    if chosen == "auto":
        chosen = choose_recompute(shape, tokens, free, way, end)
    model.set_recompute(chosen)
    needs = activation_bytes(shape, chosen, tokens, way, end)
    return (
        f"fused layers, recompute {chosen}: {tokens:,} tokens need up to {needs / 2**30:.1f} GiB of "
        f"{free / 2**30:.1f} GiB free"
    )


def open_examples(sources, stage: Stage, texts: TextTokenizer):
    """Rows to examples, by objective; how the sources are mixed stands beside them."""
    kind = {Mntp: "documents", Supervised: "pairs"}.get(type(stage), "sentences")
    parts = open_parts(sources, kind)
    rows = together(parts, sources)
    if isinstance(stage, Mntp):
        examples = MntpBlocks(rows, texts, document_mask=stage.document_mask)
    elif isinstance(stage, Supervised):
        examples = Pairs(rows, texts, max_negatives=stage.max_negatives)
    else:
        examples = Views(rows, texts)
    examples.mixture = mix_sources(sources, [len(part) for part in parts], examples.rows_of, stage)
    if examples.mixture:
        examples.notes += examples.mixture.notes
    return examples


def check_prefixes(recipe: Recipe, name: str) -> list[str]:
    """Matryoshka lengths against the base: what a user should know of them.

    Errors: UserError if one is longer than the base's vectors.
    """
    lengths = getattr(recipe.stages[name], "matryoshka", None)
    if lengths is None:
        return []
    hidden = load_config(recipe.base).get_text_config().hidden_size
    if lengths[-1] > hidden:
        raise UserError(
            f"stage '{name}': matryoshka asks for a prefix of {lengths[-1]} and the vectors of '{recipe.base.model}' have "
            f"{hidden} dimensions; use at most {hidden}"
        )
    beyond = f"dimensions beyond {lengths[-1]} of {hidden} are in no matryoshka length and learn nothing"
    return [beyond] if lengths[-1] < hidden else []


def _summary(examples) -> str:
    """Number and lengths of examples, by which ranks notice that they read different rows."""
    digest = hashlib.blake2b(examples.lengths.tobytes() + examples.segments.tobytes(), digest_size=6).hexdigest()
    return f"{len(examples)} examples, {int(examples.lengths.sum())} tokens (lengths {digest})"


def build(recipe: Recipe, name: str, *, dtype: torch.dtype, seed: int) -> tuple[PackedDecoder, dict[str, Any]]:
    """The decoder of a stage: base, earlier adapters merged in order, fresh LoRA; and its lineage."""
    stage, base = recipe.stages[name], recipe.base
    check_base_precision(base, device(), dtype)
    model = load_model(base, head=isinstance(stage, Mntp), dtype=dtype, seed=recipe.seed)
    merged = merged_adapters(recipe, name)
    inner = merge_adapters(inner_model(model), [adapter for adapter, _ in merged])
    head = output_head(model) if isinstance(stage, Mntp) else None
    if base.base_precision == "nf4":
        to_nf4(inner, device(), dtype)
    decoder = add_lora(inner, stage.lora, base_name=base.model, seed=seed)
    lineage = {
        "base": {"model": base.model, "revision": base.revision, "sha256": fingerprint(base)},
        "merged": [describe_adapter(adapter, **facts) for adapter, facts in merged],
        "stage": name,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if base.base_precision != "same":
        lineage["base_precision"] = base.base_precision
    packed = PackedDecoder(
        decoder,
        head=head,
        causal=base.attention == "causal",
        backend=base.backend,
        pooling=base.pooling,
        attention_dropout=stage.attention_dropout if isinstance(stage, Simcse) else 0.0,
        layers=base.layers,
    )
    check_fused(base, packed)
    return packed, lineage


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


if __name__ == "__main__":
    sys.exit(main())
