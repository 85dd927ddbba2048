"""Checks of combinations of recipe keys."""

from __future__ import annotations

import itertools
import math

from l2v.errors import RecipeError
from l2v.recipe.schema import MAX_PREFIXES, Contrastive, Lora, Mntp, Recipe, Simcse, Stage, Supervised


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
            isinstance(stage, Supervised) and (stage.max_negatives == "auto" or stage.max_negatives > 0),
            f"{at}: hard_negatives: own needs hard negatives: a supervised stage with max_negatives: auto, or of at least 1",
        )
    margin = stage.false_negative_margin
    _need(
        margin is None or -2 < margin < 2,
        f"{at}: false_negative_margin is {margin} and must lie between -2 and 2, as differences of cosines do; "
        "null keeps every negative",
    )
    lengths, weights = stage.matryoshka, stage.matryoshka_weights
    if lengths is None:
        _need(weights is None, f"{at}: matryoshka_weights need matryoshka, the prefix lengths that they weight")
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
    """Which settings a frozen base in fewer bits can be combined with."""
    base, how = recipe.base, recipe.base.base_precision
    if how == "same":
        return
    at, same = f"{where}: base.base_precision: {how}", "use base.base_precision: same"
    for name, stage in recipe.stages.items():
        _need(
            stage.lora is not None,
            f"{at} freezes the weights that stage '{name}' trains (lora: null); {same}, or train it with lora",
        )
    _need(
        recipe.zero.stage < 3,
        f"{at} cannot be combined with zero.stage: 3, which shards the weights as they were loaded; use a lower stage, or {same}",
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


def _check_names(recipe: Recipe, name: str, stage: Stage, at: str) -> None:
    """The name of a stage, its parent and its sources."""
    _need(name.replace("-", "").replace("_", "").isalnum(), f"{at}: use letters, digits, - and _ in its name")
    _need(
        stage.from_ == "base" or stage.from_ in recipe.stages,
        f"{at}: `from: {stage.from_}` names no stage; valid: base, {', '.join(recipe.stages)}",
    )
    _need(bool(stage.data), f"{at}: `data` is empty; name at least one source")
    for key in ("data", "eval_data"):
        for i, source in enumerate(getattr(stage, key)):
            source.check(stage.objective, f"{at}: {key}[{i}]")


def _check_numbers(stage: Stage, at: str) -> None:
    """The bounds of the numbers that all stages have."""
    for key in ("batch", "micro_tokens", "length", "steps", "log_every", "keep", "skip_limit"):
        _need(getattr(stage, key) >= 1, f"{at}: {key} is {getattr(stage, key)} and must be at least 1")
    for key in ("warmup", "eval_every", "save_every", "weight_decay", "clip"):
        _need(getattr(stage, key) >= 0, f"{at}: {key} is {getattr(stage, key)} and must not be negative")
    _need(
        stage.decay_steps in (None, "end") or int(stage.decay_steps) >= 0,
        f"{at}: decay_steps is {stage.decay_steps} and must not be negative; end is the last step",
    )
    _need(
        stage.decay != "cosine" or stage.decay_steps is not None or stage.decay_epochs is not None,
        f"{at}: decay: cosine needs its end: decay_steps: end, or another number of steps or epochs",
    )
    _need(stage.lr > 0, f"{at}: lr is {stage.lr} and must be above 0")
    if stage.lora is not None:
        _check_lora(stage.lora, at)
    _need(stage.length >= 2, f"{at}: length is {stage.length}; a text needs at least 2 tokens")
    _need(
        stage.length <= stage.micro_tokens,
        f"{at}: one text of length {stage.length} does not fit micro_tokens {stage.micro_tokens}; raise micro_tokens",
    )


def _check_lora(lora: Lora, at: str) -> None:
    """The bounds of its numbers, and patterns of numbers. Whether targets exist is seen when the base is loaded."""
    _need(0 <= lora.dropout < 0.99, f"{at}: lora.dropout is {lora.dropout}; use 0 up to 0.99")
    _need(lora.r >= 1, f"{at}: lora.r is {lora.r} and must be at least 1")
    _need(bool(lora.targets), f"{at}: lora.targets is empty; name linear layers, or use all-linear")
    for layer, rank in lora.rank_pattern.items():
        valid = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
        _need(valid, f"{at}: lora.rank_pattern.{layer} is {rank!r}; give a whole number from 1")
    for layer, alpha in lora.alpha_pattern.items():
        valid = isinstance(alpha, int | float) and not isinstance(alpha, bool) and math.isfinite(alpha)
        _need(valid, f"{at}: lora.alpha_pattern.{layer} is {alpha!r}; give a number")
    ranks = [lora.r, *lora.rank_pattern.values()]
    _need(
        lora.init != "orthogonal" or all(rank % 2 == 0 for rank in ranks),
        f"{at}: lora.init: orthogonal halves the rank and needs even ones; lora has {', '.join(map(str, ranks))}",
    )
    tokens = lora.trainable_tokens
    _need(len(set(tokens)) == len(tokens), f"{at}: lora.trainable_tokens names a token twice: {', '.join(tokens)}")


def _check_variant(recipe: Recipe, stage: Stage, at: str) -> None:
    """What of a stage's LoRA cannot be combined with other keys."""
    lora, base, zero = stage.lora, recipe.base, recipe.zero.stage
    if lora is None:
        return
    _need(
        lora.variant != "dora" or base.base_precision == "same",
        f"{at}: lora.variant: dora reads the base's full weights; use base.base_precision: same, or variant: lora",
    )
    _need(
        lora.variant != "dora" or base.layers != "fused",
        f"{at}: lora.variant: dora runs on plain layers; use base.layers: auto, or variant: lora",
    )
    _need(
        zero < 3 or (lora.variant != "dora" and not lora.trainable_tokens),
        f"{at}: lora.variant: dora and lora.trainable_tokens read weights that zero.stage: 3 has spread over the ranks; use a "
        "lower stage",
    )


def _check_masking(stage: Mntp, at: str) -> None:
    _need(0 < stage.mask_probability < 1, f"{at}: mask_probability is {stage.mask_probability}; use 0 to 1")
    total = sum(stage.mask_split)
    _need(
        abs(total - 1) < 1e-6 and min(stage.mask_split) >= 0,
        f"{at}: mask_split (mask, random, keep) adds up to {total:g} and must add up to 1",
    )


def _check_contrastive(stage: Contrastive, at: str) -> None:
    _need(stage.scale > 0, f"{at}: scale is {stage.scale} and must be above 0")
    _need(
        (stage.negatives == "micro") == (stage.group is not None),
        f"{at}: `group` (examples that share their negatives) applies only to `negatives: micro`, which needs it",
    )
    if stage.group is not None:
        _need(
            stage.group >= 2 and stage.batch % stage.group == 0,
            f"{at}: batch {stage.batch} is not a multiple of group {stage.group}",
        )
    _need(stage.batch >= 2, f"{at}: a batch of {stage.batch} has no in-batch negatives; use at least 2")
    _check_comparison(stage, at)


def _check_dropout(stage: Simcse, backend: str, at: str) -> None:
    p = stage.attention_dropout
    _need(0 <= p < 0.99, f"{at}: attention_dropout is {p}; use 0 up to 0.99")
    _need(
        p == 0 or backend == "l2v",
        f"{at}: attention_dropout {p} needs base.backend: l2v; {backend} has no counter-based dropout",
    )
    if stage.lora is None:
        _need(
            p > 0,
            f"{at}: without any dropout the two views are the same, and lora: null has none of its own; set attention_dropout",
        )
    else:
        _need(
            p > 0 or stage.lora.dropout > 0,
            f"{at}: without any dropout the two views are the same; set attention_dropout or lora.dropout",
        )


def check(recipe: Recipe, where: str) -> Recipe:
    """Check the whole recipe. `where` names the file in the message."""
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
            pass  # an unknown `from` is reported below
    for name, stage in recipe.stages.items():
        at = f"{where}: stage '{name}'"
        _check_names(recipe, name, stage, at)
        _check_numbers(stage, at)
        _check_variant(recipe, stage, at)
        if isinstance(stage, Mntp):
            _check_masking(stage, at)
        if isinstance(stage, Contrastive):
            _check_contrastive(stage, at)
        if isinstance(stage, Simcse):
            _check_dropout(stage, base.backend, at)
        if isinstance(stage, Supervised):
            _need(
                stage.max_negatives == "auto" or stage.max_negatives >= 0,
                f"{at}: max_negatives is {stage.max_negatives} and must not be negative",
            )
    return recipe
