"""Which way the layers of a model look, measured: what moves a state, and what does not."""

from __future__ import annotations

import inspect
import re

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from l2v.model.small import depth_of, layers_of

TOLERANCE = 1e-5
"""fp32: the largest difference of two states that are to be the same, as a share of the largest state (at least 1)."""
CAUSAL = "base.attention: causal (attention='causal' in Python)"
MIXERS = r"Conv(?!1D)|Mamba|Mixer|Delta|Linear(Attention|Attn)|Lightning|Recurrent|SSM|LSTM|KDA"
"""Classes that carry states along a sequence without softmax attention."""


def alone(model: PreTrainedModel, ids: np.ndarray) -> torch.Tensor:
    """States [n, E] of one text as transformers itself computes them."""
    ids_1n = torch.from_numpy(ids)[None]
    takes_mask = "attention_mask" in inspect.signature(model.forward).parameters
    mask = {"attention_mask": torch.ones_like(ids_1n)} if takes_mask else {}
    return model(input_ids=ids_1n, **mask)[0][0]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, as a share of the largest state (at least 1); infinite for NaN."""
    found = ((a - b).abs().max() / b.abs().max().clamp(min=1.0)).item()
    return found if found == found else float("inf")


def last_changed(text: np.ndarray) -> np.ndarray:
    """The text with another last token."""
    out = text.copy()
    out[-1] = text[0] if len(text) > 1 and text[0] != text[-1] else text[-1] - 1
    return out


def direction(model: PreTrainedModel, texts: list[np.ndarray], causal: bool) -> tuple[str | None, tuple[str, ...]]:
    """Why the eager model does not look the way that was asked, or None; and layers that stay causal beside attention.

    Each layer is asked by itself: the last state of its input is moved, and the first of its output looked at.
    """
    long, short = texts[:2]
    behind = [_reach(model, ids) for ids in (short, long)]
    if causal:
        seen = behind[0].any() or behind[1].any()
        return (
            "its attention sees both ways in transformers, also where causal attention is asked for; use base.attention: "
            "bidirectional (attention='bidirectional')"
            if seen
            else None
        ), ()
    blind: list[str] = []
    causal_kinds: set[str] = set()
    depth = depth_of(model.config.get_text_config())
    for at, layer in enumerate(layers_of(model, depth) if depth else []):
        back, ahead = _layer_reach(model, layer, short)
        if back and not ahead:
            name = _mixer(layer, type(model).__name__.removesuffix("Model"))
            if name:
                causal_kinds.add(name)
            else:
                blind.append(f"layer {at} ({type(layer).__name__})")
    if blind:
        return (
            f"{blind[0]} lets no state see the tokens behind it, in transformers' own code; this architecture works with "
            f"{CAUSAL}"
        ), ()
    if not behind[0][0]:
        what = f": {', '.join(sorted(causal_kinds))} see only what came before" if causal_kinds else ""
        return f"its last token never moves the first state{what}; it works with {CAUSAL}", ()
    return None, tuple(sorted(causal_kinds))


def _reach(model: PreTrainedModel, ids: np.ndarray) -> torch.Tensor:
    """bool [n - 1]: which earlier states the last token moves."""
    a, b = (alone(model, x) for x in (ids, last_changed(ids)))
    return (a - b).abs().amax(-1)[:-1] > TOLERANCE * a.abs().max().clamp(min=1.0)


def _layer_reach(model: PreTrainedModel, layer: nn.Module, ids: np.ndarray) -> tuple[bool, bool]:
    """Whether, in one layer, the first state of the input moves later ones of the output, and the last moves the first."""
    seen: list[torch.Tensor] = []

    def run(moved: int | None) -> torch.Tensor:
        def before(_, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            if moved is not None:
                hidden = hidden.clone()
                hidden[:, moved] += torch.linspace(-1, 1, hidden.shape[-1])
            return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

        def after(_, __, out):
            seen.append(out if isinstance(out, torch.Tensor) else out[0])

        handles = layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)
        try:
            seen.clear()
            alone(model, ids)
        finally:
            for handle in handles:
                handle.remove()
        return seen[0][0]

    still, first, last = run(None), run(0), run(-1)
    return difference(first[1:], still[1:]) > TOLERANCE, difference(last[0], still[0]) > TOLERANCE


def _mixer(layer: nn.Module, family: str) -> str | None:
    """The class of a layer's convolution, recurrence or linear attention, if it has no softmax attention beside it."""
    names = [type(module).__name__ for module in layer.modules() if module is not layer]
    if any(re.search(r"Attention|Attn", name) and not re.search(r"Linear|Lightning|Delta", name) for name in names):
        return None
    return next((name for name in names if _carries(name, family)), None)


def _carries(name: str, family: str) -> bool:
    """Whether a class, by its name without that of the family, is one that carries states along a sequence."""
    return re.search(MIXERS, name.removeprefix(family)) is not None


def mixers(model: nn.Module) -> str:
    """The layers of a model that carry states along a sequence, for a message."""
    family = type(model).__name__.removesuffix("Model")
    found = {type(m).__name__ for m in model.modules() if type(m).__module__.startswith("transformers")}
    names = sorted(name for name in found if _carries(name, family) and not name.endswith("DecoderLayer"))
    return f"in {', '.join(names)}" if names else "in no layer that is known to carry it"
