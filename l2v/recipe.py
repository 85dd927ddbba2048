"""The recipe: one YAML file that holds a base model and a tree of stages.

A leaf of the import tree: dataclasses only, read by `l2v.recipe_io`. Every key that a recipe may carry is a field
here, with its type and default; anything else in a file is an error that names the nearest valid key.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from l2v.errors import RecipeError
from l2v.source import Source

Direction = Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
MAX_PREFIXES = 16  # as many as the kernels of l2v_kernels.info_nce take
LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Template:
    """What stands around a text in the contrastive stages: prefix + instruction + text + suffix.

    Only the text and the suffix are pooled (the reference's rule: header and instruction are left out, a trailing
    end-of-turn token is kept).
    """

    prefix: str = ""
    suffix: str = ""
    instruction: str = "{instruction} "


Backend = Literal["l2v", "sdpa", "flash_attention_2"]
"""What computes attention."""


@dataclass
class Base:
    """The decoder that becomes an encoder."""

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
    mask_token: str = "_"
    trust_remote_code: bool = False


@dataclass
class Lora:
    """LoRA of every stage (Hu et al. 2021, arXiv 2106.09685); a stage may override single keys."""

    r: int = 16
    alpha: float = 32
    dropout: float = 0.05
    targets: list[str] = field(default_factory=lambda: list(LLAMA_LINEARS))


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
    """What all three stages share."""

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
    decay_epochs: float | None = 3.0
    decay_steps: int | None = None
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    lora: Lora = field(default_factory=Lora)
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
    arXiv 2506.05176, section 3. `matryoshka`: Kusupati et al. 2022, arXiv 2205.13147. `homogeneous`: what meets in one loss
    comes from one source.
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

    @property
    def grouped(self) -> bool:
        """Some source names a column of groups; known to all ranks, whatever rows they hold."""
        return any(source.group for source in (*self.data, *self.eval_data))


@dataclass(kw_only=True)
class Simcse(Contrastive):
    """Unsupervised SimCSE: the pair is a text and itself under other dropout (Gao et al. 2021, arXiv 2104.08821)."""

    objective: Literal["simcse"] = "simcse"
    attention_dropout: float = 0.3


@dataclass(kw_only=True)
class Supervised(Contrastive):
    """Multiple negatives ranking over (query, positive[, hard negatives]) (Henderson et al. 2017, arXiv 1705.00652)."""

    objective: Literal["supervised"] = "supervised"
    scale: float = 50.0
    max_negatives: int = 1


OBJECTIVES: dict[str, type[Stage]] = {"mntp": Mntp, "simcse": Simcse, "supervised": Supervised}


@dataclass
class Recipe:
    """A base, what its stages share, and the tree of stages."""

    name: str
    base: Base
    stages: dict[str, Stage]
    out: str | None = None
    seed: int = 42
    lora: Lora = field(default_factory=Lora)
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
                raise RecipeError(f"stage '{name}': its `from` chain runs in a circle through '{at.from_}'")
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


def _need(condition: bool, sentence: str) -> None:
    if not condition:
        raise RecipeError(sentence)


def _check_comparison(stage: Contrastive, at: str) -> None:
    """What a contrastive stage compares, and on how many dimensions."""
    chosen = stage.directions
    _need(
        "query_to_doc" in chosen and len(set(chosen)) == len(chosen),
        f"{at}: directions are {', '.join(chosen) or 'none'}; name query_to_doc, and each of the others at most once",
    )
    if stage.partition == "per_direction":
        _need(
            set(chosen) == {"query_to_doc", "doc_to_query"},
            f"{at}: partition: per_direction takes the directions query_to_doc and doc_to_query, both and no other (the "
            "others hold no positive of their own); use partition: joint, or these two",
        )
    if stage.hard_negatives == "own":
        _need(
            isinstance(stage, Supervised) and stage.max_negatives > 0,
            f"{at}: hard_negatives: own needs hard negatives: a supervised stage with max_negatives of at least 1",
        )
    margin = stage.false_negative_margin
    _need(
        margin is None or -2 < margin < 2,
        f"{at}: false_negative_margin is {margin} and must lie between -2 and 2, as differences of cosines do; "
        "null leaves every negative in",
    )
    lengths, weights = stage.matryoshka, stage.matryoshka_weights
    if lengths is None:
        _need(weights is None, f"{at}: matryoshka_weights need matryoshka, the prefix lengths that they belong to")
        return
    ascending = bool(lengths) and lengths[0] >= 1 and all(a < b for a, b in itertools.pairwise(lengths))
    _need(
        ascending and len(lengths) <= MAX_PREFIXES,
        f"{at}: matryoshka is {lengths}; give 1 to {MAX_PREFIXES} ascending prefix lengths, or null",
    )
    if weights is not None:
        _need(
            len(weights) == len(lengths),
            f"{at}: {len(weights)} matryoshka_weights for {len(lengths)} matryoshka lengths; give one each",
        )
        _need(
            min(weights) >= 0 and 0 < sum(weights) < math.inf,
            f"{at}: matryoshka_weights are {weights}; none may be negative, and one must be above 0",
        )


def _check_base_precision(recipe: Recipe, where: str) -> None:
    """What a frozen base in fewer bits goes with."""
    base, how = recipe.base, recipe.base.base_precision
    if how == "same":
        return
    at, same = f"{where}: base.base_precision: {how}", "use base.base_precision: same"
    _need(
        recipe.zero.stage < 3,
        f"{at} does not go with zero.stage: 3, which shards the weights as they were loaded; use a lower stage, or {same}",
    )
    if how == "fp8":
        _need(base.layers != "plain", f"{at} needs fused layers; use base.layers: auto, or {same}")
        _need(
            base.backend == "l2v",
            f"{at} needs fused layers, and those need base.backend: l2v, not {base.backend}; use that, or {same}",
        )
    else:
        _need(
            base.layers != "fused",
            f"{at} runs on plain layers; use base.layers: auto, or base.base_precision: fp8 or same",
        )


def check(recipe: Recipe, where: str) -> Recipe:
    """Refuse combinations that no single field rules out. `where` names the file in the message."""
    base = recipe.base
    _need(bool(recipe.stages), f"{where}: `stages` is empty; name at least one stage with an `objective`")
    _need(
        base.layers != "fused" or base.backend == "l2v",
        f"{where}: base.layers: fused needs base.backend: l2v; with {base.backend} use base.layers: plain",
    )
    _need(
        base.init == "random" or not base.overrides,
        f"{where}: base.overrides changes the shape of the base and needs base.init: random",
    )
    _need(recipe.timeout >= 5, f"{where}: timeout is {recipe.timeout:g} and must be at least 5 (seconds)")
    _check_base_precision(recipe, where)
    for name in recipe.stages:
        try:
            recipe.chain(name)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from None
        except KeyError:
            pass  # a `from` that names no stage, said below
    for name, stage in recipe.stages.items():
        at = f"{where}: stage '{name}'"
        _need(name.replace("-", "").replace("_", "").isalnum(), f"{at}: use letters, digits, - and _ in its name")
        _need(
            stage.from_ == "base" or stage.from_ in recipe.stages,
            f"{at}: `from: {stage.from_}` names no stage; valid: base, {', '.join(recipe.stages)}",
        )
        _need(bool(stage.data), f"{at}: `data` is empty; name at least one source")
        for key in ("data", "eval_data"):
            for i, source in enumerate(getattr(stage, key)):
                source.check(stage.objective, f"{at}: {key}[{i}]")
        for key in ("batch", "micro_tokens", "length", "steps", "log_every", "keep", "skip_limit"):
            _need(getattr(stage, key) >= 1, f"{at}: {key} is {getattr(stage, key)} and must be at least 1")
        for key in ("warmup", "eval_every", "save_every", "weight_decay", "clip"):
            _need(getattr(stage, key) >= 0, f"{at}: {key} is {getattr(stage, key)} and must not be negative")
        _need(stage.lr > 0, f"{at}: lr is {stage.lr} and must be above 0")
        _need(0 <= stage.lora.dropout < 0.99, f"{at}: lora.dropout is {stage.lora.dropout}; use 0 up to 0.99")
        _need(stage.lora.r >= 1, f"{at}: lora.r is {stage.lora.r} and must be at least 1")
        _need(stage.length >= 2, f"{at}: length is {stage.length}; a text needs at least 2 tokens")
        _need(
            stage.length <= stage.micro_tokens,
            f"{at}: one text of length {stage.length} does not fit micro_tokens {stage.micro_tokens}; raise micro_tokens",
        )
        if isinstance(stage, Mntp):
            _need(0 < stage.mask_probability < 1, f"{at}: mask_probability is {stage.mask_probability}; use 0 to 1")
            total = sum(stage.mask_split)
            _need(
                abs(total - 1) < 1e-6 and min(stage.mask_split) >= 0,
                f"{at}: mask_split (mask, random, keep) adds up to {total:g} and must add up to 1",
            )
        if isinstance(stage, Contrastive):
            _need(stage.scale > 0, f"{at}: scale is {stage.scale} and must be above 0")
            _need(
                (stage.negatives == "micro") == (stage.group is not None),
                f"{at}: `group` (examples that share their negatives) goes with `negatives: micro`, and only with it",
            )
            if stage.group is not None:
                _need(
                    stage.group >= 2 and stage.batch % stage.group == 0,
                    f"{at}: batch {stage.batch} is no multiple of group {stage.group}",
                )
            _need(stage.batch >= 2, f"{at}: a batch of {stage.batch} has no in-batch negatives; use at least 2")
            _check_comparison(stage, at)
        if isinstance(stage, Simcse):
            p = stage.attention_dropout
            _need(0 <= p < 0.99, f"{at}: attention_dropout is {p}; use 0 up to 0.99")
            _need(
                p == 0 or base.backend == "l2v",
                f"{at}: attention_dropout {p} needs base.backend: l2v; {base.backend} cannot address its noise",
            )
            _need(
                p > 0 or stage.lora.dropout > 0,
                f"{at}: with no dropout at all the two views are the same; set attention_dropout or lora.dropout",
            )
        if isinstance(stage, Supervised):
            _need(stage.max_negatives >= 0, f"{at}: max_negatives must not be negative")
    return recipe
