"""The gradient cache through the real step and a real engine: the gradient of one micro-batch, and each text encoded as
often as it must be."""

from collections import Counter

import pytest
import torch

from l2v.data.collate import collate
from l2v.data.open import open_examples
from l2v.data.sampler import Sampler
from l2v.data.tokens import TextTokenizer, load_tokenizer
from l2v.recipe.load import load_recipe
from l2v.training.build import build
from l2v.training.engine import deepspeed_config, initialize
from l2v.training.steps import StepCounts, contrastive_step

MICRO, WHOLE = 104, 8192


pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture
def step(tiny_recipe, tmp_path):
    """step(stage, *overrides) -> (loss, gradient of every LoRA tensor, encodings of every example, calls of progress)."""
    from deepspeed.utils import safe_get_full_grad

    path = tiny_recipe(
        tmp_path, **{"lora.dropout": 0.1, "stages.simcse.from": "base", "stages.supervised.from": "base"}
    )

    def run(name: str, *overrides: str):
        recipe = load_recipe(str(path), ["batch=12", "scale=20", *overrides], name)
        stage, seed = recipe.stages[name], recipe.stage_seed(name)
        texts = TextTokenizer(load_tokenizer(recipe.base.tokenizer), recipe.base.template, stage.length)
        examples = open_examples(stage.data, stage, texts)
        dtype = torch.bfloat16 if recipe.base.precision == "bf16" else torch.float32
        model, _ = build(recipe, name, dtype=dtype, seed=seed)
        model.set_recompute(stage.recompute)
        torch.manual_seed(1)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:  # at their start, zero, no gradient reaches the lora_A
                torch.nn.init.normal_(parameter, std=0.1)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        engine = initialize(model, deepspeed_config(stage, recipe.zero, dtype, count), stage)
        encoded, told = Counter(), []
        model.register_forward_pre_hook(lambda _, arguments: encoded.update(set(arguments[0].example_ids_S.tolist())))
        sampler = Sampler(examples, batch=stage.batch, micro_tokens=stage.micro_tokens, seed=seed, group=stage.group)
        units = [
            [collate(examples, micro, seed=seed, step=0) for micro in unit.micros] for unit in sampler.plan(0).units[0]
        ]
        counts = [int(sum((micro.columns_S > 0).sum() for unit in units for micro in unit))]
        engine.train()
        shares = contrastive_step(
            engine, units, stage, StepCounts(counts, [stage.batch]), progress=lambda *call: told.append(call)
        )
        assert shares["nonfinite_S"].tolist() == [False] * sum(len(m.lengths) for unit in units for m in unit)
        matrices = {key: p for key, p in model.named_parameters() if "lora_" in key}
        gradients = model.flat.split(safe_get_full_grad(model.flat.weight).double(), matrices)
        engine.destroy()
        return float(shares["loss"]), gradients, (units, encoded), told

    return run


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Of the largest gradient."""
    assert len(one) == 28 and all(value.abs().max() > 0 for value in one.values())
    largest = max(value.abs().max() for value in one.values())
    return float(max((one[key] - other[key]).abs().max() for key in one) / largest)


OPTIONS = [
    "directions=[query_to_doc, query_to_query, doc_to_query]",
    "matryoshka=[8, 32]",
    "false_negative_margin=0.05",
]


@pytest.mark.parametrize("recompute", ["none", "layer"])
@pytest.mark.parametrize(
    ("stage", "options"), [("simcse", []), ("supervised", []), ("supervised", [*OPTIONS, "hard_negatives=own"])],
    ids=["simcse", "supervised", "options"],
)  # fmt: skip
def test_the_cache_gives_the_gradient_of_one_micro_batch(step, stage, options, recompute):
    options = [*options, f"recompute={recompute}"]
    loss, whole, (units, _), _ = step(stage, f"micro_tokens={WHOLE}", *options)
    assert [len(unit) for unit in units] == [1]
    cached_loss, cached, (units, _), _ = step(stage, f"micro_tokens={MICRO}", *options)
    assert len(units[0]) >= 6
    assert cached_loss == pytest.approx(loss, rel=1e-5) and loss > 0.1
    assert difference(whole, cached) <= 1e-5


def test_a_step_compares_small_vectors_where_the_recipe_says_so(step):
    """Another loss and another gradient than that of the floats, and the same with and without the cache."""
    options = ["quantize=binary", "matryoshka=[16, 32]"]
    floats, plain, *_ = step("supervised", f"micro_tokens={WHOLE}", "matryoshka=[16, 32]")
    loss, whole, *_ = step("supervised", f"micro_tokens={WHOLE}", *options)
    cached_loss, cached, *_ = step("supervised", f"micro_tokens={MICRO}", *options)
    assert abs(loss - floats) > 1e-2 and difference(whole, plain) > 1e-2
    assert cached_loss == pytest.approx(loss, rel=1e-5) and difference(whole, cached) <= 1e-5


def test_other_dropout_would_be_seen(step):
    """The measure is worth something: another seed's masks change the gradient by far more than it allows."""
    _, one, *_ = step("simcse", f"micro_tokens={MICRO}")
    _, other, *_ = step("simcse", f"micro_tokens={MICRO}", "lora.dropout=0.11")
    assert difference(one, other) > 1e-2


@pytest.mark.parametrize("group", [None, 6])
def test_the_last_micro_batch_is_encoded_once_and_the_others_twice(step, group):
    groups = ["negatives=micro", f"group={group}"] if group else []
    _, _, (units, encoded), told = step("supervised", f"micro_tokens={MICRO}", *groups)
    assert len(units) == (2 if group else 1) and all(len(unit) > 2 for unit in units)
    for unit in units:
        for at, micro in enumerate(unit):
            for example in set(micro.example_ids_S.tolist()):
                assert encoded[example] == (1 if at == len(unit) - 1 else 2)
    micros = sum(map(len, units))
    for number in (1, 2):
        assert [call for call in told if call[0] == number] == [(number, i + 1, micros) for i in range(micros)]
    assert told[: len(units[0])] == [(1, i + 1, micros) for i in range(len(units[0]))]


def test_bf16_stays_within_its_rounding(step):
    _, whole, *_ = step("supervised", f"micro_tokens={WHOLE}", "base.precision=bf16")
    _, cached, *_ = step("supervised", f"micro_tokens={MICRO}", "base.precision=bf16")
    assert difference(whole, cached) <= 2e-2
