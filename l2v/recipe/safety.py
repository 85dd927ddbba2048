"""What a recipe may not hold: secrets, which would be written to every run's files, and paths that lead out of it.

A recipe is a file that people send each other, and all of it is kept in a run's stage.json.
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
    """Look at `key=value` before any message repeats it. Raises: RecipeError for a token or a login in it."""
    key, _, value = override.partition("=")
    last = key.strip().rsplit(".", 1)[-1]
    if last.lower() in TOKEN_KEYS:
        _refuse(f"{BY_HAND}: {key.strip()} is no key of a recipe")
    _look(value, f"{BY_HAND}: {key.strip()}")


def refuse_unsafe(tree: Any) -> None:
    """Look over a recipe as read, with its overrides: nodes with `value` and `where`.

    Raises: RecipeError for a token or a password anywhere (its value is not repeated), and for `name`, `out` or
    `zero.config` in a file that leave the folder in which training is started. An absolute path, and whatever stands on the
    command line, is the user's own word.
    """
    _secrets(tree, "")
    top = tree.value if isinstance(tree.value, dict) else {}
    name = top.get("name")
    if (
        name is not None
        and isinstance(name.value, str)
        and not re.fullmatch(r"[^/\\\0]*[^/\\\0.][^/\\\0]*", name.value)
    ):
        raise RecipeError(f"{name.where}: name '{name.value}' is to be the name of a folder; leave out / and \\")
    zero = top.get("zero")
    config = zero.value.get("config") if zero is not None and isinstance(zero.value, dict) else None
    for key, node in (("out", top.get("out")), ("zero.config", config)):
        if node is None or not isinstance(node.value, str) or node.where.startswith(BY_HAND):
            continue
        if ".." in re.split(r"[/\\]", node.value):
            raise RecipeError(
                f"{node.where}: {key} '{node.value}' leads out of the folder that training is started in; give an absolute "
                f"path, or {key}=... on the command line"
            )


def _secrets(node: Any, path: str) -> None:
    if isinstance(node.value, dict):
        for key, child in node.value.items():
            dotted = f"{path}.{key}" if path else key
            if key.lower() in TOKEN_KEYS:
                _refuse(f"{_place(child)}: {dotted} is no key of a recipe")
            _secrets(child, dotted)
    elif isinstance(node.value, list):
        for at, child in enumerate(node.value):
            _secrets(child, f"{path}[{at}]")
    elif isinstance(node.value, str):
        _look(node.value, f"{_place(node)}: {path}")


def _look(value: str, what: str) -> None:
    if TOKEN.search(value):
        _refuse(f"{what} holds a hub token")
    if LOGIN.search(value):
        raise RecipeError(f"{what} holds a login in its address; take it out, for a recipe is kept in a run's files")


def _refuse(what: str) -> None:
    raise RecipeError(
        f"{what}; tokens come from the environment alone: set HF_TOKEN (or WANDB_API_KEY), or run hf auth login once"
    )


def _place(node: Any) -> str:
    """Where it stands; of a command line, not the words of it."""
    return BY_HAND if node.where.startswith(BY_HAND) else node.where
