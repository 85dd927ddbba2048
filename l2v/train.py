"""The training program: `deepspeed launch/train.py`, `deepspeed --module l2v.train` and `l2v train` all run this.

It parses arguments, starts the ranks, handles errors and exit codes, and calls `train_stage` for each stage. Each stage
writes one adapter to its own folder.

torch, DeepSpeed and transformers take seconds to import. A process that only starts the launcher checks the recipe and its
data without them, so they are imported inside functions.
"""

from __future__ import annotations

import argparse
import functools
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from l2v.cores import choose, may_have_gpu
from l2v.data.precheck import check_data, check_disk
from l2v.errors import UserError
from l2v.recipe import Recipe
from l2v.recipe.load import load_recipe, to_dict
from l2v.runs.folder import is_trained, read_stage, run_folder
from l2v.training.launcher import launch, launched, ranks_here, restore_visible_devices, set_allocator

STOPPED_EARLY = "stopped before the first step; nothing has changed"


def main(argv: Sequence[str] | None = None) -> int:
    """Train the stages in order; returns the exit code: 0 done, 1 and 2 errors that the user can fix, others a fault."""
    args = parser().parse_intermixed_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # meant for PEFT, not for users
    if launched():
        restore_visible_devices()
        set_allocator()
        choose(
            processes=max(1, ranks_here()), threads=not may_have_gpu(), steady=True
        )  # where the launcher is not `l2v train`
        return _train(args)
    try:
        recipe = _checked(args)  # before torch is loaded and the launcher takes twenty seconds
        from l2v.machine.gpus import check

        for note in check(args.processes or 0):  # else torch would silently train on the CPU
            print(f"l2v: {note}", file=sys.stderr, flush=True)
        _tuned(recipe, args)
        arguments = list(sys.argv[1:] if argv is None else argv)
        return launch("l2v.train", arguments, processes(args), restarts=args.restarts)
    except UserError as error:
        print(f"l2v: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"l2v: {STOPPED_EARLY}", file=sys.stderr, flush=True)
        return 1


def _train(args: argparse.Namespace) -> int:
    """Train as one rank of a launcher."""
    import torch.distributed as dist

    from l2v.machine.gpus import check
    from l2v.model.embedded import resolve
    from l2v.plan.advice import advise
    from l2v.training.engine import be_deterministic, start_distributed
    from l2v.training.loop import Interrupted
    from l2v.training.ranks import agree, first_on_node, on_every_rank
    from l2v.training.stage import train_stage
    from l2v.training.watchdog import Watchdog

    watch = None
    try:
        check()
        rank, world = start_distributed(_timeout(args))
        recipe = on_every_rank(functools.partial(_checked, args))
        notes = on_every_rank(functools.partial(_tuned, recipe, args))
        watch = Watchdog(recipe.timeout).start()
        for line in notes if rank == 0 else ():
            print(line, flush=True)
        agree(to_dict(recipe) | {"--stage": args.stage, "--fresh": args.fresh} | _place(recipe, world))
        if recipe.deterministic:
            be_deterministic()
        if recipe.base.tokenizer is None and recipe.base.model:
            first_on_node(lambda: resolve(recipe.base.model))
        for name in [args.stage] if args.stage else recipe.order():
            train_stage(recipe, name, rank, world, watch, advise=advise, fresh=args.fresh)
        if rank == 0:
            print(_next(recipe, args.stage), flush=True)
    except UserError as error:
        # Before the ranks are connected, each node prints its own error, because no other node knows it.
        if int(os.environ.get("RANK" if dist.is_initialized() else "LOCAL_RANK", 0)) == 0:
            print(f"l2v: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except (Interrupted, KeyboardInterrupt) as stopped:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"l2v: {str(stopped) or STOPPED_EARLY}", file=sys.stderr, flush=True)
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
    """Timeout of collectives in seconds: far longer than the watchdog's, which can report the rank that is missing.

    If the recipe cannot be read, this is the default; all ranks report the error together later.
    """
    try:
        return 4 * _loaded(args).timeout
    except UserError:
        return 4 * Recipe.timeout


def parser() -> argparse.ArgumentParser:
    """The arguments of the training program."""
    p = argparse.ArgumentParser(
        prog="l2v train",
        description="Train the stages of a recipe, in order, under DeepSpeed; the same command continues a stopped run.",
        epilog="examples:\n  l2v train llama3-8b-da\n  l2v train llama3-8b-da --stage mntp steps=2000",
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=28, width=98),
    )
    p.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a recipe that comes with l2v")
    p.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="dotted keys of the recipe, for example stages.mntp.steps=100"
    )
    p.add_argument("--stage", metavar="NAME", help="train only this stage; bare keys then belong to it")
    p.add_argument(
        "--fresh", action="store_true", help="discard what was trained of these stages and start from scratch"
    )
    p.add_argument(
        "--gpus", "--processes", dest="processes", type=int, metavar="N",
        help="processes on this machine (default: every GPU, or 1)",
    )  # fmt: skip
    p.add_argument(
        "--restarts", type=int, default=0, metavar="N", help="start again after a fault, up to N times (default: 0)"
    )
    p.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher passes it
    return p


def _loaded(args: argparse.Namespace) -> Recipe:
    return load_recipe(args.recipe, args.overrides, args.stage)


def _checked(args: argparse.Namespace) -> Recipe:
    """The recipe, with the data of every stage that will run checked, and for the first start the disk."""
    recipe = _loaded(args)
    names = [name for name in ([args.stage] if args.stage else recipe.order()) if args.fresh or not _done(recipe, name)]
    check_data(args.recipe, args.overrides, args.stage, recipe, names)
    if not launched():
        check_disk(recipe, names)
    return recipe


def _done(recipe: Recipe, name: str) -> bool:
    """Whether a stage is trained for as many steps as the recipe says, so that its data is not read."""
    folder = run_folder(recipe) / name
    try:
        steps = (read_stage(folder) or {})["recipe"]["stages"][name]["steps"]
    except (KeyError, TypeError):
        return False
    return is_trained(folder) and steps == recipe.stages[name].steps


def _tuned(recipe: Recipe, args: argparse.Namespace) -> list[str]:
    """Give the recipe the settings that `l2v tune` found for this machine; returns lines to log about them."""
    if os.environ.get("L2V_TUNED") == "0":  # set by `l2v tune` for its own runs
        return []
    from l2v.tuning.apply import apply_tuned

    return apply_tuned(recipe, args.recipe, args.overrides, ranks_here() or processes(args))


def processes(args: argparse.Namespace) -> int:
    """Number of processes that the launcher starts on this machine."""
    import torch

    return args.processes or max(1, torch.cuda.device_count())


def _next(recipe: Recipe, stage: str | None) -> str:
    """What to do with a trained run, a command a line."""
    run, last = run_folder(recipe), recipe.stages[stage or recipe.order()[-1]]
    trained = shlex.quote(str(run / stage if stage else run))
    source, texts = last.data[0], ""
    if ":" not in source.path.partition("/")[0] and not any(c in source.path for c in "*?["):
        column = source.positive if last.objective == "supervised" else source.text
        named = "" if column in ("text", "positive") else f" --column {shlex.quote(column)}"
        texts = f" --texts {shlex.quote(source.path)}{named}"
    return (
        "Next:\n"
        f'  l2v search {trained} "your query"{texts}\n'
        f"  l2v eval {trained}{'' if stage else ' --stages'} --benchmark seb-da\n"
        f"  l2v report {shlex.quote(str(run))}"
    )


def _place(recipe: Recipe, world: int) -> dict[str, Any]:
    """Facts about a rank's environment that must be the same on all ranks."""
    import torch

    from l2v.model.load import device, dtype_of

    seen = {"world size": world, "device": device().type, "precision": str(dtype_of(recipe.base.precision))}
    return seen | {"version of torch": torch.__version__}


if __name__ == "__main__":
    sys.exit(main())
