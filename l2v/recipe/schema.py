"""The recipe: one YAML file that holds a base model and a tree of stages.

A leaf of the import tree: dataclasses only, read by `l2v.recipe.load`. Every key of a recipe is a field
here, with its type and default; anything else in a file is an error that names the nearest valid key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from l2v.errors import RecipeError
from l2v.recipe.source import Source

Direction = Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
MAX_PREFIXES = 16  # the limit of the kernels in l2v_kernels.info_nce
MAX_AUTO_NEGATIVES = 7
"""Hard negatives of a row that `max_negatives: auto` uses at most; `l2v data mine` finds at most as many."""
LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL_LINEAR = "all-linear"
"""As a target: every linear layer of the decoder."""


@dataclass
class Template:
    """The template of a text in the contrastive stages: prefix + instruction + text + suffix.

    Only the text and the suffix are pooled (as in McGill's llm2vec: header and instruction are excluded, a trailing
    end-of-turn token is included).
    """

    prefix: str = ""
    suffix: str = ""
    instruction: str = "{instruction} "


Backend = Literal["l2v", "sdpa", "flash_attention_2"]
"""The attention implementation."""


@dataclass
class Base:
    """The decoder that becomes an encoder.

    pool_prompt: all tokens are pooled, also special tokens, template and instruction; engines without prompts to exclude
    (vLLM, Text Embeddings Inference) then give the vectors of the training.
    """

    model: str
    revision: str | None = None
    tokenizer: str | None = None
    init: Literal["pretrained", "random"] = "pretrained"
    config: dict[str, Any] | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    backend: Backend = "l2v"
    layers: Literal["auto", "fused", "plain"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    base_precision: Literal["same", "fp8", "nf4"] = "same"
    template: Template = field(default_factory=Template)
    pooling: Literal["mean", "weighted_mean", "last", "first"] = "mean"
    pool_prompt: bool = False
    mask_token: str = "_"
    trust_remote_code: bool = False


@dataclass
class Lora:
    """LoRA of every stage (Hu et al. 2021, arXiv 2106.09685); a stage may override single keys, or have `lora: null`.

    variant: rslora scales by alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732), dora trains the norm of each row apart
    (Liu et al. 2024, arXiv 2402.09353). init: none of the choices changes the base's weights. rank_pattern, alpha_pattern: r
    and alpha of layers whose name ends in a match of the key, a regular expression. trainable_tokens: their vectors are
    trained as well.
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.05
    targets: list[str] = field(default_factory=lambda: list(LLAMA_LINEARS))
    variant: Literal["lora", "rslora", "dora"] = "lora"
    init: Literal["default", "gaussian", "orthogonal"] = "default"
    rank_pattern: dict[str, Any] = field(default_factory=dict)
    alpha_pattern: dict[str, Any] = field(default_factory=dict)
    trainable_tokens: list[str] = field(default_factory=list)

    @property
    def pattern(self) -> str | None:
        """The targets as a regular expression, if they are one: a single text with a character that no name has."""
        single = self.targets[0] if len(self.targets) == 1 else ""
        return single if re.search(r"[*+?()\[\]{}|\\^$]", single) else None

    @property
    def linears(self) -> tuple[str, ...]:
        """Which linears of a layer of the Llama family get an adapter, for estimates."""
        if self.targets == [ALL_LINEAR]:
            return LLAMA_LINEARS
        if self.pattern is None:
            return tuple(self.targets)
        where = {name: "self_attn" if name[0] in "qkvo" else "mlp" for name in LLAMA_LINEARS}
        return tuple(name for name in LLAMA_LINEARS if re.search(self.pattern, f"layers.0.{where[name]}.{name}"))

    @property
    def largest_rank(self) -> int:
        """Of all layers, for estimates."""
        return max([self.r, *self.rank_pattern.values()])


@dataclass
class Zero:
    """DeepSpeed's ZeRO: which stage, and whether optimizer or parameters live in host memory."""

    stage: Literal[0, 1, 2, 3] = 1
    offload_optimizer: bool = False
    offload_parameters: bool = False
    config: str | None = None


@dataclass
class Tracking:
    """Where metrics go besides metrics.jsonl, which is always written."""

    tensorboard: bool = True
    wandb: str | None = None


@dataclass(kw_only=True)
class Stage:
    """Keys of all stages. lora: None trains all weights of the decoder."""

    objective: str
    from_: str = "base"
    adapters: list[str] | None = None
    data: list[Source]
    eval_data: list[Source] = field(default_factory=list)
    batch: int
    micro_tokens: int = 16384
    length: int = 512
    steps: int
    lr: float
    warmup: int = 0
    decay: Literal["linear", "cosine", "none"] = "linear"
    decay_epochs: float | None = 3.0
    decay_steps: int | Literal["end"] | None = None
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    lora: Lora | None = field(default_factory=Lora)
    recompute: Literal["auto", "none", "cheap", "layer"] = "auto"
    log_every: int = 1
    eval_every: int = 0
    save_every: int = 0
    keep: int = 2
    skip_limit: int = 3
    seed: int | None = None


@dataclass(kw_only=True)
class Mntp(Stage):
    """Masked next-token prediction (BehnamGhader et al. 2024, arXiv 2404.05961, section 2.2)."""

    objective: Literal["mntp"] = "mntp"
    mask_probability: float = 0.2
    mask_split: tuple[float, float, float] = (0.8, 0.1, 0.1)
    document_mask: bool = True


@dataclass(kw_only=True)
class Contrastive(Stage):
    """InfoNCE on cosine similarity; `scale` is one over the temperature.

    What a query is compared with: `directions` (GTE, Li et al. 2023, arXiv 2308.03281) in one softmax or, `partition:
    per_direction`, one each (CLIP, Radford et al. 2021, arXiv 2103.00020). `false_negative_margin`: Zhang et al. 2025,
    arXiv 2506.05176, section 3. `matryoshka`: Kusupati et al. 2022, arXiv 2205.13147. `homogeneous`: all examples
    of one loss come from one source. `quantize`: the loss compares int8 or binary vectors, with a straight-through gradient
    (Bengio et al. 2013, arXiv 1308.3432; for embeddings arXiv 2602.11151).
    """

    scale: float = 20.0
    negatives: Literal["global", "micro"] = "global"
    group: int | None = None
    mask_duplicates: bool = True
    homogeneous: bool = False
    directions: list[Direction] = field(default_factory=lambda: ["query_to_doc"])
    partition: Literal["joint", "per_direction"] = "joint"
    hard_negatives: Literal["all", "own"] = "all"
    false_negative_margin: float | None = None
    matryoshka: list[int] | None = None
    matryoshka_weights: list[float] | None = None
    quantize: Literal["int8", "binary"] | None = None

    @property
    def grouped(self) -> bool:
        """Whether any source names a column of groups; the same on all ranks."""
        return any(source.group for source in (*self.data, *self.eval_data))


@dataclass(kw_only=True)
class Simcse(Contrastive):
    """Unsupervised SimCSE: the pair is a text and itself under another dropout mask (Gao et al. 2021, arXiv 2104.08821)."""

    objective: Literal["simcse"] = "simcse"
    attention_dropout: float = 0.3


@dataclass(kw_only=True)
class Supervised(Contrastive):
    """Multiple negatives ranking over (query, positive[, hard negatives]) (Henderson et al. 2017, arXiv 1705.00652).

    max_negatives: hard negatives of a row that are used; auto: those that the row has, at most MAX_AUTO_NEGATIVES.
    """

    objective: Literal["supervised"] = "supervised"
    scale: float = 50.0
    max_negatives: int | Literal["auto"] = "auto"


OBJECTIVES: dict[str, type[Stage]] = {"mntp": Mntp, "simcse": Simcse, "supervised": Supervised}


@dataclass
class Recipe:
    """A base, keys shared by its stages, and the tree of stages."""

    name: str
    base: Base
    stages: dict[str, Stage]
    out: str | None = None
    seed: int = 42
    lora: Lora | None = field(default_factory=Lora)
    zero: Zero = field(default_factory=Zero)
    tracking: Tracking = field(default_factory=Tracking)
    profile: bool = False
    deterministic: bool = False
    timeout: float = 900.0

    def stage_seed(self, name: str) -> int:
        """The seed of a stage: its own or the recipe's."""
        own = self.stages[name].seed
        return self.seed if own is None else own

    def chain(self, name: str) -> list[str]:
        """The stages whose adapters are merged into the base before `name`, oldest first."""
        names: list[str] = []
        at = self.stages[name]
        while at.adapters is None and at.from_ != "base":
            if at.from_ in names or at.from_ == name:
                raise RecipeError(f"stage '{name}': its `from` chain is circular through '{at.from_}'")
            names.append(at.from_)
            at = self.stages[at.from_]
        return names[::-1]

    def order(self) -> list[str]:
        """All stages, each after the one it starts from."""
        done: list[str] = []
        for name in self.stages:
            for each in [*self.chain(name), name]:
                if each not in done:
                    done.append(each)
        return done
