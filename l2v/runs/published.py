"""A published sentence-transformers model as a base: pooling, prompts, normalisation and direction from its own files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from l2v.errors import UserError, first_line
from l2v.model.embedded import EMBEDDED
from l2v.model.export import POOLING_MODES
from l2v.model.hub import is_repository_name, why_missing
from l2v.recipe import Base, Template
from l2v.recipe.instructions import Instructions

MODULES = "modules.json"
DOCUMENT_PROMPTS = ("document", "passage", "corpus")
LEGACY = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
}
USE_THEIRS = "load it with sentence-transformers"


@dataclass(frozen=True)
class PublishedEncoder:
    """What its files say. pooled: see `TextTokenizer`; their `include_prompt` decides."""

    base: Base
    length: int | None
    instructions: Instructions
    pooled: Literal["all", "unprompted"]
    normalize: bool


def read_published(name: str) -> PublishedEncoder | None:
    """What a folder or repository of sentence-transformers says about its vectors; None if it is none.

    Raises:
        UserError: it computes its vectors in a way that l2v does not, or one of its files is damaged.
    """
    if name in EMBEDDED:
        return None
    modules = _json(name, MODULES)
    if modules is None:
        return None
    try:
        return _read(name, modules)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{name}: its sentence-transformers files are damaged: {first_line(error)}") from None


def _read(name: str, modules: Any) -> PublishedEncoder:
    kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UserError(
            f"{name}: a sentence-transformers model of the modules {', '.join(kinds)}, and l2v has Transformer, Pooling and "
            f"Normalize; {USE_THEIRS}"
        )
    inside = modules[0]["path"]
    if inside and not Path(name).is_dir():
        raise UserError(
            f"{name}: its model lies in the folder {inside} of its repository; download it and give the folder"
        )
    model = str(Path(name) / inside) if inside else name
    config = _json(model, "config.json")
    if config is None:
        raise UserError(f"{model}: no config.json")
    pooling, include_prompt = _pooling(name, modules[1]["path"])
    settings = _json(name, "config_sentence_transformers.json") or {}
    limits = _json(model, "sentence_bert_config.json") or {}
    if limits.get("do_lower_case"):
        raise UserError(
            f"{name}: its sentence_bert_config.json lowers the case of texts, which l2v does not; {USE_THEIRS}"
        )
    prefix, instructions = _prompts(name, settings)
    prompted = bool(prefix or any(instructions.query) or any(instructions.document))
    if prompted and not include_prompt and pooling in ("weighted_mean", "first"):
        raise UserError(
            f"{name}: pooling {pooling} behind a prompt that is not pooled, which l2v does not have; {USE_THEIRS}"
        )
    base = Base(
        model=model,
        attention=_direction(name, config),
        pooling=pooling,  # type: ignore[arg-type]  # a value of POOLING_MODES
        template=Template(prefix=prefix, instruction="{instruction}"),
    )
    pooled: Any = "all" if include_prompt else "unprompted"
    return PublishedEncoder(base, _length(model, limits, config), instructions, pooled, "Normalize" in kinds)


def _pooling(name: str, path: str) -> tuple[str, bool]:
    """l2v's name of the pooling, and whether the prompt is pooled too."""
    found = _json(name, f"{path}/config.json" if path else "config.json")
    if found is None:
        raise UserError(f"{name}: no {path}/config.json, which says how it pools")
    modes = found.get("pooling_mode") or [mode for key, mode in LEGACY.items() if found.get(key)]
    modes = [modes] if isinstance(modes, str) else list(modes)
    ours = {theirs: ours for ours, theirs in POOLING_MODES.items()}
    if len(modes) != 1 or modes[0] not in ours:
        raise UserError(
            f"{name}: its pooling is {' and '.join(modes) or 'none'}, and l2v has {', '.join(ours)}; {USE_THEIRS}"
        )
    return ours[modes[0]], bool(found.get("include_prompt", True))


def _prompts(name: str, settings: dict[str, Any]) -> tuple[str, Instructions]:
    """What stands before every text, and what queries and documents get behind it."""
    prompts: dict[str, str] = dict(settings.get("prompts") or {})
    default = settings.get("default_prompt_name")
    prefix: str = prompts[default] if default else ""
    query = prompts.get("query", prefix)
    document = next((prompts[key] for key in DOCUMENT_PROMPTS if key in prompts), prefix)
    for side, prompt in (("query", query), ("document", document)):
        if not prompt.startswith(prefix):
            raise UserError(
                f"{name}: its {side} prompt does not begin with its default prompt, and l2v puts one behind the other; "
                f"{USE_THEIRS}"
            )
    return prefix, Instructions((query.removeprefix(prefix),), (document.removeprefix(prefix),))


def _direction(name: str, config: dict[str, Any]) -> Any:
    """Whether a token sees those behind it, as transformers' own code for this configuration has it."""
    if "AutoModel" in (config.get("auto_map") or {}):
        raise UserError(
            f"{name}: its model is code of its own (auto_map), which decides what its tokens see; l2v cannot know it; "
            f"{USE_THEIRS}"
        )
    by_flag = config.get("use_bidirectional_attention") is True and config["model_type"] == "gemma3_text"
    if by_flag or config.get("is_causal") is False or config["model_type"] in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "bidirectional"
    return "causal"


def _length(model: str, limits: dict[str, Any], config: dict[str, Any]) -> int | None:
    if isinstance(limits.get("max_seq_length"), int):
        return limits["max_seq_length"]
    tokenizer = _json(model, "tokenizer_config.json") or {}
    known = [config.get("max_position_embeddings"), tokenizer.get("model_max_length")]
    return min((int(each) for each in known if isinstance(each, int | float)), default=None)


def _json(name: str, file: str) -> Any:
    """A JSON file of a folder or a repository; None if it has none."""
    path: Path | None = Path(name) / file
    if not Path(name).exists():
        path = None
        if is_repository_name(name) and why_missing(name, file) is None:
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(name, file))
    if path is None or not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from None
