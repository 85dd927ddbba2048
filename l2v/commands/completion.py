"""`l2v completion bash|zsh`: completion of the command line, written out from the parsers of all verbs.

A script instead of a hook: a hook would start Python, and import torch, at every Tab.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
from collections.abc import Iterator, Sequence

from l2v.commands.data import TOOLS
from l2v.commands.parser import new_parser
from l2v.data.corpus.config import config_folder
from l2v.recipe.shipped import recipe_folder

SHELLS = ("bash", "zsh")
SCRIPT = """\
# Completion of l2v. In ~/.bashrc or ~/.zshrc: source FILE
{prepare}_l2v() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} verb=${{COMP_WORDS[1]}}
    local words="" options=""
    if [ "$verb" = data ] && [ "$COMP_CWORD" -gt 2 ]; then
        verb="data ${{COMP_WORDS[2]}}"
    fi
    if [ "$COMP_CWORD" -eq 1 ]; then
        words={verbs}
    elif [ "$verb" = data ]; then
        words={tools}
    else
        case "$verb $before" in
{values}
        *)
            case "$verb" in
{arguments}
            esac ;;
        esac
    fi
    case "$word" in
    -*) words=$options ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _l2v l2v
"""
"""If no word matches, the shell completes file names (`-o default`)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the script."""
    print(script(parser().parse_args(argv).shell), end="")
    return 0


def parser() -> argparse.ArgumentParser:
    """The arguments of `l2v completion`."""
    p = new_parser(
        "completion", "Print the script that completes commands, options and recipes; source it where your shell starts.",
        "bash > ~/.l2v-completion && echo 'source ~/.l2v-completion' >> ~/.bashrc",
    )  # fmt: skip
    p.add_argument("shell", choices=SHELLS, help="zsh runs the bash script with bashcompinit")
    return p


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every verb, a tool of `l2v data` as `data TOOL`, with its parser."""
    from l2v.commands.main import COMMANDS

    for verb, (module, _) in COMMANDS.items():
        if verb == "data":
            yield from ((f"data {t}", importlib.import_module(f"l2v.commands.data_{t}").parser()) for t in TOOLS)
        else:
            yield verb, importlib.import_module(module).parser()


def script(shell: str) -> str:
    """The script for a shell."""
    from l2v.commands.main import COMMANDS

    named = {
        "RECIPE": [path.stem for path in sorted(recipe_folder().glob("*.yaml"))],
        "CONFIG": [path.stem for path in sorted(config_folder().glob("*.yaml"))],
    }
    values: list[str] = []
    arguments: list[str] = []
    for verb, own in parsers():
        after: dict[str, list[str]] = {}  # choices of a value, and the options that accept them
        words: list[str] = []
        for action in own._actions:
            choices = " ".join(map(str, action.choices or ()))
            if not action.option_strings:
                words += choices.split() or named.get(str(action.metavar), [])
            elif action.nargs != 0:
                after.setdefault(choices, []).extend(f"{verb} {option}" for option in action.option_strings)
        shown = [action for action in own._actions if action.help != argparse.SUPPRESS]
        options = " ".join(option for action in shown for option in action.option_strings)
        for choices, patterns in after.items():
            values.append(f"        {'|'.join(map(shlex.quote, patterns))}) words={shlex.quote(choices)} ;;")
        arguments.append(
            f"            {shlex.quote(verb)}) words={shlex.quote(' '.join(words))} options={shlex.quote(options)} ;;"
        )
    return SCRIPT.format(
        prepare="autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else "",
        verbs=shlex.quote(" ".join(COMMANDS)),
        tools=shlex.quote(" ".join(TOOLS)),
        values="\n".join(values),
        arguments="\n".join(arguments),
    )
