"""One decoder layer with LoRA, forward and backward: fused, transformers + PEFT, compiled, and without LoRA at all.

l2v bench fused_layer [--quick] [--out FOLDER]

The layer is that of the recipe (rank 16, dropout 0.05 on all seven linears) with frozen weights. "fused, no LoRA" is the
layer's own forward and input gradient: what LoRA costs is the difference. On a CPU it runs tiny sizes as a smoke
test, and labels everything it writes as one.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from benchmarks.command import Comparison, Setup
from benchmarks.harness import Ceilings, Result, Target, attempt, peak_memory, release, time_results
from l2v.batch import PackedBatch, Segment, pack
from l2v.model.load import inner_model, load_model
from l2v.model.lora import add_lora, trainable
from l2v.model.memory import LayerShape
from l2v.model.packed import PackedDecoder
from l2v.recipe import Base, Lora

LLAMA3_8B = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
}
MINI = {**LLAMA3_8B, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
LORA = Lora(r=16, alpha=32, dropout=0.05)


@dataclass(frozen=True)
class Variant:
    """One way to run the layer."""

    name: str
    layers: str
    lora: Lora | None = field(default_factory=lambda: LORA)
    recompute: str = "cheap"
    compiled: bool = False


VARIANTS = (
    Variant("fused", "fused"),
    Variant("fused, keep all", "fused", recompute="none"),
    Variant("fused, recompute layer", "fused", recompute="layer"),
    Variant("fused, no dropout", "fused", lora=Lora(r=16, alpha=32, dropout=0.0)),
    Variant("fused, no LoRA", "fused", lora=None),
    Variant("transformers + PEFT", "plain"),
    Variant("transformers + PEFT, torch.compile", "plain", compiled=True),
)


@dataclass(frozen=True)
class Workload:
    """Segments of one length."""

    name: str
    tokens: int
    length: int

    def batch(self) -> PackedBatch:
        """Random token ids."""
        generator = np.random.default_rng(0)
        n = self.tokens // self.length
        return pack([Segment(generator.integers(3, 1000, self.length), example=i) for i in range(n)], seed=1)


def workloads(device: torch.device, quick: bool) -> list[Workload]:
    """16k tokens of 512 on a GPU, also of 32 unless quick; a few on a CPU."""
    if device.type != "cuda":
        return [Workload("96 tokens of 24", 96, 24)]
    found = [Workload("16k tokens of 512", 16384, 512)]
    return found if quick else [*found, Workload("16k tokens of 32", 16384, 32)]


def model_of(variant: Variant, config: dict, device: torch.device, dtype: torch.dtype, layers: int) -> PackedDecoder:
    """A decoder of `layers` layers whose token states require grad, as in the middle of a stack."""
    base = Base(model="benchmark", init="random", config=config | {"num_hidden_layers": layers})
    decoder = inner_model(load_model(base, head=False, dtype=dtype))
    if variant.lora:
        decoder = add_lora(decoder, variant.lora, base_name="benchmark", seed=0)
    model = PackedDecoder(decoder, layers=variant.layers).to(device).train()
    inner = decoder.get_base_model() if variant.lora else decoder
    inner.embed_tokens.register_forward_hook(lambda _m, _i, out: out.requires_grad_())
    model.set_recompute(variant.recompute)
    if model.fused is not None:
        model.fused.stack_weights()
    if variant.compiled:
        for layer in inner.layers:
            layer.compile(dynamic=False)
    return model


def step_of(model: PackedDecoder, batch: PackedBatch) -> Callable[[], list[torch.Tensor]]:
    """Forward and backward of a fixed sum of the hidden states."""
    leaves = list(trainable(model).values()) or [next(iter(model.parameters()))]
    weight = None

    def run() -> list[torch.Tensor]:
        nonlocal weight
        hidden_TE = model(batch, "hidden")
        if weight is None:
            weight = torch.randn(hidden_TE.shape, generator=torch.Generator().manual_seed(0)).to(hidden_TE)
        for leaf in leaves:
            leaf.grad = None
        hidden_TE.backward(weight)
        return [hidden_TE.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    return run


def flops(config: dict, w: Workload, layers: int) -> float:
    """4N a token for frozen linears, and attention's matmuls: 4 forward and 10 backward for each pair and dimension."""
    E, heads = config["hidden_size"], config["num_attention_heads"]
    shape = LayerShape(E, config["intermediate_size"], heads, config["num_key_value_heads"], E // heads, layers)
    return layers * w.tokens * (4 * shape.linear_parameters + 14 * w.length * E)


def run(w: Workload, config: dict, ceilings: Ceilings, device: torch.device, seconds: float, layers: int = 2):
    """All variants on one workload."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    batch = w.batch().to(device)
    results, calls, truth = [], {}, None
    for variant in VARIANTS:
        result = Result(w.name, variant.name, "forward + backward", flops=flops(config, w, layers))
        result.facts["layers"] = layers
        results.append(result)
        if variant.compiled and device.type != "cuda":
            result.skipped = "compiled for CUDA only"
            continue
        with attempt(result):
            step = step_of(model_of(variant, config, device, dtype, layers), batch)
            found = step()
            if variant.lora == LORA:
                truth = truth or found
                result.error = error_of(found, truth, dtype)
            result.memory = peak_memory(step, device)
            calls[variant.name] = [step]
        release(device)
    time_results(results, calls, device, ceilings, seconds)
    return results


def error_of(found: list[torch.Tensor], truth: list[torch.Tensor], dtype: torch.dtype) -> float:
    """Largest difference of gradients, over the largest gradient. Raises: ValueError if it is more than rounding."""
    scale = max(float(t.float().abs().max()) for t in truth[1:])
    error = max(float((a.float() - b.float()).abs().max()) for a, b in zip(found[1:], truth[1:], strict=True)) / scale
    if error > (0.05 if dtype == torch.bfloat16 else 1e-4):
        raise ValueError(f"gradients differ from those of '{VARIANTS[0].name}' by {error:.1e}")
    return error


def targets(results: list[Result], smoke: bool) -> list[Target]:
    """LoRA's cost over the frozen layer."""
    found = []
    for name in dict.fromkeys(x.workload for x in results):
        times = {x.provider: x.median for x in results if x.workload == name}
        ours, bare = times.get("fused"), times.get("fused, no LoRA")
        value = ours / bare - 1 if ours and bare and not smoke else None
        found.append(Target(f"{name}: LoRA's time / the frozen layer's", 0.06, value))
    return found


def parts(setup: Setup) -> Iterator[Callable[[], list[Result]]]:
    """A call for each workload."""
    config, seconds = MINI if setup.smoke else LLAMA3_8B, setup.seconds(quick=3.0, full=3.0, smoke=0.05)
    for w in workloads(setup.device, setup.quick):
        yield lambda w=w: run(w, config, setup.ceilings, setup.device, seconds)


BENCHMARK = Comparison(
    name="fused_layer",
    doc=__doc__,
    quick="one workload",
    parts=parts,
    targets=targets,
    ours=("fused",),
)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
