"""What l2v sets on a model of transformers: the direction of its attention, no dropout of its own; and quiet loading."""

from __future__ import annotations

import contextlib
import os
import warnings

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
    mask (flash attention, SDPA without padding). Both are set, because backends differ in which one they read.
    """
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.is_causal = causal
        config.use_cache = False
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = causal


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
