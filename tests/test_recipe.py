import copy
import math

import pytest

from l2v.errors import RecipeError
from l2v.recipe import LLAMA_LINEARS, Base, Mntp, Simcse, Supervised
from l2v.recipe.load import from_dict

COMMON = {"data": "rows.jsonl", "batch": 8, "steps": 10, "lr": 1e-4}


def recipe(**stages):
    """A recipe with these stages, each a dict of what it adds to the common keys."""
    tree = {name: COMMON | extra for name, extra in stages.items()}
    return from_dict({"name": "x", "base": {"model": "b"}, "stages": copy.deepcopy(tree)}, "x.yaml")


def refused(tree: dict) -> str:
    with pytest.raises(RecipeError) as caught:
        from_dict(copy.deepcopy(tree), "x.yaml")
    assert str(caught.value).startswith("x.yaml: ")
    return str(caught.value)


@pytest.mark.parametrize(
    ("objective", "keys", "part"),
    [
        ("mntp", {"batch": 0}, "batch is 0 and must be at least 1"),
        ("mntp", {"micro_tokens": 0}, "micro_tokens is 0 and must be at least 1"),
        ("mntp", {"length": 0}, "length is 0 and must be at least 1"),
        ("mntp", {"steps": 0}, "steps is 0 and must be at least 1"),
        ("mntp", {"log_every": 0}, "log_every is 0 and must be at least 1"),
        ("mntp", {"keep": 0}, "keep is 0 and must be at least 1"),
        ("mntp", {"warmup": -1}, "warmup is -1 and must not be negative"),
        ("mntp", {"eval_every": -1}, "eval_every is -1 and must not be negative"),
        ("mntp", {"save_every": -1}, "save_every is -1 and must not be negative"),
        ("mntp", {"weight_decay": -0.1}, "weight_decay is -0.1 and must not be negative"),
        ("mntp", {"clip": -1.0}, "clip is -1.0 and must not be negative"),
        ("mntp", {"lr": 0}, "lr is 0.0 and must be above 0"),
        ("mntp", {"lora": {"dropout": 1.0}}, "lora.dropout is 1.0; use 0 up to 0.99"),
        ("mntp", {"lora": {"dropout": -0.1}}, "lora.dropout is -0.1; use 0 up to 0.99"),
        ("mntp", {"lora": {"r": 0}}, "lora.r is 0 and must be at least 1"),
        ("mntp", {"length": 1}, "length is 1; a text needs at least 2 tokens"),
        ("mntp", {"length": 64, "micro_tokens": 63}, "one text of length 64 does not fit micro_tokens 63; raise"),
        ("mntp", {"mask_probability": 0.0}, "mask_probability is 0.0"),
        ("mntp", {"mask_probability": 1.0}, "mask_probability is 1.0"),
        (
            "mntp",
            {"mask_split": [0.8, 0.1, 0.2]},
            "mask_split (mask, random, keep) adds up to 1.1 and must add up to 1",
        ),
        ("mntp", {"mask_split": [1.2, -0.1, -0.1]}, "mask_split (mask, random, keep)"),
        ("mntp", {"data": []}, "`data` is empty; name at least one source"),
        ("mntp", {"from": "nowhere"}, "`from: nowhere` names no stage; valid: base, one"),
        ("simcse", {"scale": 0}, "scale is 0.0 and must be above 0"),
        (
            "simcse",
            {"negatives": "micro"},
            "applies only to `negatives: micro`, which needs it",
        ),
        ("simcse", {"group": 4}, "applies only to `negatives: micro`, which needs it"),
        ("simcse", {"negatives": "micro", "group": 3}, "batch 8 is not a multiple of group 3"),
        ("simcse", {"negatives": "micro", "group": 1}, "batch 8 is not a multiple of group 1"),
        ("simcse", {"batch": 1}, "a batch of 1 has no in-batch negatives; use at least 2"),
        ("simcse", {"attention_dropout": 1.0}, "attention_dropout is 1.0; use 0 up to 0.99"),
        (
            "simcse",
            {"attention_dropout": 0, "lora": {"dropout": 0}},
            "without any dropout the two views are",
        ),
        ("supervised", {"max_negatives": -1}, "max_negatives is -1 and must not be negative"),
        ("simcse", {"directions": ["doc_to_query"]}, "directions are doc_to_query; name query_to_doc, and each of"),
        ("simcse", {"directions": []}, "directions are none; name query_to_doc"),
        ("simcse", {"directions": ["query_to_doc", "query_to_doc"]}, "each of the others at most once"),
        (
            "simcse",
            {"directions": ["query_to_doc", "query_to_query"], "partition": "per_direction"},
            "partition: per_direction takes the directions query_to_doc and doc_to_query, both and no other",
        ),
        ("simcse", {"partition": "per_direction"}, "partition: per_direction takes the directions"),
        ("simcse", {"hard_negatives": "own"}, "hard_negatives: own needs hard negatives: a supervised stage with"),
        ("supervised", {"hard_negatives": "own", "max_negatives": 0}, "with max_negatives: auto, or of at least 1"),
        (
            "mntp",
            {"decay": "cosine", "decay_epochs": None},
            "decay: cosine needs its end: decay_steps: end, or another",
        ),
        ("mntp", {"decay_steps": -2}, "decay_steps is -2 and must not be negative; end is the last step"),
        ("simcse", {"false_negative_margin": 2}, "false_negative_margin is 2.0 and must lie between -2 and 2"),
        ("simcse", {"false_negative_margin": math.nan}, "false_negative_margin is nan and must lie between"),
        ("simcse", {"matryoshka": []}, "matryoshka is []; give 1 to 16 ascending prefix lengths, or null"),
        ("simcse", {"matryoshka": [8, 8]}, "matryoshka is [8, 8]; give 1 to 16 ascending"),
        ("simcse", {"matryoshka": [0, 8]}, "matryoshka is [0, 8]; give 1 to 16 ascending"),
        ("simcse", {"matryoshka": list(range(1, 18))}, "give 1 to 16 ascending prefix lengths, or null"),
        ("simcse", {"matryoshka_weights": [1]}, "matryoshka_weights need matryoshka, the prefix lengths that"),
        ("simcse", {"matryoshka": [4], "matryoshka_weights": [1, 2]}, "2 matryoshka_weights for 1 matryoshka lengths"),
        (
            "simcse",
            {"matryoshka": [4, 8], "matryoshka_weights": [1, -1]},
            "none may be negative, and one must be above",
        ),
        ("simcse", {"matryoshka": [4], "matryoshka_weights": [0]}, "none may be negative, and one must be above 0"),
    ],
)
def test_impossible_values_are_refused(objective, keys, part):
    tree = {"name": "x", "base": {"model": "b"}, "stages": {"one": COMMON | {"objective": objective} | keys}}
    message = refused(tree)
    assert "stage 'one': " in message and part in message


def test_the_borders_of_what_is_allowed():
    recipe(
        one={"objective": "mntp", "length": 64, "micro_tokens": 64, "mask_split": [1, 0, 0], "mask_probability": 0.99}
    )
    recipe(one={"objective": "simcse", "negatives": "micro", "group": 4, "attention_dropout": 0})
    recipe(one={"objective": "simcse", "lora": {"dropout": 0}})
    recipe(one={"objective": "supervised", "max_negatives": 0, "batch": 2})
    all_of_gte = ["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
    recipe(one={"objective": "supervised", "directions": all_of_gte, "hard_negatives": "own"})
    recipe(one={"objective": "simcse", "directions": all_of_gte[::2], "partition": "per_direction"})
    recipe(one={"objective": "simcse", "false_negative_margin": -0.5, "matryoshka": list(range(1, 17))})
    recipe(one={"objective": "simcse", "matryoshka": [4, 8], "matryoshka_weights": [0, 1]})


def test_one_direction_needs_no_list_and_a_wrong_one_is_named():
    assert recipe(one={"objective": "simcse", "directions": "query_to_doc"}).stages["one"].directions == [
        "query_to_doc"
    ]
    wrong = {"objective": "simcse", "directions": ["query_to_doc", "query_to_docs"]}
    message = refused({"name": "x", "base": {"model": "b"}, "stages": {"one": COMMON | wrong}})
    assert (
        "stages.one.directions[1] is 'query_to_docs'; choose one of query_to_doc, query_to_query, doc_to_query"
        in message
    )


@pytest.mark.parametrize("backend", ["sdpa", "flash_attention_2"])
def test_attention_dropout_needs_our_backend(backend):
    tree = {
        "name": "x",
        "base": {"model": "b", "backend": backend},
        "stages": {"one": COMMON | {"objective": "simcse"}},
    }
    assert f"attention_dropout 0.3 needs base.backend: l2v; {backend} has no counter-based dropout" in refused(tree)
    tree["stages"]["one"]["attention_dropout"] = 0
    from_dict(tree, "x.yaml")


def test_overrides_of_the_shape_need_a_random_base():
    base = {"model": "b", "overrides": {"num_hidden_layers": 2}}
    tree = {"name": "x", "base": base, "stages": {"one": COMMON | {"objective": "mntp"}}}
    assert "base.overrides changes the shape of the base and needs base.init: random" in refused(tree)
    from_dict(tree | {"base": base | {"init": "random"}}, "x.yaml")


def test_no_stage_at_all():
    assert "`stages` is empty; name at least one stage" in refused({"name": "x", "base": "b", "stages": {}})
    assert "`stages` is empty; name at least one stage" in refused({"name": "x", "base": "b"})


@pytest.mark.parametrize("name", ["a/b", "..", "a b", ""])
def test_a_stage_name_is_a_folder_name(name):
    tree = {"name": "x", "base": "b", "stages": {name: COMMON | {"objective": "mntp"}}}
    assert f"stage '{name}': use letters, digits, - and _ in its name" in refused(tree)


def test_the_chain_runs_back_to_the_base_oldest_first():
    mntp, simcse, supervised = {"objective": "mntp"}, {"objective": "simcse"}, {"objective": "supervised"}
    made = recipe(c=supervised | {"from": "b"}, b=simcse | {"from": "a"}, a=mntp)
    assert (made.chain("a"), made.chain("b"), made.chain("c")) == ([], ["a"], ["a", "b"])
    assert made.order() == ["a", "b", "c"]


def test_a_tree_of_stages_trains_every_stage_once_after_its_parent():
    mntp = {"objective": "mntp"}
    made = recipe(
        left={"objective": "simcse", "from": "root"},
        root=mntp,
        right={"objective": "supervised", "from": "root"},
        other=mntp,
    )
    assert made.order() == ["root", "left", "right", "other"]


def test_published_adapters_end_the_chain():
    made = recipe(
        a={"objective": "mntp"},
        b={"objective": "simcse", "from": "a", "adapters": ["org/mntp"]},
        c={"objective": "supervised", "from": "b"},
    )
    assert (made.chain("b"), made.chain("c")) == ([], ["b"])


@pytest.mark.parametrize(
    "links", [{"a": "a"}, {"a": "b", "b": "a"}, {"a": "b", "b": "c", "c": "b"}, {"a": "b", "b": "c", "c": "a"}]
)
def test_a_circle_is_refused(links):
    stages = {name: COMMON | {"objective": "mntp", "from": from_} for name, from_ in links.items()}
    with pytest.raises(RecipeError, match=r"stage 'a': its `from` chain is circular through"):
        from_dict({"name": "x", "base": "b", "stages": stages}, "x.yaml")


def test_a_stage_may_have_a_seed_of_its_own():
    made = recipe(a={"objective": "mntp", "seed": 0}, b={"objective": "mntp"})
    assert (made.stage_seed("a"), made.stage_seed("b")) == (0, 42)


def test_the_defaults_are_those_of_the_published_recipe():
    stage = COMMON | {"data": []}
    mntp, simcse, supervised = Mntp(**stage), Simcse(**stage), Supervised(**stage)
    assert (mntp.mask_probability, mntp.mask_split) == (0.2, (0.8, 0.1, 0.1))
    assert (simcse.scale, simcse.attention_dropout, supervised.scale) == (20.0, 0.3, 50.0)
    lora = mntp.lora
    assert (lora.r, lora.alpha, lora.dropout, tuple(lora.targets)) == (16, 32, 0.05, LLAMA_LINEARS)
    assert (mntp.betas, mntp.weight_decay, mntp.clip, mntp.decay_epochs) == ((0.9, 0.999), 0.0, 1.0, 3.0)
    base = Base("b")
    assert (base.attention, base.pooling, base.mask_token) == ("bidirectional", "mean", "_")


def test_words_stand_beside_numbers():
    words = recipe(a={"objective": "supervised", "decay": "cosine", "decay_steps": "end"}).stages["a"]
    assert (words.max_negatives, words.decay, words.decay_steps) == ("auto", "cosine", "end")
    numbers = recipe(a={"objective": "supervised", "max_negatives": 3.0, "decay_steps": 20}).stages["a"]
    assert (numbers.max_negatives, numbers.decay, numbers.decay_steps) == (3, "linear", 20)
    assert recipe(a={"objective": "mntp", "decay_steps": None}).stages["a"].decay_steps is None
    for key, value, message in (
        ("max_negatives", "all", "max_negatives is a whole number or auto; found 'all'"),
        ("max_negatives", None, "max_negatives is a whole number or auto; found nothing"),
        ("decay_steps", "last", "decay_steps is a whole number or end; found 'last'"),
        ("decay", "linaer", "decay is 'linaer'; choose one of linear, cosine, none"),
    ):
        tree = COMMON | {"objective": "supervised", key: value}
        assert message in refused({"name": "x", "base": {"model": "b"}, "stages": {"one": tree}})


@pytest.mark.parametrize(("value", "found"), [("int4", "'int4'"), (8, "'8'"), (["int8"], "a list"), (False, "false")])
def test_a_key_of_words_or_null_names_them(value, found):
    tree = {"name": "x", "base": {"model": "b"}, "stages": {"one": COMMON | {"objective": "simcse", "quantize": value}}}
    assert f"stages.one.quantize is {found}; choose one of int8, binary, or null" in refused(tree)
    assert recipe(one={"objective": "simcse", "quantize": "binary"}).stages["one"].quantize == "binary"
    assert recipe(one={"objective": "supervised", "quantize": None}).stages["one"].quantize is None
