"""The matrix of `l2v doctor --bases`: which architectures can be a base, how they run, and what was measured of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from l2v.errors import UserError
from l2v.model.direction import TOLERANCE
from l2v.model.export_config import direction_keys
from l2v.model.export_proof import export_differences, settle
from l2v.model.proof import Proof, measure
from l2v.model.settings import open_chunks, quiet_transformers, state_direction

LINEAR = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
MAMBA = ["mamba", "mamba", "attention", "mamba"]
MOE: dict[str, Any] = {"num_experts_per_tok": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    # Llama and what is built like it
    "llama": {}, "mistral": {}, "mixtral": {}, "ministral3": {}, "qwen2": {}, "qwen2_moe": {}, "qwen3": {}, "qwen3_moe": {},
    "smollm3": {}, "olmo": {}, "olmo2": {}, "olmo3": {}, "olmoe": {}, "cohere": {}, "cohere2": {}, "phi": {}, "phi3": {},
    "phimoe": {}, "stablelm": {}, "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "starcoder2": {}, "granite": {}, "granitemoe": {}, "glm": {},
    "glm4": {}, "glm4_moe": {}, "exaone4": {}, "ernie4_5": {}, "hunyuan_v1_dense": {"head_dim": 128}, "helium": {}, "arcee": {},
    "apertus": {}, "seed_oss": {}, "bitnet": {}, "diffllama": {}, "doge": {}, "nanochat": {}, "jetmoe": {}, "persimmon": {},
    "modernbert-decoder": {},
    # softcaps, sinks, chunks, windows
    "gemma": {}, "gemma2": {}, "gemma3_text": {}, "gemma4_text": {}, "vaultgemma": {}, "gpt_oss": {}, "llama4_text": {},
    # multi-head latent attention
    "deepseek_v2": MOE | {"n_group": 1, "topk_group": 1, "topk_method": "greedy"}, "deepseek_v3": {}, "minicpm3": {},
    "longcat_flash": {},
    # GPT-2 and its time
    "gpt2": {}, "gpt-sw3": {}, "gpt_bigcode": {}, "gpt_neo": {}, "gpt_neox": {}, "gptj": {}, "codegen": {}, "bloom": {},
    "mpt": {}, "opt": {}, "falcon": {}, "biogpt": {}, "xglm": {}, "ctrl": {}, "openai-gpt": {},
    # hybrids
    "qwen3_next": {}, "qwen3_5_text": {}, "lfm2": {"layer_types": (["conv", "conv", "full_attention"] * 11)[:32]}, "lfm3": {},
    "falcon_h1": {}, "olmo_hybrid": {}, "jamba": {}, "bamba": {"attn_layer_indices": [2, 5]},
    "granitemoehybrid": {"layer_types": MAMBA * 8, "num_local_experts": 4, "mamba_n_heads": 128, "mamba_d_head": 64},
    "nemotron_h": {}, "minimax": {}, "recurrent_gemma": {},
    # no attention at all
    "mamba": {}, "mamba2": {}, "falcon_mamba": {}, "rwkv": {},
    # encoders
    "bert": {}, "roberta": {}, "xlm-roberta": {}, "camembert": {}, "electra": {}, "distilbert": {}, "albert": {}, "mpnet": {},
    "deberta-v2": {}, "modernbert": {}, "eurobert": {}, "nomic_bert": {}, "gte": {}, "jina_embeddings_v3": {}, "ernie": {},
    "megatron-bert": {},
}  # fmt: skip
"""model_type: what its default configuration lacks. Sizes do not matter: the proof makes a small copy."""
HEADER = "| architecture | direction | runs | attention | layers | isolation | eager | export | remarks |\n|-|-|-|-|-|-|-|-|-|"


@dataclass(frozen=True)
class Row:
    """What was measured of an architecture. direction: bidirectional, causal where only that is served, or none. export:
    whether plain transformers computes the same from the export.
    """

    name: str
    direction: str
    proof: Proof
    remarks: str
    export: str = ""

    @property
    def served(self) -> bool:
        """Whether it can be a base."""
        return self.direction != "none"

    @property
    def wrong(self) -> bool:
        """Whether it is served and leaks, or differs from transformers."""
        return self.served and not max(self.proof.apart, self.proof.eager) <= TOLERANCE

    def cells(self) -> list[str]:
        """The row of the table, without digits that differ between machines."""
        if not self.served:
            return [self.name, "refused", "", "", "", "", "", "", self.remarks]
        proof = self.proof
        measured = [_limit(proof.apart), _limit(proof.eager)]
        layers = "fused" if proof.fused else "plain"
        path = [proof.path.layout, proof.path.attention]
        return [self.name, self.direction, *path, layers, *measured, self.export, self.remarks]


def matrix(names: Sequence[str] = (), log: Callable[[str], None] | None = None) -> list[Row]:
    """Measure architectures, by default all of ARCHITECTURES that the installed transformers has.

    Raises:
        UserError: a name is not in ARCHITECTURES, or not in the installed transformers.
    """
    for name in names:
        if name not in ARCHITECTURES:
            raise UserError(f"'{name}' is not in the matrix; it has {', '.join(ARCHITECTURES)}")
        if name not in CONFIG_MAPPING:
            raise UserError(f"transformers {transformers.__version__} has no '{name}'; a newer one may")
    rows = []
    for name in names or (name for name in ARCHITECTURES if name in CONFIG_MAPPING):
        rows.append(examine(name, ARCHITECTURES[name]))
        if log is not None:
            log(" | ".join(rows[-1].cells()))
    return rows


def examine(name: str, changes: dict[str, Any]) -> Row:
    """The row of one architecture: bidirectional, else causal."""
    tried: dict[str, Proof] = {}
    for direction in ("bidirectional", "causal"):
        causal = direction == "causal"
        config = AutoConfig.for_model(name, **changes)
        if not causal:
            open_chunks(config)
        state_direction(config, causal=causal)
        with quiet_transformers():
            proof = tried[direction] = measure(config, backend="l2v", causal=causal)
        if not proof.refused and not proof.open:
            remarks = _remarks(tried, direction)
            with quiet_transformers():
                export = _export(config, proof, causal)
            return Row(name, direction, proof, remarks, export)
    first = tried["bidirectional"]
    return Row(name, "none", first, first.refused or first.slower or "")


def _export(config: Any, proof: Proof, causal: bool) -> str:
    try:
        keys = settle(
            lambda keys: export_differences(config, proof, causal=causal, keys=keys),
            direction_keys(config, causal=causal),
        )
    except UserError as error:
        return f"refused: {error}"
    attention = keys.get("_attn_implementation")
    return "equal" if attention is None else f"equal with {attention} attention, which its file states"


def _remarks(tried: dict[str, Proof], direction: str) -> str:
    proof = tried[direction]
    before = [f"bidirectional: {tried['bidirectional'].refused}"] if direction == "causal" else []
    alone = [f"causal in itself: {', '.join(proof.alone)}"] if proof.alone else []
    return "; ".join([*before, *alone, *([proof.slower] if proof.slower else [])])


def _limit(measured: float) -> str:
    """Below the tolerance only that is said: digits depend on the machine."""
    return "yes" if measured <= TOLERANCE else f"{measured:.1g} off"


def render(rows: Sequence[Row]) -> str:
    """The table as Markdown, with its sum below."""
    lines = [HEADER, *("| " + " | ".join(cell.replace("|", "/") for cell in row.cells()) + " |" for row in rows)]
    served = [row for row in rows if row.served]
    both = [row for row in served if row.direction == "bidirectional"]
    packed = [row for row in served if row.proof.path.layout == "packed"]
    wrong = [row.name for row in rows if row.wrong]
    if older := [name for name in ARCHITECTURES if name not in CONFIG_MAPPING]:
        lines += ["", f"Not in transformers {transformers.__version__}: {', '.join(older)}."]
    lines += [
        "",
        f"{len(rows)} architectures: {len(both)} served bidirectionally, {len(served) - len(both)} causally only, "
        f"{len(rows) - len(served)} refused; {len(packed)} run packed. Wrong: {', '.join(wrong) or 'none'}.",
    ]
    return "\n".join(lines)
