"""`l2v encode MODEL FILE --out vectors.parquet`: vectors of a whole file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from l2v.commands.parser import add_loading, new_parser, next_step, quoted
from l2v.data.find import find_files
from l2v.errors import RecipeError, UserError
from l2v.recipe.tasks import TASKS, find_task
from l2v.runs.names import check_model


def main(argv: Sequence[str] | None = None) -> int:
    """Encode a file of any size; the same command resumes after a kill."""
    args = parser().parse_intermixed_args(argv)
    _check(args)
    from l2v.training.launcher import launch, launched, restore_visible_devices

    if launched():
        restore_visible_devices()
    elif (processes := args.processes or _gpus()) > 1:
        arguments = list(argv or ())
        return launch("l2v.commands.main", ["encode", *arguments], processes)
    return _encode(args)


def _check(args: argparse.Namespace) -> None:
    """Answer a mistyped name before torch is loaded and the launcher takes twenty seconds."""
    from l2v.encoding.names import check_apart, check_out

    for key in ("processes", "batch_tokens", "dimensions", "length"):
        if (value := getattr(args, key)) is not None and value < 1:
            raise RecipeError(f"--{key.replace('_', '-')} is {value}; use 1 or more")
    check_model(args.model)
    find_files(args.file)
    out = check_out(args.out)
    check_apart(out, args.file)
    if args.task:
        find_task(args.task)
        if args.instruction is not None:
            raise RecipeError("--task and --instruction both say what precedes a text; give one of them")
    if args.columns is not None and not _names(args.columns):
        raise RecipeError("--columns names no field; give names with commas between them, or leave it out for all")
    if args.columns is not None and out.suffix != ".parquet":
        raise RecipeError(f"--columns needs a .parquet file; {out.suffix} holds numbers alone (ids stand next to it)")


def _names(columns: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in columns.split(",") if name.strip()))


def _gpus() -> int:
    """GPUs to use, one process each; 0 on a machine without."""
    from l2v.commands.main import may_have_gpu

    if not may_have_gpu():
        return 0
    import torch

    return torch.cuda.device_count()


def _encode(args: argparse.Namespace) -> int:
    from l2v.encoding.ranks import Ranks
    from l2v.encoding.rows import Input
    from l2v.encoding.run import Job, encode_file

    kept: tuple[str, ...] | None = ()
    parquet = args.out.endswith(".parquet")
    if parquet:
        kept = None if args.columns is None else _names(args.columns)
    given = Input(args.file, args.column, args.id, kept, args.vector_column if parquet else None, args.empty)
    options = {"precision": args.precision, "length": args.length, "trust_remote_code": args.trust_remote_code}
    job = Job(
        args.model, given, args.out, args.side, args.task, args.instruction, args.dimensions, args.batch_tokens,
        args.vector_column if parquet else "vector", tuple(args.adapter), options,
    )  # fmt: skip
    with Ranks() as ranks:
        try:
            done = encode_file(job, ranks)
        except UserError as error:
            if ranks.rank:  # the first one reports it
                return error.exit_code
            raise
        except KeyboardInterrupt:
            if ranks.rank == 0:
                print(f"l2v: stopped; the same command resumes ({args.out}.work)", file=sys.stderr)
            return 1
    if ranks.rank == 0:
        for note in done.notes:
            print(f"l2v: {note}", file=sys.stderr)
        what = f"{done.rows:,} vectors of {done.dimensions} dimensions" + (", finished before" if done.already else "")
        print(f"{args.out}: {what}; instruction: {done.instruction or 'none'}")
        print(next_step(f"{quoted('l2v', 'search', args.model)} QUERY --index {quoted(args.out)}"), file=sys.stderr)
    return 0


def parser() -> argparse.ArgumentParser:
    """The arguments of `l2v encode`."""
    p = new_parser(
        "encode", "Write the vectors of a file's texts; a killed run resumes with the same command.",
        "runs/faq faq.csv --out faq.parquet", "my-encoder texts.jsonl.gz --out vectors.npy --column body --dimensions 256",
        "runs/faq queries.txt --out queries.npy --side query",
    )  # fmt: skip
    p.add_argument("model", metavar="MODEL", help="a run, a stage of it, an export or a base")
    p.add_argument(
        "file", metavar="FILE", help="a file, folder or glob: CSV, JSONL, Parquet, Excel, text; also compressed"
    )
    p.add_argument(
        "--out", required=True, metavar="FILE",
        help="a .parquet file keeps the columns; .npy and .safetensors have ids next to them",
    )  # fmt: skip
    p.add_argument(
        "--column", default="text", metavar="COLUMN",
        help="the field that holds the text (default: text, or a common name like it)",
    )  # fmt: skip
    p.add_argument("--id", metavar="COLUMN", help="the field that names a row (default: id or _id, if there is one)")
    p.add_argument("--columns", metavar="NAMES", help="fields to keep, separated by commas (default: all)")
    p.add_argument(
        "--vector-column", default="embedding", metavar="NAME",
        help="column of the vectors in a .parquet file (default: embedding)",
    )  # fmt: skip
    p.add_argument(
        "--side", choices=["document", "query"], default="document",
        help="whose instruction of the training precedes the texts (default: document)",
    )  # fmt: skip
    p.add_argument("--task", choices=list(TASKS), metavar="NAME", help="the instruction of a task, such as question-da")
    p.add_argument(
        "--instruction", metavar="TEXT", help="this instruction; '' for none (default: that of the training)"
    )
    p.add_argument("--dimensions", type=int, metavar="N", help="keep the first dimensions (default: all)")
    p.add_argument(
        "--empty", choices=["error", "zeros", "skip"], default="error",
        help="an empty text stops, gets a vector of zeros, or loses its row (default: error)",
    )  # fmt: skip
    p.add_argument("--adapter", action="append", default=[], metavar="NAME", help="a further adapter, merged in order")
    p.add_argument("--length", type=int, metavar="N", help="tokens of a text (default: the run's, or 512)")
    p.add_argument(
        "--batch-tokens", type=int, default=16384, metavar="N", help="tokens in one forward (default: 16384)"
    )
    p.add_argument(
        "--processes", type=int, metavar="N",
        help="processes on this machine (default: one for each GPU); several nodes: torchrun -m l2v encode",
    )  # fmt: skip
    add_loading(p)
    return p
