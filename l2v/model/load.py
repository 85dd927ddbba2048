"""Load a decoder or encoder of transformers, pretrained or randomly initialised, causal or bidirectional by configuration."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from l2v.errors import RecipeError, UserError, first_line
from l2v.model.embedded import resolve
from l2v.model.path import ForwardPath, set_path
from l2v.model.proof import Proof, prove
from l2v.model.settings import (
    drop_nothing,
    open_chunks,
    override,
    quiet_transformers,
    set_attention,
    state_direction,
)
from l2v.recipe import Base
from l2v.recipe.safety import code_refused, needs_code

AUTO_PRECISION = "L2V_AUTO_PRECISION"


def device() -> torch.device:
    """The current CUDA device if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def dtype_of(precision: str, *, named_gpu: bool = False, encoding: bool = False) -> torch.dtype:
    """The dtype of base.precision; the only place that resolves `auto`.

    In training, auto is bf16 on a GPU and on a CPU with bf16 matmuls in hardware (AVX512-BF16 or AMX), else fp32. The
    environment variable L2V_AUTO_PRECISION=bf16 or fp32 overrides what auto means on this machine.
    named_gpu: for a GPU named in `l2v plan`, independent of this machine.
    encoding: the model only encodes. On a CPU auto is then fp32, whatever the processor and the variable: vectors of one
        encoder are compared across machines, and with those of sentence-transformers.

    Raises:
        UserError: L2V_AUTO_PRECISION has another value.
    """
    if precision == "auto":
        on_cpu = encoding and not torch.cuda.is_available()
        precision = "fp32" if on_cpu else "bf16" if named_gpu else _auto_here()
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _auto_here() -> str:
    forced = os.environ.get(AUTO_PRECISION)
    if forced is None:
        return "bf16" if torch.cuda.is_available() or cpu_multiplies_bf16() else "fp32"
    if forced not in ("bf16", "fp32"):
        raise UserError(f"{AUTO_PRECISION} is '{forced}'; set it to bf16 or fp32, or unset it")
    return forced


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has AVX512-BF16 or AMX, which make bf16 faster than fp32."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check is not None and check() for check in checks)


def load_config(base: Base, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The base's configuration: from its folder or the hub; with init: random, also from the recipe's base.config.

    trust_remote_code: the caller's own permission to run code that comes with the base. What the base says about it is a
    wish, which a run or a recipe may have brought along; without the permission it is refused.

    Raises:
        RecipeError: base.config or base.overrides do not fit transformers.
        UserError: the base cannot be found, or needs code that the caller does not allow.
    """
    if base.init == "random" and base.config:
        shape = dict(base.config)
        if "model_type" not in shape:
            raise RecipeError("base.config needs a model_type, for example llama")
        try:
            config = AutoConfig.for_model(**shape)
        except (KeyError, ValueError) as error:
            raise RecipeError(f"base.config: transformers does not know this shape: {error}") from None
    else:
        try:
            config = AutoConfig.from_pretrained(
                resolve(base.model), revision=base.revision, trust_remote_code=trust_remote_code
            )
        except UserError:
            raise
        except Exception as error:
            if needs_code(error):
                found, _ = PretrainedConfig.get_config_dict(resolve(base.model), revision=base.revision)
                raise UserError(code_refused(base.model, found.get("auto_map"))) from None
            raise UserError(
                f"the base '{base.model}' was not found: {first_line(error)} (give a folder or a hub name; "
                "base.init=random builds its shape without weights)"
            ) from None
    config._attn_implementation = None  # a file may name one, even code from the Hub; the recipe's backend decides
    auto_map = getattr(config, "auto_map", None)
    if (
        base.trust_remote_code and not trust_remote_code and auto_map
    ):  # transformers would silently take a class of its own
        raise UserError(code_refused(base.model, auto_map))
    for key in base.overrides:
        if not hasattr(config, key):
            raise RecipeError(f"base.overrides.{key}: the configuration of '{base.model}' has no such key")
    override(config, base.overrides)
    if base.overrides.get("num_hidden_layers") and getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    state_direction(config, causal=base.attention == "causal")
    return config


def load_model(
    base: Base, *, head: bool, dtype: torch.dtype, seed: int = 0, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The frozen decoder or encoder in eval mode on the CPU; `head` keeps the language-model head (MNTP needs it).

    Attention is bidirectional or causal as base.attention says, and proved to be (`l2v.model.proof`). `proof_of` gives the proof.
    trust_remote_code: as for `load_config`.

    Raises:
        UserError: the base cannot be found or loaded, needs code that the caller does not allow, or fails its proof.
        RecipeError: base.config, base.overrides or base.backend cannot be used.
    """
    config = load_config(base, trust_remote_code=trust_remote_code)
    causal = base.attention == "causal"
    _check_kind(base, config, head=head)
    if not causal:
        open_chunks(config)
    proof = prove(
        config, backend=base.backend, causal=causal, layers="plain" if base.layers == "plain" else "auto",
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if proof.refused:
        raise UserError(f"the base '{base.model}' ({config.model_type}) cannot be used: {proof.refused}")
    with quiet_transformers():
        model = _load(
            base, config, head=head, dtype=dtype, path=proof.path, seed=seed, trust_remote_code=trust_remote_code
        )
    set_attention(model, causal=causal)
    drop_nothing(model)
    set_path(model, proof.path)
    inner_model(model).l2v_proof = proof
    return model.requires_grad_(False).eval()


def proof_of(model: nn.Module) -> Proof:
    """The proof of a model of `load_model`, also with adapters."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner.l2v_proof


def _check_kind(base: Base, config: PretrainedConfig, *, head: bool) -> None:
    """Raises UserError for an encoder-decoder, and RecipeError for an encoder where a language-model head is needed."""
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"the base '{base.model}' ({config.model_type}) has an encoder and a decoder; l2v takes bases of one stack"
        )
    if head and is_encoder(config):
        raise RecipeError(
            f"the base '{base.model}' ({config.model_type}) is an encoder, whose attention sees both ways already: MNTP, which "
            "teaches a decoder that, does not fit it; train simcse or supervised stages from the base"
        )


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether a configuration is that of an encoder (BERT, RoBERTa, ModernBERT), trained with masked tokens."""
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)


def _load(
    base: Base, config: PretrainedConfig, *, head: bool, dtype: torch.dtype, path: ForwardPath, seed: int,
    trust_remote_code: bool,
) -> PreTrainedModel:  # fmt: skip
    auto = AutoModelForCausalLM if head else AutoModel
    _prepare_attention(base)
    implementation = path.attention
    if base.init == "random":
        torch.manual_seed(seed)
        with torch.device("cpu"):
            return auto.from_config(
                config, dtype=dtype, attn_implementation=implementation, trust_remote_code=trust_remote_code
            )
    source = resolve(base.model)
    if Path(source).is_dir() and not any(Path(source).glob("*.safetensors")) and any(Path(source).glob("*.bin")):
        raise UserError(
            f"the base '{base.model}' holds pickled weights (*.bin), which l2v does not load: save it again with "
            "transformers' save_pretrained, which writes safetensors"
        )
    try:
        model = auto.from_pretrained(
            source,
            # As an object: an `_attn_implementation` in its file would win over the argument, and another implementation
            # ignores the borders of packed texts.
            config=config,
            revision=base.revision,
            dtype=dtype,
            attn_implementation=implementation,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
    except UserError:
        raise
    except Exception as error:
        if needs_code(error):
            raise UserError(code_refused(base.model, getattr(config, "auto_map", None))) from None
        raise UserError(f"the base '{base.model}' cannot be loaded: {first_line(error)}") from None
    for found in (model.config, model.config.get_text_config()):
        if found._attn_implementation != implementation:
            raise UserError(
                f"the base '{base.model}' was loaded with attention '{found._attn_implementation}' instead of "
                f"'{implementation}'; remove that key from its config.json"
            )
    return model


def _prepare_attention(base: Base) -> None:
    """Register l2v's attention with transformers; raises RecipeError where flash-attn is asked for and missing."""
    if base.backend == "l2v":
        from l2v_kernels.integrations.transformers import register

        register()
    elif base.backend == "flash_attention_2":
        from transformers.utils import is_flash_attn_2_available

        if not is_flash_attn_2_available():
            raise RecipeError(
                "base.backend flash_attention_2 needs the package flash-attn and a GPU: pip install 'l2v[flash-attn]', "
                "or use base.backend=l2v"
            )


def inner_model(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder without its head. Adapters are added to this module, so their keys have no second `model.`."""
    return model.base_model


def output_head(model: PreTrainedModel) -> nn.Module:
    """The frozen language-model head.

    Raises:
        RecipeError: the base has none.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise RecipeError("the base has no language-model head; MNTP needs one")
    return head


PIECES = 1024  # of a weight file that its fingerprint reads besides the start
PIECE = 4096  # bytes


def fingerprint(base: Base) -> str:
    """A hash that identifies a base without reading gigabytes: its configuration, and of weight files name, size and pieces.

    Pieces from everywhere in a file, to its end: merged adapters leave the embedding at its start as it was, so that the
    exports of two stages differ only further on.
    """
    digest = hashlib.sha256()
    folder = Path(resolve(base.model))
    if base.init == "random" or not folder.is_dir():
        facts = {k: v for k, v in asdict(base).items() if k in ("model", "revision", "init", "overrides", "config")}
        digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
        return digest.hexdigest()
    weights = (file for pattern in ("*.safetensors", "*.bin", "*.gguf") for file in folder.glob(pattern))
    for file in sorted([folder / "config.json", *weights]):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with open(file, "rb") as stream:
            digest.update(stream.read(1 << 20))
            for piece in range(1, PIECES + 1):
                stream.seek(max(0, (size - PIECE) * piece // PIECES))
                digest.update(stream.read(PIECE))
    return digest.hexdigest()
