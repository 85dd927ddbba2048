"""What a recipe must not contain: secrets, which would end up in every run's files, paths outside the run's folder, and leave
to run the code that comes with a model.

People share recipes, and a run's stage.json keeps the whole recipe.
"""

from __future__ import annotations

import re
from typing import Any

from l2v.errors import RecipeError

TOKEN_KEYS = {
    "token", "hf_token", "hub_token", "auth_token", "access_token", "use_auth_token", "api_key", "wandb_api_key", "password",
}  # fmt: skip
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
LOGIN = re.compile(r"://[^/@\s]+@")
BY_HAND = "command line"


def refuse_secret(override: str) -> None:
    """Check `key=value` before any message repeats it.

    Raises:
        RecipeError: if it contains a token or a login.
    """
    key, _, value = override.partition("=")
    last = key.strip().rsplit(".", 1)[-1]
    if last.lower() in TOKEN_KEYS:
        _refuse(f"{BY_HAND}: {key.strip()} is not a key of a recipe")
    _look(value, f"{BY_HAND}: {key.strip()}")


def refuse_unsafe(tree: Any) -> None:
    """Check a recipe as read, with its overrides: nodes with `value` and `where`.

    Absolute paths and values from the command line are the user's choice and are accepted.

    Raises:
        RecipeError: for a token or a password anywhere (its value is not repeated), and for `name`, `out` or `zero.config`
            in a file that lead out of the working directory.
    """
    _secrets(tree, "")
    top = tree.value if isinstance(tree.value, dict) else {}
    name = top.get("name")
    if (
        name is not None
        and isinstance(name.value, str)
        and not re.fullmatch(r"[^/\\\0]*[^/\\\0.][^/\\\0]*", name.value)
    ):
        raise RecipeError(f"{name.where}: name '{name.value}' becomes the name of a folder; do not use / and \\")
    zero = top.get("zero")
    config = zero.value.get("config") if zero is not None and isinstance(zero.value, dict) else None
    for key, node in (("out", top.get("out")), ("zero.config", config)):
        if node is None or not isinstance(node.value, str) or node.where.startswith(BY_HAND):
            continue
        if ".." in re.split(r"[/\\]", node.value):
            raise RecipeError(
                f"{node.where}: {key} '{node.value}' leads out of the working directory; give an absolute "
                f"path, or {key}=... on the command line"
            )


def refuse_code(tree: Any) -> None:
    """Check that `base.trust_remote_code: true` comes from the command line: a recipe file may have come from anyone.

    Raises:
        RecipeError: if a file says it.
    """
    base = tree.value.get("base") if isinstance(tree.value, dict) else None
    keys = base.value if base is not None and isinstance(base.value, dict) else {}
    node, model = keys.get("trust_remote_code"), keys.get("model")
    if node is None or node.value is not True or node.where.startswith(BY_HAND):
        return
    raise RecipeError(
        f"{node.where}: base.trust_remote_code: true would run the code that comes with "
        f"'{model.value if model else '?'}', and a file cannot allow that; read the code, then add "
        "base.trust_remote_code=true to the command line"
    )


def code_refused(model: str, auto_map: Any) -> str:
    """The sentence on a model that needs code of a repository, which nobody allowed to run.

    auto_map: of its configuration: classes as `file.Class`, or `repository--file.Class` of another repository.
    """
    classes = [name for entry in (auto_map or {}).values() for name in (entry if isinstance(entry, list) else [entry])]
    sources = dict.fromkeys(name.split("--")[0] if "--" in name else model for name in classes if name) or {model: None}
    named = " and ".join(f"'{source}'" for source in sources)
    return (
        f"'{model}' needs the code that comes with {named}, and l2v does not run it unasked; read it, then allow it with "
        "--trust-remote-code (in Python: trust_remote_code=True; for l2v train: base.trust_remote_code=true)"
    )


def needs_code(error: BaseException) -> bool:
    """Whether transformers failed because code of a repository was not allowed to run."""
    return "custom code" in str(error) and "trust_remote_code" in str(error)


def _secrets(node: Any, path: str) -> None:
    if isinstance(node.value, dict):
        for key, child in node.value.items():
            dotted = f"{path}.{key}" if path else key
            if key.lower() in TOKEN_KEYS:
                _refuse(f"{_place(child)}: {dotted} is not a key of a recipe")
            _secrets(child, dotted)
    elif isinstance(node.value, list):
        for at, child in enumerate(node.value):
            _secrets(child, f"{path}[{at}]")
    elif isinstance(node.value, str):
        _look(node.value, f"{_place(node)}: {path}")


def _look(value: str, what: str) -> None:
    if TOKEN.search(value):
        _refuse(f"{what} contains a hub token")
    if LOGIN.search(value):
        raise RecipeError(f"{what} contains a login in its address; remove it, because a run's files keep the recipe")


def _refuse(what: str) -> None:
    raise RecipeError(
        f"{what}; tokens must come from the environment: set HF_TOKEN (or WANDB_API_KEY), or run hf auth login once"
    )


def _place(node: Any) -> str:
    """The location of a node; for the command line without its text."""
    return BY_HAND if node.where.startswith(BY_HAND) else node.where
