"""The command line's help: one style for every verb, examples that parse, and the script that completes it."""

import re
import shlex
import subprocess

import pytest

from l2v.commands import completion, main

PARSERS = dict(completion.parsers())


def examples(text):
    return [line.strip() for line in text.splitlines() if line.startswith("  l2v ")]


def test_every_verb_has_a_parser():
    assert {verb.split()[0] for verb in PARSERS} == set(main.COMMANDS)


@pytest.mark.parametrize("verb", PARSERS)
def test_one_style(verb):
    parser = PARSERS[verb]
    assert parser.prog == f"l2v {verb}"
    assert re.fullmatch(r"[A-Z][^\n]{20,118}\.", parser.description)
    assert re.match(r"examples?:\n", parser.epilog) and examples(parser.epilog)
    for action in parser._actions:
        assert action.help, action
        if action.help == "==SUPPRESS==" or action.nargs == 0:
            continue
        assert re.match(r"[^A-Z]|[A-Z]{2}|Gb/s", action.help) and not action.help.endswith("."), action.help
        default = action.default not in (None, False, "==SUPPRESS==", []) and action.option_strings
        assert not default or "(default: " in action.help, action.help
        if action.choices is None:
            names = action.metavar if isinstance(action.metavar, tuple) else (action.metavar,)
            assert all(name and re.fullmatch(r"[A-Z=]+|bm25\|none\|MODEL", name) for name in names), action


@pytest.mark.parametrize("verb", PARSERS)
def test_examples_parse(verb):
    for line in examples(PARSERS[verb].epilog):
        command = shlex.split(re.split(r" > | && ", line)[0])
        arguments = command[1 + len(verb.split()) :]
        parse = PARSERS[verb].parse_intermixed_args if verb != "bench" else PARSERS[verb].parse_args
        parse(arguments)


@pytest.mark.parametrize(
    "words",
    [["--help"], [], ["data", "--help"], ["data"], ["bench"], ["bench", "-h"], ["search", "--help"]],
    ids=" ".join,
)
def test_help_is_printed(words, capsys):
    try:
        code = main.main(words)
    except SystemExit as stopped:
        code = stopped.code
    printed = capsys.readouterr().out
    assert code == 0 and printed.startswith("usage: l2v ") and examples(printed)
    assert max(map(len, printed.splitlines())) <= 100
    if words in ([], ["--help"]):
        assert all(re.search(rf"^  {verb} ", printed, re.MULTILINE) for verb in main.COMMANDS)


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    file = tmp_path_factory.mktemp("completion") / "l2v"
    file.write_text(completion.script("bash"), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("tr", "train"),
        ("train --re", "--restarts"),
        ("train llama3-8b-d", "llama3-8b-da"),
        ("train --stage ", ""),
        ("train --local", ""),
        ("data ", "build check mine synthesize"),
        ("data build debian-da-", "debian-da-documents"),
        ("data mine --by bm", "bm25"),
        ("eval --pooling l", "last"),
        ("bench att", "attention"),
        ("init ", ""),
        ("nothing ", ""),
    ],
)
def test_completion(script, line, found):
    words = ["l2v", *line.split(" ")]
    code = f'source {script}; COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; _l2v; echo "${{COMPREPLY[@]}}"'
    out = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert (out.stdout.strip(), out.stderr) == (found, "")


def test_zsh_runs_the_same_script():
    assert completion.script("zsh").replace("autoload -U +X bashcompinit && bashcompinit\n", "") == completion.script(
        "bash"
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["dta"], "unknown command 'dta'"),
        (
            ["data", "chek"],
            "l2v data has no tool 'chek'; choose one of build, check, mine, synthesize; did you mean check?",
        ),
        (["bench", "atention"], "l2v bench has no benchmark 'atention'; choose one of attention, contrastive,"),
    ],
)
def test_an_unknown_name_is_an_error(words, says, capsys):
    assert main.main(words) == 2
    assert says in capsys.readouterr().err
