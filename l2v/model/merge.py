"""Merge PEFT adapters into a decoder's weights: PEFT computes every change, in float32, and what it loads is checked."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from l2v.errors import Notice, UserError, first_line
from l2v.model.adapter_file import PREFIX, AdapterFile, holds_weights, read_adapter
from l2v.model.full import load_weights
from l2v.model.settings import quiet_transformers
from l2v.model.vocabulary import grow_embedding, rows_of

HEADS = ("lm_head", "embed_out", "score", "classifier")
"""Modules behind the decoder, which no vector depends on."""


def merge_adapters(
    inner: PreTrainedModel, adapters: Sequence[str], *, whole: PreTrainedModel | None = None
) -> PreTrainedModel:
    """Put adapters into the weights of a decoder, one after the other, in float32; each weight is rounded to its dtype once.

    An adapter changes the weights that those before it left, as when it was trained on them: LoRA's matrices add up, DoRA
    normalises their sum, a module or a token's vector that was trained as a whole replaces the old one. PEFT computes it.
    Merging one after another in bf16 would round each time (about 9% of the weights then depend on the order). A stage without
    LoRA replaces all weights, and with them whatever came before it.

    whole: the language model around the decoder, where its head is used as well (MNTP). Without it, what an adapter holds for
    the head is skipped, with a `Notice`.

    Raises:
        UserError: an adapter cannot be found or read, does not fit the base, or is of a kind that is not merged.
    """
    if full := [at for at, adapter in enumerate(adapters) if holds_weights(adapter)]:
        load_weights(inner, adapters[full[-1]], whole=whole)
        adapters = adapters[full[-1] + 1 :]
    if not adapters:
        return inner
    dtypes = {name: parameter.dtype for name, parameter in inner.named_parameters()}
    found = [for_decoder(read_adapter(adapter), inner, whole) for adapter in adapters]
    groups = list(_groups(found))
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # what PEFT says about ties and repeated merging is dealt with here
        for at, group in enumerate(groups):
            _merge_group(inner, group, whole, rounded=at == len(groups) - 1)
    for name, parameter in inner.named_parameters():
        parameter.requires_grad_(False)
        if parameter.dtype != dtypes[name]:
            parameter.data = parameter.data.to(dtypes[name])
    return inner


def _groups(adapters: list[tuple[AdapterFile, str]]) -> Iterator[list[tuple[AdapterFile, str]]]:
    """Neighbours that can be attached at once, so that each layer is in float32 only while it is merged."""
    group: list[tuple[AdapterFile, str]] = []
    for adapter, attribute in adapters:
        if group and (adapter.alone or group[-1][0].alone or group[-1][1] != attribute):
            yield group
            group = []
        group.append((adapter, attribute))
    yield group


def for_decoder(adapter: AdapterFile, inner: PreTrainedModel, whole: PreTrainedModel | None) -> tuple[AdapterFile, str]:
    """The adapter without what it holds for heads, and the attribute of its model that the decoder was (empty: it was the model).

    An adapter of a causal language model has keys like `base_model.model.model.layers...`.

    Raises:
        UserError: a tensor belongs to no module of the decoder.
    """
    children = {name for name, _ in inner.named_children()}

    def owned(key: str, attribute: str) -> bool:
        """Whether the decoder has what the key names if it was the attribute of the adapter's model."""
        before = f"{PREFIX}{attribute}." if attribute else PREFIX
        return key.startswith(before) and key.removeprefix(before).split(".")[0] in children

    heads = [key for key in adapter.tensors if key.removeprefix(PREFIX).split(".")[0] in HEADS]
    body = {key: tensor for key, tensor in adapter.tensors.items() if key not in heads}
    placed = [key for key in body if key.startswith(PREFIX)]  # VeRA's shared matrices belong to no module
    parts = placed[0].removeprefix(PREFIX).split(".") if placed else []
    attributes = [".".join(parts[:depth]) for depth in range(min(3, len(parts)))]
    attribute = max(attributes, key=lambda name: sum(owned(key, name) for key in placed), default="")
    strange = [key for key in placed if not owned(key, attribute)] if placed else list(body)
    if strange:
        raise UserError(
            f"{adapter.name}: {len(strange)} of its {len(adapter.tensors)} tensors belong to no module of this base, for "
            f"example {strange[0]}"
        )
    if not body:
        raise UserError(f"{adapter.name}: it holds tensors for the head alone ({heads[0]}), which no vector depends on")
    if heads and whole is not None:
        raise UserError(
            f"{adapter.name}: {len(heads)} of its {len(adapter.tensors)} tensors are for the language-model head, for example "
            f"{heads[0]}, and MNTP predicts with the base's own head; start from an adapter without them"
        )
    if heads:
        said = (
            f"{adapter.name}: {len(heads)} tensors for the head ({heads[0]} ...) are skipped; no vector depends on them"
        )
        warnings.warn(said, Notice, stacklevel=4)
    _without_heads(adapter.config)
    return AdapterFile(adapter.name, adapter.config, body), attribute


def _without_heads(config: Any) -> None:
    if kept := getattr(config, "modules_to_save", None):
        config.modules_to_save = [name for name in kept if name.rsplit(".", 1)[-1] not in HEADS] or None


class Around(nn.Module):
    """Stands where a language model stood, so that the names in an adapter's configuration mean what they meant to PEFT."""

    def __init__(self, inner: PreTrainedModel, attribute: str) -> None:
        super().__init__()
        first, _, rest = attribute.partition(".")
        self.config = inner.config
        self.add_module(first, Around(inner, rest) if rest else inner)
        self._inner = [inner]

    def get_input_embeddings(self) -> nn.Module:
        return self._inner[0].get_input_embeddings()

    def get_output_embeddings(self) -> None:
        return None


def _merge_group(
    inner: PreTrainedModel, group: list[tuple[AdapterFile, str]], whole: PreTrainedModel | None, *, rounded: bool
) -> None:
    """Attach adapters, merge them in order into float32 weights, and detach. rounded: each weight gets its dtype back at once."""
    attribute = group[0][1]
    root: nn.Module = Around(inner, attribute) if attribute else inner
    model: PeftModel | None = None
    for index, (adapter, _) in enumerate(group):
        _grow(inner, adapter, whole)
        model = _attach(model or root, adapter, f"a{index}")
    assert model is not None
    if whole is not None:
        _untie(inner, whole)
    names = [f"a{index}" for index in range(len(group))]
    try:
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, BaseTunerLayer):
                    _merge_layer(module, names, rounded=rounded)
            model.base_model.unload()
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, NotImplementedError) as error:
        who = ", ".join(adapter.name for adapter, _ in group)
        raise UserError(f"{who}: PEFT cannot merge it into this base: {first_line(error)}") from None


def _merge_layer(module: Any, names: list[str], *, rounded: bool) -> None:
    base = module.get_base_layer()
    parameters = list(base.parameters(recurse=False))
    dtypes = [parameter.dtype for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    for name in names:
        module.merge(safe_merge=False, adapter_names=[name])
        # PEFT normalises a second DoRA by the weights before the first; here it was trained on those after it.
        module.merged_adapters.clear()
    if not _finite(parameters):
        raise ValueError("the merged weights hold NaN or Inf")
    if rounded:
        for parameter, dtype in zip(parameters, dtypes, strict=True):
            parameter.data = parameter.data.to(dtype)


def _untie(inner: PreTrainedModel, whole: PreTrainedModel) -> None:
    """Give the head weights of its own where the embedding that it shares is about to change: no adapter was trained so."""
    head, embedding = whole.get_output_embeddings(), inner.get_input_embeddings()
    changed = isinstance(embedding, BaseTunerLayer) or hasattr(embedding, "token_adapter")
    weight = getattr(embedding, "weight", None)
    if head is not None and changed and weight is not None and head.weight.data_ptr() == weight.data_ptr():
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def _grow(inner: PreTrainedModel, adapter: AdapterFile, whole: PreTrainedModel | None) -> None:
    """Give the embedding a row for each new token that the adapter has trained.

    Raises:
        UserError: new rows would be left that it has not trained.
    """
    tokens = getattr(adapter.config, "trainable_token_indices", None) or getattr(adapter.config, "token_indices", None)
    if not tokens:
        return
    ids = {id for each in (tokens.values() if isinstance(tokens, dict) else [tokens]) for id in each}
    rows = rows_of(inner)
    if not ids:
        return
    if min(ids) < 0:
        raise UserError(f"{adapter.name}: {min(ids)} in its trainable_token_indices is no token id")
    missing = next((id for id in range(rows, max(ids)) if id not in ids), None)
    if missing is not None:
        raise UserError(
            f"{adapter.name}: it has trained a vector for token {max(ids)}, and this base, with an embedding of {rows} rows, "
            f"has none for token {missing}; use the base that it was trained on"
        )
    if max(ids) >= rows:
        grow_embedding(whole or inner, max(ids) + 1)


def _attach(root: nn.Module, adapter: AdapterFile, name: str) -> PeftModel:
    """Attach an adapter to a model, or to one that already has some.

    Raises:
        UserError: it does not fit, or lacks tensors that its configuration asks for, or has others.
    """
    try:
        if isinstance(root, PeftModel):
            model = root
            model.add_adapter(name, adapter.config, autocast_adapter_dtype=True)
        else:
            model = PeftModel(root, adapter.config, adapter_name=name, autocast_adapter_dtype=True)
        wanted = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    except Exception as error:  # a configuration can be wrong in as many ways as PEFT reads it
        raise UserError(f"{adapter.name}: does not fit this base: {first_line(error)}") from None
    _compare(adapter, wanted, model)
    try:
        set_peft_model_state_dict(model, adapter.tensors, adapter_name=name)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{adapter.name}: does not fit this base: {first_line(error)}") from None
    loaded = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    if not all(_same(tensor, adapter.tensors[key]) for key, tensor in loaded.items()):
        raise UserError(f"{adapter.name}: PEFT did not load its tensors into this base; merge it with PEFT")
    return model


def _finite(parameters: Sequence[torch.Tensor]) -> bool:
    """Whether no weight is NaN or Inf."""
    return all(bool(parameter.detach().sum().isfinite()) for parameter in parameters)


def _same(loaded: torch.Tensor, written: torch.Tensor) -> bool:
    """Whether a model holds a file's tensor, on whichever device."""
    return torch.equal(loaded.float().cpu(), _rounded(written, loaded))


def _rounded(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor as PEFT keeps it: whole modules and tokens have the base's dtype, matrices float32."""
    return tensor.to(like.dtype).float()


def _compare(adapter: AdapterFile, wanted: dict[str, torch.Tensor], model: PeftModel) -> None:
    """Raise if tensors are missing, surplus or of another shape than the configuration and the base ask for."""
    have = adapter.tensors
    if missing := [key for key in wanted if key not in have]:
        raise UserError(
            f"{adapter.name}: it lacks {len(missing)} of the {len(wanted)} tensors that its configuration asks for in this "
            f"base, for example {missing[0]}"
        )
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    surplus = [key for key in have if key not in wanted and not _saved_embedding(key, shapes)]
    if surplus:
        raise UserError(
            f"{adapter.name}: {len(surplus)} of its {len(have)} tensors are none that its configuration asks for in this base, "
            f"for example {surplus[0]}"
        )
    shapes |= {key: tuple(tensor.shape) for key, tensor in wanted.items()}
    for key, tensor in have.items():
        if tuple(tensor.shape) != shapes[key]:
            raise UserError(
                f"{adapter.name}: does not fit this base: {key} has the shape {tuple(tensor.shape)}, and the base and the "
                f"adapter's configuration ask for {shapes[key]}"
            )


def _saved_embedding(key: str, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether it is the base's own embedding, which PEFT saves with an adapter where the vocabulary was resized."""
    return key in shapes and key.endswith(("embed_tokens.weight", "embed_tokens.base_layer.weight", "wte.weight"))
