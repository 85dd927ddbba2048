"""The arrows of the architecture: who may import whom, read off the source."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import training_environment

from l2v.commands import data, main

ROOT = Path(__file__).resolve().parents[1]
MAY = {
    "errors": set(),
    "recipe": {"errors"},
    "batch": set(),
    "files": set(),
    "cores": set(),
    "data": {"errors", "files", "recipe", "batch", "kernels"},
    "objectives": {"batch", "kernels"},
    "model": {"errors", "files", "recipe", "batch", "kernels", "data"},
    "machine": {"errors", "files", "model"},
    "doctor": {"errors", "package", "cores", "machine", "model", "kernels"},
    "training": {
        "errors",
        "cores",
        "recipe",
        "runs",
        "files",
        "batch",
        "data",
        "model",
        "objectives",
        "machine",
        "kernels",
    },
    "encoder": {"errors", "recipe", "batch", "data", "model", "runs"},
    "evaluation": {"data", "errors", "files", "recipe", "encoder", "runs"},
    "runs": {"errors", "files", "recipe", "model"},
    "tuning": {"errors", "package", "recipe", "model", "machine", "doctor", "runs"},
    "train": {"errors", "cores", "recipe", "runs", "data", "model", "training", "machine", "tuning", "plan"},
    "plan": {"errors", "recipe", "data", "model", "training", "machine"},
    "encoding": {"errors", "package", "files", "recipe", "data", "encoder", "training"},
    "search": {"errors", "files", "recipe", "batch", "data", "encoder", "encoding"},
    "quickstart": {"errors", "recipe", "data", "model", "encoder", "evaluation", "machine", "runs"},
    "report": {"errors", "package", "files", "recipe", "data", "encoder", "evaluation", "runs"},
    "push": {"errors", "model", "encoder", "runs", "report"},
    "formats": {"errors", "files", "data", "model", "encoder", "runs"},
    "serving": {"errors", "files", "recipe", "batch", "data", "model", "encoder", "runs", "formats"},
    "mining": {"errors", "files", "recipe", "data", "encoder", "encoding"},
    "synthesis": {"errors", "batch", "recipe", "data", "model", "encoder", "encoding", "mining"},
}


MAY["commands"] = {"package", *MAY} - {"kernels"}
MAY |= {"cli": {"commands"}, "__main__": {"commands"}}


def read(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def unit(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] == "l2v_kernels":
        return "kernels"
    return (parts[1] if len(parts) > 1 else "package") if parts[0] == "l2v" else None


def imports(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def files():
    for file in sorted((ROOT / "l2v").rglob("*.py")):
        relative = file.relative_to(ROOT / "l2v")
        name = relative.parts[0].removesuffix(".py")
        if name != "__init__":
            yield pytest.param(name, file, id=str(relative))


def forbidden(name: str, source: str) -> set[str]:
    """Units that a file of the unit `name` imports and may not."""
    return {unit(module) for module in imports(source)} - {None, name} - MAY[name]


def run_files_named(source: str) -> set[str]:
    """The names of a run folder's files that stand in the code (docstrings and comments may name them)."""
    tree = ast.parse(source)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    strings = (n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    text = " ".join(node.value for node in strings if id(node) not in prose)
    return {name for name in ("stage.json", "metrics.jsonl") if name in text}


def mains(source: str) -> list[str]:
    """Functions called `main`."""
    return [n.name for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef) and n.name == "main"]


@pytest.mark.parametrize(("name", "file"), files())
def test_no_arrow_points_back_up(name, file):
    assert not forbidden(name, read(file))


@pytest.mark.parametrize(("name", "file"), files())
def test_a_main_is_a_command_or_the_training_program(name, file):
    if name not in ("commands", "train"):
        assert not mains(read(file))


@pytest.mark.parametrize(("name", "file"), files())
def test_only_runs_names_the_files_of_a_run(name, file):
    if name != "runs":
        assert not run_files_named(read(file))


def test_a_breach_of_each_rule_is_found():
    assert forbidden("objectives", "from l2v.model.load import device") == {"model"}
    assert forbidden("recipe", "import l2v.encoder") == {"encoder"}
    assert mains("def main(argv=None):\n    return 0\n") == ["main"]
    assert run_files_named('path = folder / "stage.json"') == {"stage.json"}
    assert run_files_named('def f(x):\n    """Reads stage.json."""\n    return f"{x}/metrics.jsonl"') == {
        "metrics.jsonl"
    }


def test_every_verb_is_a_file_of_commands():
    verbs = {path.stem for path in (ROOT / "l2v" / "commands").glob("*.py")} - {"__init__", "main"}
    tools = {f"data_{tool}" for tool in data.TOOLS}
    assert verbs == set(main.COMMANDS) | tools | {"parser"} & verbs


def test_the_top_of_the_package_is_small():
    assert sum(path.is_file() for path in (ROOT / "l2v").iterdir()) <= 12


def test_the_model_knows_of_data_only_how_an_export_tokenises():
    for file in (ROOT / "l2v" / "model").glob("*.py"):
        data = {module for module in imports(read(file)) if module.startswith("l2v.data")}
        assert data <= ({"l2v.data.tokens"} if file.name.startswith("export") else set()), file.name


def test_there_is_no_circle():
    graphlib.TopologicalSorter(MAY).prepare()  # raises CycleError


def test_the_kernel_library_knows_nothing_of_l2v():
    for file in (ROOT / "kernels").rglob("*.py"):
        used = {module.split(".")[0] for module in imports(read(file))}
        assert "l2v" not in used, file
        if "integrations" not in file.parts:
            assert not used & {"transformers", "peft", "deepspeed", "datasets"}, file


def test_starting_the_launcher_loads_no_large_library():
    code = (
        "import sys, l2v.train; print(*{'torch', 'deepspeed', 'transformers', 'peft', 'datasets'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=training_environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
