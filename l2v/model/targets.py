"""Which linear layers of a base get an adapter: names, all of them, a regular expression, or those of its family."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from l2v.errors import RecipeError
from l2v.recipe import ALL_LINEAR, LLAMA_LINEARS, Lora

OWN_NAMES = {
    "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "codegen", "bloom", "mpt", "opt", "falcon",
    "bert", "roberta", "xlm-roberta", "camembert", "modernbert",
}  # fmt: skip
"""Families (model_type) that share no name with Llama's linears, and whose own stand for them in the default."""
ROUTERS = {"gate", "router", "shared_expert_gate"}
"""Linears that choose between experts; the default leaves them alone."""
WITHOUT_OUT_PROJ = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
"""Families whose mixers read the weight of out_proj past its module: PEFT refuses an adapter there."""


def resolve_targets(inner: PreTrainedModel, lora: Lora) -> list[str] | str:
    """lora.targets as PEFT's target_modules.

    The seven names of the Llama family, which are the default, stand for the family's linears in a base that has others. A
    base of the Llama family gets exactly these seven.

    Raises:
        RecipeError: a target matches no linear layer, or something else; the message names the linear layers that exist.
    """
    targets = list(lora.targets)
    linears = {name: module for name, module in inner.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    if targets == [ALL_LINEAR]:
        return ALL_LINEAR
    if lora.pattern is not None:
        return _matched(lora.pattern, inner, linears)
    missing = [target for target in targets if not any(_ends(name, target) for name in linears)]
    others = len(missing) < len(targets) or inner.config.model_type in OWN_NAMES
    if missing and others and set(targets) == set(LLAMA_LINEARS):
        return family_linears(inner)
    if missing:
        raise RecipeError(
            f"lora.targets: {', '.join(missing)} match no linear layer of this base; {_existing(linears)}"
        )
    return targets


def family_linears(inner: PreTrainedModel) -> list[str]:
    """The linear layers inside the base's repeated layers, by the end of their names; no routers of experts."""
    layers = max(
        (name for name, module in inner.named_modules() if isinstance(module, nn.ModuleList)),
        key=lambda name: sum(1 for _ in inner.get_submodule(name).modules()),
        default="",
    )
    inside: dict[str, None] = {}
    skipped = ROUTERS | ({"out_proj"} if inner.config.model_type in WITHOUT_OUT_PROJ else set())
    names = [name for name, module in inner.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    for name in names:
        leaf = name.rsplit(".", 1)[-1]
        if name.startswith(f"{layers}.") and leaf not in skipped:
            elsewhere = any(_ends(other, leaf) and not other.startswith(f"{layers}.") for other in names)
            # A pooler has a `dense` too: the parent's name tells them apart.
            inside[".".join(name.split(".")[-2:]) if elsewhere else leaf] = None
    return list(inside)


def check_patterns(inner: PreTrainedModel, lora: Lora, targets: list[str] | str) -> None:
    """Check that every key of rank_pattern and alpha_pattern is for a layer that gets an adapter; PEFT would only warn.

    targets: those of `resolve_targets`.

    Raises:
        RecipeError: one is not.
    """
    linears = [name for name, module in inner.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    if targets == ALL_LINEAR:
        trained = linears
    elif isinstance(targets, str):
        trained = [name for name in linears if re.fullmatch(targets, name)]
    else:
        trained = [name for name in linears if any(_ends(name, target) for target in targets)]
    for key, pattern in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for name in pattern:
            try:
                found = any(re.match(rf"(.*\.)?({name})$", layer) for layer in trained)
            except re.error as error:
                raise RecipeError(f"lora.{key}: '{name}' is no regular expression: {error}") from None
            if not found:
                raise RecipeError(
                    f"lora.{key}: '{name}' is for no layer that gets an adapter; those are {', '.join(_leaves(trained))}"
                )


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _matched(pattern: str, inner: PreTrainedModel, linears: dict[str, Any]) -> str:
    try:
        found = [name for name, _ in inner.named_modules() if re.fullmatch(pattern, name)]
    except re.error as error:
        raise RecipeError(f"lora.targets: '{pattern}' is no regular expression: {error}") from None
    if not found:
        raise RecipeError(
            f"lora.targets: the regular expression '{pattern}' matches no layer of this base, whose names are like "
            f"{next(iter(linears), 'none')}; {_existing(linears)}"
        )
    if strange := [name for name in found if name not in linears]:
        kind = type(inner.get_submodule(strange[0])).__name__
        raise RecipeError(
            f"lora.targets: the regular expression '{pattern}' matches {strange[0] or 'the whole model'} ({kind}), which is no "
            f"linear layer; {_existing(linears)}"
        )
    return pattern


def _leaves(names: Iterable[str]) -> Sequence[str]:
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))


def _existing(linears: Iterable[str]) -> str:
    return f"it has {', '.join(_leaves(linears)) or 'none'} ({ALL_LINEAR} means all of them)"
