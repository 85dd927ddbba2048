"""The config.json of an export: its direction in the words of every reader, and a guard against those that would ignore it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from l2v.model.settings import by_flag, flagged, has_flag

TOO_OLD = (
    "This text encoder needs transformers 5.2 or newer (pip install 'transformers>=5.2'); older ones ignore is_causal and "
    "rope_parameters and would give other vectors"
)
"""What versions before 5 show instead of loading the export causally; they cut it after 200 characters."""

GUARD: dict[str, Any] = {"pruned_heads": {TOO_OLD: []}}
"""A key that transformers 3 and 4 turn into whole numbers as they read a configuration, so that they fail and show its text.
transformers 5 has no such key, and neither have the other engines."""

Keys = dict[str, Any]
"""Keys of config.json; None removes one."""


def direction_keys(config: PretrainedConfig, *, causal: bool) -> list[Keys]:
    """How config.json can state the direction, most widely read first; `l2v.model.export_proof.settle` takes what it can prove.

    transformers from 5.2 and vLLM read `is_causal`, Text Embeddings Inference reads `use_bidirectional_attention`. A family whose
    configuration in transformers has the second key (Gemma) gives it a meaning of its own: in Gemma 3 it halves the window of
    local layers, and both keys together make a third window. There the keys are those by which the model was loaded
    (`l2v.model.settings.state_direction`).
    """
    if causal:
        return [{"is_causal": True}]
    text = config.get_text_config()
    if flagged(text):
        return [{"is_causal": None if by_flag(text) else False, "use_bidirectional_attention": True}]
    if has_flag(text):
        return [{"is_causal": False}]
    if hasattr(type(text), "use_bidirectional_attention"):
        return [{"is_causal": None, "use_bidirectional_attention": True}, {"is_causal": False}]
    return [{"is_causal": False, "use_bidirectional_attention": True}]


def window_keys(config: PretrainedConfig) -> Keys:
    """The window of a Gemma 3 with its flag as a file states it, whatever the version of transformers writes: without the
    conversion back, each save would halve it once more.
    """
    text = config.get_text_config()
    return {"sliding_window": 2 * (text.sliding_window - 1)} if flagged(text) else {}


def complete_config(folder: Path, keys: Keys) -> None:
    """Add to the config.json in `folder` what transformers does not write: `keys`, the older name of the rotary base, the
    guard.
    """
    file = folder / "config.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    for part in (facts, facts.get("text_config")):
        if isinstance(part, dict):
            part |= {**_older_rotary(part), **_older_gemma3(part), **keys}
            for key in [key for key, value in keys.items() if value is None]:
                del part[key]
    facts |= GUARD
    file.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


GEMMA3_PATTERN = "_sliding_window_pattern"


def _older_gemma3(facts: dict[str, Any]) -> Keys:
    """Gemma 3 as transformers 4 named it: both rotary bases, and every which layer sees the whole text. Text Embeddings Inference
    requires them. transformers 5 writes the last one as 6 whatever the layers are, so it is removed where no number is right.
    """
    found = facts.get("rope_parameters")
    if facts.get("model_type") != "gemma3_text" or not isinstance(found, dict):
        return {}
    facts.pop(GEMMA3_PATTERN, None)
    kinds = facts["layer_types"]
    step = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
    regular = ["full_attention" if at % step == 0 else "sliding_attention" for at in range(1, len(kinds) + 1)]
    return {
        "rope_theta": found["full_attention"]["rope_theta"],
        "rope_local_base_freq": found["sliding_attention"]["rope_theta"],
    } | ({GEMMA3_PATTERN: step} if kinds == regular else {})


def _older_rotary(facts: dict[str, Any]) -> Keys:
    """rope_theta and rope_scaling, as transformers 4 named them: Text Embeddings Inference requires the first."""
    found = facts.get("rope_parameters")
    if not isinstance(found, dict) or "rope_theta" not in found:
        return {}  # none, or one for each kind of layer
    scaled = found.get("rope_type", "default") != "default"
    return {"rope_theta": found["rope_theta"]} | ({"rope_scaling": found} if scaled else {})
