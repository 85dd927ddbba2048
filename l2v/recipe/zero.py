"""DeepSpeed configurations: a file, or a shipped one by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from l2v.errors import RecipeError
from l2v.recipe.shipped import shipped_folder


def find_config(name: str) -> Path:
    """A path as given, or the file of a name like zero3-offload.

    Raises:
        RecipeError: with the known names.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_folder("deepspeed") / f"{name}.json"
    if Path(name).name == name and shipped.is_file():
        return shipped
    known = ", ".join(sorted(path.stem for path in shipped_folder("deepspeed").glob("*.json")))
    raise RecipeError(f"zero.config: {name} not found; give a DeepSpeed JSON file or one of {known}")


def read_config(file: Path) -> dict[str, Any]:
    """The content of the file.

    Raises:
        RecipeError: with the line that is not JSON.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise RecipeError(f"{file}:{error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization", {}), dict):
        raise RecipeError(f"{file}: a DeepSpeed configuration is a JSON object, and so is its zero_optimization")
    return config
