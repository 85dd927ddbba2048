"""Which transformers decoders the fused layer supports, and the reason if it does not support one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from peft.tuners.lora import Linear as LoraModule
from peft.tuners.lora import LoraLayer
from torch import nn

from l2v.model.fused.norm import Norm
from l2v.model.keyed_dropout import KeyedDropout
from l2v_kernels.lora_linear import Adapter, Adapters, FrozenLinears, Linears
from l2v_kernels.swiglu.op import Activation

FAMILIES = {
    "LlamaDecoderLayer": "llama",
    "MistralDecoderLayer": "mistral",
    "Qwen2DecoderLayer": "qwen2",
    "Qwen3DecoderLayer": "qwen3",
    "Gemma2DecoderLayer": "gemma2",
    "Gemma3DecoderLayer": "gemma3",
}
"""Class of the layer, and the module in transformers.models that it must come from."""
ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""Names of transformers."""


class Unsupported(Exception):
    """A layer cannot be fused and runs on the plain path; the message says why."""


# Attributes of transformers and PEFT modules are read by name, and nn.Module types each as Tensor | Module: hence Any.


def base_of(module: nn.Module) -> Any:
    """The frozen linear layer, with or without LoRA around it."""
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def _active(module: nn.Module) -> str | None:
    """The adapter that a PEFT layer currently applies, or None."""
    if not isinstance(module, LoraLayer) or module.disable_adapters or module.merged:
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]
    return names[0] if names else None


class Quantized(Protocol):
    """The quantised weights of a group, used instead of its modules' weights (see `l2v.model.quantize`)."""

    def linears(self) -> FrozenLinears:
        """The weights for the fused layer."""


class Group:
    """Linear layers with the same input, as modules of transformers and PEFT.

    Weights are read from the modules at every call, forward and backward: ZeRO-3 gathers them for each, and the optimizer
    changes adapters in place. After `bind` they are read once and kept for as long as nothing about them changes: what a
    layer's forward and backward ask for is a large part of a step's host time.
    """

    def __init__(self, modules: list[Any]) -> None:
        self.modules = modules
        self.quantized: Quantized | None = None
        self._state: Any = None
        self._bound: tuple[FrozenLinears, Adapters, float, list[nn.Parameter]] | None = None

    def bind(self) -> None:
        """Read the modules again if a weight has moved or another adapter is active; call it before a forward.

        Not with ZeRO-3, whose weights move between forward and backward.
        """
        state = [_state(m) for m in self.modules], self.quantized
        if state != self._state:
            self._bound = None
            self._bound = self.linears(), self.adapters(), self.dropout(), self.trained()
            self._state = state

    def unbind(self) -> None:
        """Forget what `bind` kept: from here on an engine moves the weights."""
        self._bound = self._state = None

    def linears(self) -> FrozenLinears:
        """The layer's own weights."""
        if self._bound is not None:
            return self._bound[0]
        if self.quantized is not None:
            return self.quantized.linears()
        bases = [base_of(m) for m in self.modules]
        return Linears([b.weight for b in bases], [b.bias for b in bases])

    def adapters(self) -> Adapters:
        """The current LoRA adapters, in the order of the modules."""
        if self._bound is not None:
            return self._bound[1]
        found = []
        for part, module in enumerate(self.modules):
            name = _active(module)
            if name is not None:
                drop = module.lora_dropout[name]
                stream = drop.stream if isinstance(drop, KeyedDropout) else 0
                a, b = module.lora_A[name].weight, module.lora_B[name].weight
                found.append(Adapter(part, a, b, module.scaling[name], stream))
        return Adapters(found)

    def dropout(self) -> float:
        """The current probability of LoRA dropout, the same in all its layers; 0 in eval mode and without LoRA."""
        if self._bound is not None:
            return self._bound[2]
        for module in self.modules:
            if (name := _active(module)) is not None:
                return getattr(module.lora_dropout[name], "p", 0.0) if module.training else 0.0
        return 0.0

    def trained(self) -> list[nn.Parameter]:
        """Weights and biases of the linears themselves that are trained, a weight before its bias, by module."""
        if self._bound is not None:
            return self._bound[3]
        own = [p for m in self.modules for p in (base_of(m).weight, base_of(m).bias)]
        return [p for p in own if p is not None and p.requires_grad]


def _state(module: Any) -> tuple[Any, ...]:
    """What a bound group depends on, without nn.Module's lookup by name: this runs for every linear of a model at each call."""
    if not isinstance(module, LoraLayer):
        own = module._parameters
        return own["weight"].data_ptr(), id(own["bias"]), own["weight"].requires_grad
    own = module._modules["base_layer"]._parameters
    weights = own["weight"].data_ptr(), id(own["bias"]), own["weight"].requires_grad
    name = _active(module)
    if name is None:
        return weights
    a, b = (module._modules[of]._modules[name]._parameters["weight"] for of in ("lora_A", "lora_B"))
    drop = module._modules["lora_dropout"]._modules[name]
    keyed = getattr(drop, "p", 0.0), drop.stream if isinstance(drop, KeyedDropout) else 0
    return *weights, name, module.scaling[name], a.data_ptr(), b.data_ptr(), module.training, *keyed


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer, read from its module."""

    module: Any
    qkv: Group
    o: Group
    gate_up: Group
    down: Group
    head_dim: int
    index: int
    scale: float
    window: int | None
    """transformers' sliding_window"""
    softcap: float | None
    """of attention's scores"""
    rotary: str | None
    """The kind of layer that the decoder's rotary embedding is called with, where it has several (Gemma 3)."""
    activation: Activation
    input_norm: Norm
    mlp_norm: Norm
    head_norms: tuple[Norm, Norm] | None
    """Of queries and keys per head (Qwen3, Gemma 3)."""
    after: tuple[Norm, Norm] | None
    """Of what attention and the MLP return, before it is added to the residual stream (Gemma)."""

    @classmethod
    def of(cls, layer: Any) -> LayerSpec:
        """Read a layer's module.

        Raises:
            Unsupported: it cannot be fused, with the reason.
        """
        reason = obstacle(layer)
        if reason:
            raise Unsupported(reason)
        attention, mlp = layer.self_attn, layer.mlp
        if hasattr(attention, "sliding_window"):
            window = attention.sliding_window
        else:
            window = getattr(attention.config, "sliding_window", None) if _family(layer) == "mistral" else None
        norms = _norms(layer)
        return cls(
            layer,
            Group([attention.q_proj, attention.k_proj, attention.v_proj]),
            Group([attention.o_proj]),
            Group([mlp.gate_proj, mlp.up_proj]),
            Group([mlp.down_proj]),
            attention.head_dim,
            attention.layer_idx,
            attention.scaling,
            window,
            # Gemma 3 has the attribute too, and its forward does not pass it on.
            attention.attn_logit_softcapping if _family(layer) == "gemma2" else None,
            attention.layer_type if _family(layer) == "gemma3" else None,
            ACTIVATIONS[_activation(layer)],
            norms["input"],
            norms["mlp"],
            (norms["q"], norms["k"]) if "q" in norms else None,
            (norms["after attention"], norms["after mlp"]) if "after mlp" in norms else None,
        )

    @property
    def attention_norms(self) -> tuple[Norm, ...]:
        """The norm before attention, then those of queries and keys."""
        return (self.input_norm, *(self.head_norms or ()))

    @property
    def mlp_norms(self) -> tuple[Norm, ...]:
        """The norm before the MLP, then those after both blocks."""
        return (self.mlp_norm, *(self.after or ()))

    @property
    def linears(self) -> list[Any]:
        """All seven linear layers."""
        return [m for group in self.groups for m in group.modules]

    @property
    def groups(self) -> tuple[Group, Group, Group, Group]:
        """Its linear layers, by input."""
        return self.qkv, self.o, self.gate_up, self.down

    def dropout(self) -> float:
        """The current probability of LoRA dropout; all linear layers have the same. 0 in eval mode."""
        return next((p for group in self.groups if (p := group.dropout())), 0.0)


def _norms(layer: Any) -> dict[str, Norm]:
    """The norms of a layer, by what each comes before or after; `q` and `k` are those of heads."""
    attention = layer.self_attn
    names = {"input": layer.input_layernorm, "mlp": layer.post_attention_layernorm}
    if hasattr(layer, "pre_feedforward_layernorm"):
        names |= {"mlp": layer.pre_feedforward_layernorm, "after attention": layer.post_attention_layernorm}
        names |= {"after mlp": layer.post_feedforward_layernorm}
    if hasattr(attention, "q_norm"):
        names |= {"q": attention.q_norm, "k": attention.k_norm}
    return {name: Norm.of(module) for name, module in names.items()}


def _activation(layer: Any) -> str:
    config = layer.self_attn.config
    return getattr(config, "hidden_activation", None) or config.hidden_act


def _family(layer: nn.Module) -> str | None:
    name = FAMILIES.get(type(layer).__name__)
    return name if name and type(layer).__module__.startswith(f"transformers.models.{name}.") else None


def supported() -> str:
    """The families that can be fused, as text."""
    return ", ".join(name.title() for name in FAMILIES.values())


def obstacle(layer: Any) -> str | None:
    """Why this layer cannot be fused, as the rest of a sentence; None if it can."""
    if _family(layer) is None:
        return f"its layers are {type(layer).__name__}, and the fused layer supports those of {supported()}"
    if _activation(layer) not in ACTIVATIONS:
        return f"its activation is {_activation(layer)}, and the fused layer supports {', '.join(ACTIVATIONS)}"
    if len({norm.eps for name, norm in _norms(layer).items() if name not in "qk"}) > 1:
        return "its norms have different eps"
    if getattr(layer.self_attn.config, "_attn_implementation", "l2v") != "l2v":
        return f"its attention backend is {layer.self_attn.config._attn_implementation}; the fused layer needs base.backend=l2v"
    attention, mlp = layer.self_attn, layer.mlp
    names = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    probabilities = set()
    for name, module in [(n, getattr(attention, n)) for n in names[0]] + [(n, getattr(mlp, n)) for n in names[1]]:
        reason = _linear_obstacle(name, module)
        if reason:
            return reason
        if (adapter := _active(module)) is not None:
            probabilities.add(getattr(module.lora_dropout[adapter], "p", 0.0))
    if len(probabilities) > 1:
        return f"its adapters have different dropout probabilities, {sorted(probabilities)}"
    others = [
        n for n, m in layer.named_modules() if isinstance(m, LoraLayer) and n.rsplit(".", 1)[-1] not in sum(names, ())
    ]
    return f"LoRA is on {others[0]}, and the fused layer supports it on linear layers" if others else None


def _linear_obstacle(name: str, module: Any) -> str | None:
    base = base_of(module)
    if type(base) is not nn.Linear:
        return f"{name} is a {type(base).__name__}, and the fused layer supports nn.Linear"
    if not isinstance(module, LoraLayer):
        return None
    if type(module) is not LoraModule or any(getattr(module, "use_dora", {}).values()) or module.lora_variant:
        return f"{name} has a variant of LoRA ({type(module).__name__}), and the fused layer supports plain LoRA"
    if len([n for n in module.active_adapters if n in module.lora_A]) > 1:
        return f"{name} has several active adapters; merge them, or leave one active"
    adapter = _active(module)
    if adapter is None:
        return None
    if module.lora_A[adapter].bias is not None or module.lora_B[adapter].bias is not None:
        return f"the adapter of {name} has biases, and the fused layer supports plain LoRA"
    dtype = module.lora_A[adapter].weight.dtype
    if dtype != base.weight.dtype:
        return f"the adapter of {name} is {dtype} on a base of {base.weight.dtype}; the fused layer needs one dtype"
    return None
