"""The environment variables that the repository reads or sets, found in its source."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from support.processes import ROOT

NAME = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*_?")
FOLDERS = ("l2v", "kernels", "launch", "benchmarks", "tests", "docs/site", "examples")
SHELL = ("launch/**/*.sh", "launch/**/*.sbatch", "benchmarks/*.sh", "tests/*.sh")


def python_names(source: str) -> set[str]:
    """Names in `os.environ[X]`, `.get(X)`, `.setdefault(X)`, `.pop(X)`, `X in os.environ` and `os.getenv(X)`.

    X may be a string or a constant of the module. Test's `monkeypatch.setenv` counts where the code reads it, not here.
    """
    tree = ast.parse(source)
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }

    def is_environ(node: ast.AST) -> bool:
        return isinstance(node, ast.Attribute) and node.attr == "environ"

    def keys() -> Iterator[ast.AST]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Subscript) and is_environ(node.value):
                yield node.slice
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                if is_environ(node.func.value) or node.func.attr == "getenv":
                    yield node.args[0]
            elif isinstance(node, ast.Compare) and any(is_environ(right) for right in node.comparators):
                yield node.left

    found = set()
    for key in keys():
        value = constants.get(key.id) if isinstance(key, ast.Name) else getattr(key, "value", None)
        if isinstance(value, str) and NAME.fullmatch(value):
            found.add(value)
    return found


def shell_names(text: str) -> set[str]:
    """Names that a script takes from outside: `${X:-default}`, `${X:?complaint}`, `${X:+if set}`."""
    return set(re.findall(r"\$\{([A-Z][A-Z0-9_]*):?[-?+]", text))


def makefile_names(text: str) -> set[str]:
    """Names that `make NAME=value` or the environment may set: `X ?=`, and those that are used and never set."""
    used, given = set(re.findall(r"\$\(([A-Z_]+)\)", text)), set(re.findall(r"^([A-Z_]+) :=", text, re.MULTILINE))
    own = {"CURDIR", "MAKE", "MAKEFILE_LIST", "SHELL"}  # which make sets
    return set(re.findall(r"^([A-Z_]+) \?=", text, re.MULTILINE)) | (used - given - own)


def read_names() -> dict[str, list[str]]:
    """Every variable that the repository reads, with the files that do."""
    out: dict[str, list[str]] = {}

    def add(file: Path, names: set[str]) -> None:
        for name in names:
            out.setdefault(name, []).append(str(file.relative_to(ROOT)))

    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            add(file, python_names(file.read_text(encoding="utf-8")))
    for pattern in SHELL:
        for file in sorted(ROOT.glob(pattern)):
            add(file, shell_names(file.read_text(encoding="utf-8")))
    add(ROOT / "Makefile", makefile_names((ROOT / "Makefile").read_text(encoding="utf-8")))
    return out
