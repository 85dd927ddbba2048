"""What l2v sets on a model of transformers: the direction of its attention, no dropout of its own; and quiet loading."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

DROPS = ("dropout", "drop_prob", "drop_path", "layerdrop")


@contextlib.contextmanager
def quiet_transformers():
    """Hide what libraries print while they load and save: the load report (without the head it lists expected differences as
    UNEXPECTED), progress bars, deprecations that PEFT and not the user has to follow, and that DeepSpeed, which they import
    wherever it is installed, found no accelerator.
    """
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    accelerator = "DS_ACCELERATOR" in os.environ or torch.accelerator.is_available()
    if not accelerator:
        os.environ["DS_ACCELERATOR"] = "cpu"  # what it takes anyway; it keeps it from its import on
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if not accelerator:
            del os.environ["DS_ACCELERATOR"]
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def set_attention(model: PreTrainedModel, *, causal: bool) -> None:
    """Make every attention module of a model causal or bidirectional.

    The configuration decides which mask transformers builds; the flag of each module decides what a backend does without a
    mask (flash attention, SDPA without padding). Both are set, because backends differ in which one they read. A configuration
    that has a flag of its own (`state_direction`) does not get `is_causal: false` as well: its window would be another.
    """
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        if causal or not by_flag(config):
            config.is_causal = causal
        config.use_cache = False
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = causal


def state_direction(config: PretrainedConfig, *, causal: bool) -> None:
    """State a direction by the architecture's own flag where it has one: `use_bidirectional_attention` of Gemma 3.

    transformers has three windows for a file of Gemma 3 that states w: |i - j| <= w with `is_causal: false` alone, <= w // 2 with
    the flag alone, as EmbeddingGemma was trained and llama.cpp counts, and <= w // 2 + 1 with both. A base that states no
    direction gets the flag alone. One that states `is_causal: false` keeps the window that transformers gives it. A
    configuration in memory that has the flag holds w // 2 + 1 (its `to_dict` restores w), so a second call changes nothing.
    """
    if causal and flagged(config):
        _unflag(config)
    elif not causal and has_flag(config) and not flagged(config) and getattr(config, "is_causal", True):
        _flag(config)


def override(config: PretrainedConfig, overrides: Mapping[str, Any]) -> None:
    """Set keys of a configuration as its file would state them. `config` has all of them."""
    before = flagged(config)
    if before:
        _unflag(config)  # so that a window is set as in the file
    for key, value in overrides.items():
        setattr(config, key, value)
    if has_flag(config) and overrides.get("use_bidirectional_attention", before):
        _flag(config)


def flagged(config: PretrainedConfig) -> bool:
    """Whether a configuration has the flag of `state_direction`, and with it holds the converted window."""
    return has_flag(config) and config.use_bidirectional_attention is True


def by_flag(config: PretrainedConfig) -> bool:
    """Whether a configuration is bidirectional by a flag of its own alone."""
    return flagged(config) and getattr(config, "is_causal", True)


def has_flag(config: Any) -> bool:
    """Whether the architecture reads a flag, and converts a window by it."""
    return getattr(config, "model_type", None) == "gemma3_text" and isinstance(config.sliding_window, int)


def _flag(config: Any) -> None:
    config.use_bidirectional_attention, config.sliding_window = True, config.sliding_window // 2 + 1


def _unflag(config: Any) -> None:
    config.use_bidirectional_attention, config.sliding_window = False, 2 * (config.sliding_window - 1)


def open_chunks(config: PretrainedConfig) -> None:
    """Let chunked attention (Llama 4) see the whole text, in a bidirectional model.

    transformers builds the mask of chunks causally, whatever `is_causal` says. Chunks are thousands of tokens, more than a text
    of an encoder has, and the changed `layer_types` travel with the export.
    """
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or []
    if "chunked_attention" in kinds:
        text.layer_types = ["full_attention" if kind == "chunked_attention" else kind for kind in kinds]


def drop_nothing(model: nn.Module) -> None:
    """Turn off the dropout that an architecture brings along (GPT-2, BERT): 0.1 from the global generator.

    It would differ between a forward and its recomputation (gradient cache), between ranks, and after a restart. The
    configuration keeps its values for the export.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
            continue
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and any(word in name for word in DROPS):
                setattr(module, name, 0.0)
