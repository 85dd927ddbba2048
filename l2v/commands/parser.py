"""One style of help for every verb: one line on what it does, its arguments, an example."""

from __future__ import annotations

import argparse
import shlex
import shutil
from collections.abc import Mapping, Sequence


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Lines of at most 98 columns; arguments in a column of 28."""

    def __init__(self, prog: str) -> None:
        width = min(100, shutil.get_terminal_size().columns) - 2
        super().__init__(prog, max_help_position=28, width=width)


def new_parser(verb: str, does: str, *examples: str) -> argparse.ArgumentParser:
    """A parser of `l2v VERB`. does: one sentence; examples: command lines without `l2v VERB`."""
    epilog = _examples(f"l2v {verb}", examples)
    return argparse.ArgumentParser(prog=f"l2v {verb}", description=does, epilog=epilog, formatter_class=Formatter)


def dispatcher_help(
    verb: str, does: str, kind: str, names: Mapping[str, str], examples: Sequence[str],
    options: Mapping[str, str] | None = None,
) -> str:  # fmt: skip
    """The help of a command that dispatches to one of `names`; verb: empty for l2v itself."""
    prog = f"l2v {verb}".rstrip()
    parts = [f"usage: {prog} {kind.upper()} ...", does, f"{kind}s:\n{_table(names)}"]
    parts += [f"options:\n{_table(options)}"] if options else []
    parts += [_examples(prog, examples), f"{prog} {kind.upper()} --help lists the arguments of one."]
    return "\n\n".join(parts)


def _examples(prog: str, examples: Sequence[str]) -> str:
    return "\n".join([f"example{'s' if len(examples) > 1 else ''}:", *(f"  {prog} {example}" for example in examples)])


def _table(rows: Mapping[str, str]) -> str:
    width = max(map(len, rows)) + 2
    return "\n".join(f"  {name:<{width}}{text}" for name, text in rows.items())


def next_step(*commands: str) -> str:
    """The last line of a verb: what to do with its result. commands: alternatives, each a command line of l2v."""
    return f"Next: {'; or '.join(commands)}"


def quoted(*words: object) -> str:
    """Words as a shell reads them."""
    return shlex.join(map(str, words))


def add_loading(parser: argparse.ArgumentParser, *, precision: bool = True) -> None:
    """Options of a command that loads an encoder: `--trust-remote-code`, and `--precision` where it can be chosen."""
    if precision:
        parser.add_argument(
            "--precision", choices=["auto", "bf16", "fp32"],
            help="of weights and arithmetic; auto is bf16 on a GPU and fp32 on a CPU (default: the run's)",
        )  # fmt: skip
    parser.add_argument(
        "--trust-remote-code", action="store_true",
        help="run the code that comes with a base; read it first, because it can do all that you can",
    )  # fmt: skip
