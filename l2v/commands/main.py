"""The command `l2v`."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from l2v import __version__
from l2v.commands.parser import dispatcher_help
from l2v.cores import choose, may_have_gpu
from l2v.errors import Notice, UserError

COMMANDS = {
    "init": ("l2v.commands.init", "write a commented recipe for your own data"),
    "train": ("l2v.commands.train", "train the stages of a recipe under DeepSpeed"),
    "plan": ("l2v.commands.plan", "memory and time that a recipe will take, before anything is downloaded"),
    "tune": ("l2v.commands.tune", "find the fastest micro-batch and recompute on this machine"),
    "base": ("l2v.commands.base", "fetch a small base that needs no hub, and say its terms"),
    "doctor": ("l2v.commands.doctor", "what runs on this machine, why the rest does not, and how fast it is"),
    "quickstart": ("l2v.commands.quickstart", "the whole recipe on the embedded model and Danish sample"),
    "eval": ("l2v.commands.eval", "score encoders: SEB's Danish tasks, any task of mteb, your own files"),
    "report": ("l2v.commands.report", "one HTML page about runs: curves, scores, speed, lineage, data"),
    "encode": ("l2v.commands.encode", "vectors of a whole file: resumable, over processes, GPUs and nodes"),
    "search": ("l2v.commands.search", "semantic search with a trained encoder"),
    "serve": ("l2v.commands.serve", "vectors over HTTP with OpenAI's interface"),
    "bench": ("l2v.commands.bench", "microbenchmarks of the kernels (in a checkout)"),
    "data": ("l2v.commands.data", "build a data set from raw text, check one, mine hard negatives, make queries"),
    "export": ("l2v.commands.export", "write a merged encoder for transformers and sentence-transformers"),
    "verify": ("l2v.commands.verify", "compare an export in every engine that is installed with l2v"),
    "quantize": ("l2v.commands.quantize", "what int8, binary and shorter vectors lose, as a table and a picture"),
    "push": ("l2v.commands.push", "publish an encoder, its adapters or a data set on the Hub, with a card"),
    "recipes": ("l2v.commands.recipes", "list the shipped recipes, or print one"),
    "completion": ("l2v.commands.completion", "print the script that completes l2v in bash or zsh"),
}


_python_format = warnings.formatwarning


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch to a subcommand; a user error is one sentence and an exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].startswith("--local_rank="):  # the deepspeed launcher's own, before the verb
        del argv[0]
    if argv and argv[0] in ("-V", "--version"):
        print(f"l2v {__version__}")
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text())
        return 0
    if argv[0] not in COMMANDS:
        print(f"l2v: unknown command '{argv[0]}'; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    quiet_libraries(bars=argv[0] == "push", reading=argv[0] in ("train", "quickstart"))
    warnings.formatwarning = _format
    # Training divides the cores among the processes that it starts.
    choose(threads=argv[0] not in ("train", "tune") and not may_have_gpu())
    try:
        return importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:])
    except UserError as error:
        print(f"l2v: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("l2v: stopped", file=sys.stderr)
        return 1


def help_text() -> str:
    """The text of `l2v --help`."""
    commands = {name: text for name, (_, text) in COMMANDS.items()}
    options = {"-h, --help": "show this help message and exit", "-V, --version": "show the version and exit"}
    does = "Turn decoder language models into text encoders, first of all for Danish."
    return dispatcher_help("", does, "command", commands, ["quickstart", "train llama3-8b-da"], options)


def quiet_libraries(bars: bool = False, reading: bool = False) -> None:
    """Silence progress bars and warnings of libraries unless the user asked for them.

    bars: keep huggingface_hub's progress bars. reading: keep those of `datasets`, which reads the whole data in training.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)  # for their developers; raised from many modules
    if not reading:
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not bars:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not may_have_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found none


def _format(message: Warning | str, category: type[Warning], *place: Any, **line: Any) -> str:
    """A `Notice` is one line for the user; other warnings keep their form, with file and line."""
    return f"l2v: {message}\n" if issubclass(category, Notice) else _python_format(message, category, *place, **line)


if __name__ == "__main__":
    sys.exit(main())
