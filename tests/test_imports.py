"""The arrows of the architecture: who may import whom, read off the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY = {
    "errors": set(),
    "recipe": {"errors"},
    "batch": set(),
    "files": set(),
    "data": {"errors", "recipe", "batch", "kernels"},
    "objectives": {"batch", "kernels"},
    "model": {"errors", "recipe", "batch", "kernels", "data"},
    "machine": {"errors", "model"},
    "doctor": {"errors", "package", "machine", "model", "kernels"},
    "training": {
        "errors",
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
    "evaluation": {"errors", "encoder", "runs"},
    "runs": {"errors", "files", "recipe", "model"},
    "tuning": {"errors", "package", "recipe", "model", "machine", "doctor", "runs"},
    "train": {"errors", "recipe", "model", "training", "machine", "tuning"},
    "plan": {"errors", "recipe", "data", "model", "training", "machine"},
    "commands": {"errors", "recipe", "data", "model"},
    "search": {"errors", "recipe", "batch", "data", "encoder"},
    "quickstart": {"errors", "recipe", "data", "model", "encoder", "evaluation", "machine", "runs"},
    "eval_cli": {"errors", "evaluation", "runs"},
    "export_cli": {"encoder"},
    "report": {"errors", "package", "files", "data", "encoder", "evaluation", "runs"},
    "push": {"errors", "model", "encoder", "runs"},
    "recipes_cli": {"recipe"},
    "mining": {"errors", "files", "recipe", "data", "encoder"},
    "synthesis": {"errors", "batch", "recipe", "data", "model", "encoder", "mining"},
    "data_cli": {"errors"},
    "bench_cli": {"errors"},
    "cli": {"errors", "package"},
}


def unit(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] == "l2v_kernels":
        return "kernels"
    return (parts[1] if len(parts) > 1 else "package") if parts[0] == "l2v" else None


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
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


@pytest.mark.parametrize(("name", "file"), files())
def test_no_arrow_points_back_up(name, file):
    used = {unit(module) for module in imports(file)} - {None, name}
    assert used <= MAY[name], f"{file.name} imports {used - MAY[name]}"


def test_the_model_knows_of_data_only_how_an_export_tokenises():
    for file in (ROOT / "l2v" / "model").glob("*.py"):
        data = {module for module in imports(file) if module.startswith("l2v.data")}
        assert data <= ({"l2v.data.tokens"} if file.name == "export.py" else set()), file.name


def test_there_is_no_circle():
    def below(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"circle: {' -> '.join((*above, name))}"
        for other in MAY.get(name, set()) - {"kernels", "package"}:
            below(other, (*above, name))

    for name in MAY:
        below(name, ())


def test_the_kernel_library_knows_nothing_of_l2v():
    for file in (ROOT / "kernels").rglob("*.py"):
        used = {module.split(".")[0] for module in imports(file)}
        assert "l2v" not in used, file
        if "integrations" not in file.parts:
            assert not used & {"transformers", "peft", "deepspeed", "datasets"}, file
