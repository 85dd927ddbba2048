"""The shape of a base without downloading it: from the recipe, a folder, the hub's cache, or a table of known names."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from l2v.errors import UserError
from l2v.model.embedded import EMBEDDED, GEMMA, SMOLLM2, converted_folder
from l2v.model.load import load_config
from l2v.recipe import Base

KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def _llama(*sizes: int, tied: bool = False, **more: Any) -> dict[str, Any]:
    return {"model_type": "llama"} | dict(zip(KEYS, sizes, strict=True)) | {"tie_word_embeddings": tied} | more


def _qwen(family: str, *sizes: int, tied: bool = False) -> dict[str, Any]:
    head = {"head_dim": 128} if family == "qwen3" else {}
    return _llama(*sizes, tied=tied) | {"model_type": family} | head


LLAMA3_8B = _llama(4096, 14336, 32, 32, 8, 128256)
KNOWN: dict[str, dict[str, Any]] = {
    r"meta-llama/Meta-Llama-3(\.1)?-8B(-Instruct)?|meta-llama/Llama-3\.1-8B(-Instruct)?": LLAMA3_8B,
    r"AI-Sweden-Models/Llama-3-8B(-instruct)?": LLAMA3_8B,
    r"meta-llama/Llama-3\.2-1B(-Instruct)?": _llama(2048, 8192, 16, 32, 8, 128256, tied=True, head_dim=64),
    r"meta-llama/Llama-3\.2-3B(-Instruct)?": _llama(3072, 8192, 28, 24, 8, 128256, tied=True, head_dim=128),
    r"meta-llama/(Meta-)?Llama-3(\.[13])?-70B(-Instruct)?": _llama(8192, 28672, 80, 64, 8, 128256),
    r"meta-llama/Llama-2-7b(-chat)?-hf": _llama(4096, 11008, 32, 32, 32, 32000),
    r"mistralai/Mistral-7B(-Instruct)?-v0\.[12]": _llama(4096, 14336, 32, 32, 8, 32000) | {"model_type": "mistral"},
    r"mistralai/Mistral-7B(-Instruct)?-v0\.3": _llama(4096, 14336, 32, 32, 8, 32768) | {"model_type": "mistral"},
    r"Qwen/Qwen2(\.5)?-0\.5B(-Instruct)?": _qwen("qwen2", 896, 4864, 24, 14, 2, 151936, tied=True),
    r"Qwen/Qwen2(\.5)?-1\.5B(-Instruct)?": _qwen("qwen2", 1536, 8960, 28, 12, 2, 151936, tied=True),
    r"Qwen/Qwen2\.5-3B(-Instruct)?": _qwen("qwen2", 2048, 11008, 36, 16, 2, 151936, tied=True),
    r"Qwen/Qwen2(\.5)?-7B(-Instruct)?": _qwen("qwen2", 3584, 18944, 28, 28, 4, 152064),
    r"Qwen/Qwen2\.5-14B(-Instruct)?": _qwen("qwen2", 5120, 13824, 48, 40, 8, 152064),
    r"Qwen/Qwen3-0\.6B(-Base)?": _qwen("qwen3", 1024, 3072, 28, 16, 8, 151936, tied=True),
    r"Qwen/Qwen3-1\.7B(-Base)?": _qwen("qwen3", 2048, 6144, 28, 16, 8, 151936, tied=True),
    r"Qwen/Qwen3-4B(-Base)?": _qwen("qwen3", 2560, 9728, 36, 32, 8, 151936, tied=True),
    r"Qwen/Qwen3-8B(-Base)?": _qwen("qwen3", 4096, 12288, 36, 32, 8, 151936),
    r"Qwen/Qwen3-14B(-Base)?": _qwen("qwen3", 5120, 17408, 40, 40, 8, 151936),
    SMOLLM2: _llama(576, 1536, 30, 9, 3, 49152, tied=True),
    rf"{GEMMA}|google/gemma-3-270m(-it)?": _llama(640, 2048, 18, 4, 1, 262144, tied=True, head_dim=256)
    | {"model_type": "gemma3_text", "sliding_window": 512, "query_pre_attn_scalar": 256},
}
"""Sizes by full hub name, from each model's config.json."""


def shape_of(base: Base) -> tuple[PretrainedConfig, str]:
    """The configuration and its source as text. Nothing is downloaded or converted.

    Raises:
        UserError: the shape is not known; the message says how to give it.
    """
    if base.init == "random" and base.config:
        return load_config(base, trust_remote_code=base.trust_remote_code), "base.config"
    local = local_folder(base.model)
    if (local / "config.json").is_file():
        config = load_config(replace(base, model=str(local)), trust_remote_code=base.trust_remote_code)
        return config, str(local)
    if base.model not in EMBEDDED and (cached := _cached(base)):
        return _changed(cached, base), "the hub's cache"
    if base.config:
        return load_config(replace(base, init="random", overrides={})), "base.config"
    for names, shape in KNOWN.items():
        if re.fullmatch(names, base.model, re.IGNORECASE):
            return _changed(AutoConfig.for_model(**shape), base), f"l2v's table of shapes ({base.model})"
    raise UserError(
        f"the shape of '{base.model}' is not known: it is not a folder with a config.json and not in the hub's cache; "
        "give it on the command line, for example base.config='{model_type: llama, hidden_size: 4096, "
        "intermediate_size: 14336, num_hidden_layers: 32, num_attention_heads: 32, num_key_value_heads: 8, vocab_size: 128256}'"
    )


def local_folder(model: str) -> Path:
    """The folder of a base or tokenizer, if it is a folder or an embedded base; it may not exist."""
    return converted_folder(model) if model in EMBEDDED else Path(model)


def _cached(base: Base) -> PretrainedConfig | None:
    try:
        return AutoConfig.from_pretrained(
            base.model, revision=base.revision, local_files_only=True, trust_remote_code=base.trust_remote_code
        )
    except Exception:  # whatever the error, the shape may still come from the recipe or the table
        return None


def _changed(config: PretrainedConfig, base: Base) -> PretrainedConfig:
    for key, value in base.overrides.items():
        setattr(config, key, value)
    return config
