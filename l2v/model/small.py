"""The smallest copy of an architecture: every kind of layer, a few numbers in each.

The proof of a base (`l2v.model.proof`) runs on it, so that it takes a fraction of a second for a base of any size.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

WINDOW = 4
VOCABULARY = 128
WIDTH = 64
HEADS = 4
HEAD = WIDTH // HEADS
SOFTCAP = 1.0
"""Small enough to bend the scores of random weights."""
STATE_HEADS = 8
"""Heads of a state-space layer."""
DEEPEST = 16
"""Layers of the copy at most: kinds that begin behind them are not in it."""

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
QUERY_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "attention_heads")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "num_global_key_value_heads", "n_kv_heads")
SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size|vocab_size_per_layer_input|padded_vocab_size|n_words", VOCABULARY),
    (r"hidden_size|n_embd|d_model|dim|emb_dim|embed_dim|block_dim|conv_dim|lru_width|attention_hidden_size", WIDTH),
    (r"v_head_dim|linear_(key|value)_head_dim|qk_nope_head_dim|index_head_dim|swa_head_dim|swa_v_head_dim", HEAD),
    (r"qk_rope_head_dim|rotary_dim|rope_head_dim", 8),
    (r"q_lora_rank|o_lora_rank", 24),
    (r"kv_lora_rank|hidden_size_per_layer_input|(ssm_)?state_size|mamba_d_state|.*_latent_size", 16),
    (r"global_head_dim", 2 * HEAD),
    (r"time_step_rank|mamba_dt_rank|laurel_rank|num_(local_|routed_)?experts|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_(tok|token)|moe_topk|moe_k|moe_top_k|top_k_experts|n_group|zero_expert_num|index_n_heads", 2),
    (r"topk_group", 1),
    (r"linear_num_key_heads", 2),
    (r"(sliding_|attention_)?window(_size)?|sliding_window_size|attention_window_size|attention_chunk_size", WINDOW),
    (r"local_attention|index_topk", 2 * WINDOW),
    (r"(mamba_)?chunk_size", WINDOW),
    (r"(mamba_)?n_groups|mamba_ngroups", 2),
    (r"(n_mamba_heads|mamba_n_heads|mamba_num_heads)", STATE_HEADS),
    (
        r".*(intermediate_size|ffn_dim|ffn_hidden_size|n_inner|dff|d_ff|ffn_size|ff_dim|adapter_rank|shared_expert_dim)",
        96,
    ),
)
PLACES = {"layer_idx", "layer_id", "block_idx", "idx", "layer_number", "layer_depth"}
"""Attributes that only say where a layer stands."""


def small_model(config: PretrainedConfig, *, trust_remote_code: bool = False, seed: int = 0) -> PreTrainedModel:
    """The copy with random weights, fp32 on the CPU, in eval mode, with transformers' own eager attention.

    Every matrix is random, and every vector (biases, norms, sinks) moved off its start, so that dropping one shows.

    Raises:
        Exception: whatever transformers raises where an architecture cannot be made small by these rules.
    """
    shape = small_config(config, trust_remote_code=trust_remote_code)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(shape, trust_remote_code)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(noise / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else parameter + 0.1 * noise)
    return model.eval()


def small_config(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """A configuration of the same architecture with small sizes, and as many layers as it takes to have one of each kind."""
    shape = copy.deepcopy(config)
    for part in _parts(shape):
        _shrink(part)
    text = shape.get_text_config()
    depth = depth_of(text)
    if depth > DEEPEST:
        _cut(text, depth, DEEPEST)
        depth = DEEPEST
    if depth > 1:
        with torch.device("meta"), torch.random.fork_rng(devices=[]), no_init_weights():
            whole = _build(shape, trust_remote_code)
        _cut(text, depth, _enough([_kind(layer) for layer in layers_of(whole, depth)], depth))
    return shape


def depth_of(config: PretrainedConfig) -> int:
    """The number of layers that a configuration states; 0 if it states none."""
    return next((n for key in LAYERS if isinstance(n := getattr(config, key, None), int)), 0)


def layers_of(model: nn.Module, depth: int) -> list[nn.Module]:
    """The layers of a decoder or encoder, in order: its outermost list of `depth` modules. Empty if there is none."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    text = [(n, m) for n, m in lists if "vision" not in n and "audio" not in n]
    return list(min(text, key=lambda found: found[0].count("."))[1]) if text else []


def _build(config: PretrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    return AutoModel.from_config(
        copy.deepcopy(config), dtype=torch.float32, attn_implementation="eager", trust_remote_code=trust_remote_code
    )


def _parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PretrainedConfig):
            yield from _parts(value)


def _shrink(config: Any) -> None:
    found = {key: value for key, value in vars(config).items() if not key.startswith("_")}
    numbers = {k: v for k, v in found.items() if isinstance(v, int) and not isinstance(v, bool)}
    width = config.hidden_size if hasattr(config, "hidden_size") else 0
    new = {key: min(value, size) for key, value in numbers.items() for size in (_size(key),) if size is not None}
    heads = next((numbers[key] for key in QUERY_HEADS if numbers.get(key)), 0)
    new |= {key: min(HEADS, value) for key, value in numbers.items() if key in QUERY_HEADS}
    for key in KEY_HEADS:
        if (value := numbers.get(key)) is not None:
            new[key] = HEADS if value == heads else 1 if value == 1 else 2
    new |= _other_widths(numbers, width) | _head_dims(numbers, new) | _state_space(config, numbers, width)
    if (keys := numbers.get("linear_num_key_heads")) and (values := numbers.get("linear_num_value_heads")):
        new["linear_num_value_heads"] = new["linear_num_key_heads"] * (1 if values == keys else 2)
    vocabulary = new.get("vocab_size", VOCABULARY)
    new |= {k: min(v, vocabulary - 1) for k, v in numbers.items() if k.endswith("token_id")}
    for key, value in new.items():
        setattr(config, key, value)
    for key, value in found.items():
        if "softcap" in key and isinstance(value, float):
            setattr(config, key, min(value, SOFTCAP))
        elif key.endswith("token_id") and isinstance(value, list):
            setattr(config, key, [min(v, vocabulary - 1) for v in value])
        elif isinstance(value, list) and value and all(type(v) is int for v in value) and (size := _size(key)):
            setattr(config, key, [min(v, size) for v in value])
    _shrink_rope(config, new.get("head_dim", HEAD))


def _size(key: str) -> int | None:
    return next((size for pattern, size in SIZES if re.fullmatch(pattern, key)), None)


def _other_widths(numbers: dict[str, int], width: int) -> dict[str, int]:
    """Embeddings narrower than the layers stay narrower."""
    keys = ("embedding_size", "word_embed_proj_dim", "input_embedding_size")
    return {k: min(width, WIDTH) // (1 if numbers[k] == width else 2) for k in keys if k in numbers}


def _head_dims(numbers: dict[str, int], new: dict[str, int]) -> dict[str, int]:
    """head_dim and what some configurations derive from others and store."""
    if "qk_rope_head_dim" in numbers:
        both = new.get("qk_nope_head_dim", HEAD) + new["qk_rope_head_dim"]
        own = new["qk_rope_head_dim"] if numbers.get("head_dim") == numbers["qk_rope_head_dim"] else both
        return {k: both if k == "qk_head_dim" else own for k in ("qk_head_dim", "head_dim") if k in numbers}
    return {k: min(HEAD, numbers[k]) for k in ("head_dim", "attention_head_dim", "kv_channels", "d_kv") if k in numbers}


def _state_space(config: Any, numbers: dict[str, int], width: int) -> dict[str, int]:
    """Inner width, heads and width of a head of a Mamba layer, which have to fit each other."""
    expand = next((getattr(config, k) for k in ("mamba_expand", "expand") if hasattr(config, k)), None)
    if expand is None:
        return {}
    inner = int(expand * min(width, WIDTH))
    new = {k: inner for k in ("intermediate_size", "mamba_d_ssm") if numbers.get(k) == int(expand * width)}
    new |= {"mamba_d_ssm": inner} if numbers.get("mamba_d_ssm") else {}
    own = {"head_dim"} if "num_heads" in numbers else set()  # Mamba 2, which has no attention
    for key in {"mamba_d_head", "mamba_head_dim", "mamba_headdim"} | own:
        if key in numbers:
            new[key] = inner // STATE_HEADS
    return new | ({"num_heads": STATE_HEADS} if own else {})


def _shrink_rope(config: Any, head: int) -> None:
    """Lists with an entry for each rotated pair get as many as a small head has."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = vars(config).get(key)
        for each in _dicts(rope):
            share = each.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
            pairs = int(head * share) // 2
            for name in ("short_factor", "long_factor"):
                if isinstance(each.get(name), list):
                    each[name] = each[name][:pairs]
            if isinstance(sections := each.get("mrope_section"), list):
                each["mrope_section"] = [pairs - (len(sections) - 1) * (pairs // len(sections))] + [
                    pairs // len(sections)
                ] * (len(sections) - 1)


def _dicts(value: Any) -> Iterator[dict]:
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _dicts(inner)


def _kind(layer: nn.Module) -> tuple:
    """What tells kinds of layers apart: classes, and settings of all modules in it (a number counts as being set)."""
    out = []
    for name, module in layer.named_modules():
        plain = {
            k: v if isinstance(v, str | bool) else v is not None
            for k, v in vars(module).items()
            if (v is None or isinstance(v, str | bool | int | float)) and k not in PLACES and k[0] != "_"
        }
        out.append((name, type(module).__name__, tuple(sorted(plain.items())), tuple(module._parameters)))
    return tuple(out)


def _enough(kinds: list[tuple], depth: int) -> int:
    """How many of the first layers hold every kind; two where all are one kind or share a module (ALBERT)."""
    if not kinds:
        return min(depth, 2)
    first: dict[tuple, int] = {}
    for at, kind in enumerate(kinds):
        first.setdefault(kind, at)
    return min(len(kinds), max(2, 1 + max(first.values())))


def _cut(config: Any, depth: int, layers: int) -> None:
    """Leave the first `layers` layers, also in lists that have an entry for each."""
    for key, value in list(vars(config).items()):
        if key in LAYERS and value == depth:
            setattr(config, key, layers)
        elif isinstance(value, list | tuple) and len(value) == depth:
            setattr(config, key, value[:layers])
        elif key == "attention_types" and isinstance(value, list):  # GPT-Neo: kinds and how often they repeat
            each = [kind for kinds, times in value for _ in range(times) for kind in kinds]
            setattr(config, key, [[each[:layers], 1]])
    single = getattr(
        vars(config).get("_heterogeneity_spec"), "per_layer_overrides", {}
    )  # settings of single layers (Gemma 4)
    for at in [at for at in single if at >= layers]:
        del single[at]
