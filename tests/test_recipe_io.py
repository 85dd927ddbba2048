import re
from pathlib import Path

import pytest

from l2v.errors import RecipeError
from l2v.recipe import Mntp, Recipe, Simcse, Source, Supervised
from l2v.recipe.load import from_dict, load_recipe, to_dict
from l2v.recipe.shipped import find_recipe, recipe_folder

SHIPPED = sorted(path.stem for path in recipe_folder().glob("*.yaml"))

GOOD = """\
name: dansk
base:
  model: some/base
  backend: l2v
lora: {r: 8, alpha: 16}
stages:
  mntp:
    objective: mntp
    data: documents.jsonl
    batch: 4
    steps: 10
    lr: 5e-5
  simcse:
    objective: simcse
    from: mntp
    data: [sentences.jsonl, {path: more.jsonl, text: tekst}]
    batch: 8
    steps: 10
    lr: 3.0e-5
  super:
    objective: supervised
    from: simcse
    data: pairs.jsonl
    batch: 8
    steps: 10
    lr: 2e-4
    lora: {dropout: 0.1}
"""


@pytest.fixture
def load(tmp_path):
    """load("old" -> "new", ..., overrides=[...], stage=...) of the good recipe."""

    def run(*edits: tuple[str, str], overrides=(), stage=None, text=GOOD) -> Recipe:
        for old, new in edits:
            assert text.count(old) >= 1, f"'{old}' does not stand in the recipe"
            text = text.replace(old, new, 1)
        path = tmp_path / "dansk.yaml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(str(path), overrides, stage)

    return run


def refused(load, *edits, **how) -> str:
    with pytest.raises(RecipeError) as caught:
        load(*edits, **how)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_loads(name):
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.stages
    assert from_dict(to_dict(recipe), "again") == recipe


def test_a_good_recipe_is_read_as_written(load):
    recipe = load()
    assert [type(stage) for stage in recipe.stages.values()] == [Mntp, Simcse, Supervised]
    assert recipe.base.model == "some/base"
    assert recipe.stages["mntp"].data == [Source("documents.jsonl")]
    assert recipe.stages["simcse"].data == [Source("sentences.jsonl"), Source("more.jsonl", text="tekst")]
    assert recipe.stages["simcse"].from_ == "mntp"
    assert (recipe.seed, recipe.stage_seed("mntp")) == (42, 42)


def test_a_rate_without_a_dot_is_a_number(load):
    assert load().stages["mntp"].lr == 5e-5
    assert load(overrides=["mntp.lr=2e-4"]).stages["mntp"].lr == 2e-4
    assert load(("lr: 5e-5", "lr: 1")).stages["mntp"].lr == 1.0


def test_lora_is_shared_and_a_stage_overrides_single_keys(load):
    recipe = load()
    assert (recipe.stages["mntp"].lora.r, recipe.stages["mntp"].lora.dropout) == (8, 0.05)
    assert (recipe.stages["super"].lora.r, recipe.stages["super"].lora.dropout) == (8, 0.1)


def test_the_base_may_be_a_name_alone(load):
    recipe = load(("base:\n  model: some/base\n  backend: l2v\n", "base: other/base\n"))
    assert recipe.base.model == "other/base"


@pytest.mark.parametrize(
    ("edit", "line", "key", "nearest"),
    [
        (("name: dansk", "nmae: dansk"), 1, "nmae", "name"),
        (("backend: l2v", "backedn: l2v"), 4, "base.backedn", "backend"),
        (("batch: 4", "bacth: 4"), 10, "stages.mntp.bacth", "batch"),
        (("text: tekst", "txet: tekst"), 16, "stages.simcse.data[1].txet", "text"),
        (("{dropout: 0.1}", "{dropuot: 0.1}"), 27, "stages.super.lora.dropuot", "dropout"),
    ],
)
def test_an_unknown_key_is_named_with_file_line_and_the_nearest(load, edit, line, key, nearest):
    message = refused(load, edit)
    assert re.search(rf"dansk\.yaml:{line}: unknown key '{re.escape(key)}'; did you mean '{nearest}'\?$", message), (
        message
    )


def test_a_key_near_to_none_lists_the_valid_ones(load):
    message = refused(load, ("name: dansk", "zzzzzz: 1\nname: dansk"))
    assert "unknown key 'zzzzzz'; valid keys: name, base, stages, out, seed" in message


def test_a_key_of_another_objective_is_unknown(load):
    message = refused(load, ("steps: 10", "steps: 10\n    scale: 20"))
    assert ":12: unknown key 'stages.mntp.scale'" in message


@pytest.mark.parametrize(
    ("edit", "line", "sentence"),
    [
        (("steps: 10", "steps: ten"), 11, "stages.mntp.steps is a whole number; found 'ten'"),
        (("steps: 10", "steps: 10.5"), 11, "stages.mntp.steps is a whole number; found '10.5'"),
        (("steps: 10", "steps: true"), 11, "stages.mntp.steps is a whole number; found true"),
        (("steps: 10", "steps:"), 11, "stages.mntp.steps is a whole number; found nothing"),
        (("lr: 5e-5", "lr: fast"), 12, "stages.mntp.lr is a number; found 'fast'"),
        (("lr: 5e-5", "lr: true"), 12, "stages.mntp.lr is a number; found true"),
        (("lr: 5e-5", "lr: [1]"), 12, "stages.mntp.lr is a number; found a list"),
        (("model: some/base", "model: 7"), 3, "base.model is text; found '7'"),
        (("backend: l2v", "trust_remote_code: 1"), 4, "base.trust_remote_code is true or false; found '1'"),
        (("backend: l2v", "backend: cuda"), 4, "base.backend is 'cuda'; choose one of l2v, sdpa, flash_attention_2"),
        (("backend: l2v", "template: hi"), 4, "base.template is a mapping of keys; found 'hi'"),
        (("backend: l2v", "overrides: 3"), 4, "base.overrides is a mapping of keys; found '3'"),
        (("lr: 5e-5", "lr: 1\n    betas: [0.9]"), 13, "stages.mntp.betas is a list of 2 numbers; found a list"),
        (("lr: 5e-5", "lr: 1\n    mask_split: [a, 0, 1]"), 13, "stages.mntp.mask_split[0] is a number; found 'a'"),
        (("data: documents.jsonl", "data: [3]"), 9, "stages.mntp.data[0] is a mapping of keys; found '3'"),
        (("lora: {r: 8, alpha: 16}", "zero: {stage: 4}"), 5, "zero.stage is '4'; choose one of 0, 1, 2, 3"),
        (("lora: {r: 8, alpha: 16}", "zero: {stage: true}"), 5, "zero.stage is 'True'; choose one of 0, 1, 2, 3"),
        (("objective: mntp", "objective: mnpt"), 8, "stages.mntp.objective 'mnpt' is unknown; did you mean 'mntp'?"),
        (("objective: mntp", "objective: [mntp]"), 8, "stages.mntp.objective"),
    ],
)
def test_a_wrong_type_is_named_with_its_line(load, edit, line, sentence):
    message = refused(load, edit)
    assert f"dansk.yaml:{line}: {sentence}" in message


@pytest.mark.parametrize(
    ("edit", "where", "sentence"),
    [
        (("name: dansk\n", ""), ":1", "the key 'name' is missing"),
        (("  model: some/base\n", ""), ":2", "the key 'base.model' is missing"),
        (("    steps: 10\n", ""), ":7", "the key 'stages.mntp.steps' is missing"),
        (("    objective: mntp\n", ""), ":7", "stages.mntp.objective is missing; choose mntp, simcse, supervised"),
        (("path: more.jsonl, ", ""), ":16", "the key 'stages.simcse.data[1].path' is missing"),
    ],
)
def test_a_missing_key_is_named(load, edit, where, sentence):
    assert f"dansk.yaml{where}: {sentence}" in refused(load, edit)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("name: x\nbase: [a, b\nseed: 1\n", "dansk.yaml:3: not valid YAML"),
        ("name: x\n\tbase: a\n", "dansk.yaml:2: not valid YAML"),
        ("name: x\nseed: 1\nname: y\n", "dansk.yaml:3: the key 'name' appears twice"),
        (
            GOOD.replace("    batch: 4\n", "    batch: 4\n    batch: 5\n"),
            "dansk.yaml:11: the key 'batch' appears twice",
        ),
        ("", "dansk.yaml: the file is empty"),
        ("- a\n- b\n", "dansk.yaml:1: a recipe is a mapping of keys; found a list"),
        ("name: \x01\n", "not valid YAML"),
        (GOOD.replace("lr: 5e-5", "lr: !rate 5"), "dansk.yaml:12: "),
        (GOOD.replace("name: dansk", "name: 2024-99-99"), "dansk.yaml:1: "),
        (GOOD.replace("stages:\n  mntp:", "stages: 3\nx:\n  mntp:"), "unknown key 'x'"),
    ],
)
def test_broken_yaml_is_one_sentence_with_its_line(load, text, part):
    assert part in refused(load, text=text)


def test_a_file_that_is_no_utf8(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: æøå\n".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"latin\.yaml: cannot be read: .*utf-8"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("overrides", "stage", "where", "value"),
    [
        (["stages.mntp.steps=99"], None, ("mntp", "steps"), 99),
        (["mntp.steps=99"], None, ("mntp", "steps"), 99),
        (["steps=99"], "super", ("super", "steps"), 99),
        (["adapters=[org/one,org/two]"], "simcse", ("simcse", "adapters"), ["org/one", "org/two"]),
        (["simcse.adapters=org/one"], None, ("simcse", "adapters"), ["org/one"]),
        (["lora.r=2", "mntp.lora.r=3"], None, ("mntp", "lora", "r"), 3),
        (["lora.r=2"], None, ("mntp", "lora", "r"), 2),
        (["mntp.seed=7"], None, ("mntp", "seed"), 7),
        (["mntp.data=a=b.jsonl"], None, ("mntp", "data", 0, "path"), "a=b.jsonl"),
        (["mntp.decay_epochs="], None, ("mntp", "decay_epochs"), None),
        (["mntp.steps=1", "mntp.steps=2"], None, ("mntp", "steps"), 2),
    ],
)
def test_overrides_reach_their_key(load, overrides, stage, where, value):
    at = load(overrides=overrides, stage=stage).stages
    for key in where:
        at = at[key] if isinstance(at, dict | list) else getattr(at, key)
    assert at == value


def test_a_bare_key_with_a_stage_leaves_the_other_stages_alone(load):
    recipe = load(overrides=["steps=99"], stage="super")
    assert (recipe.stages["mntp"].steps, recipe.stages["simcse"].steps) == (10, 10)


def test_top_level_keys_win_over_the_chosen_stage(load):
    recipe = load(overrides=["seed=7", "out=elsewhere"], stage="mntp")
    assert (recipe.seed, recipe.out, recipe.stages["mntp"].seed) == (7, "elsewhere", None)


@pytest.mark.parametrize("override", ["base=/a/folder", "base.model=/a/folder"])
def test_the_base_override_keeps_the_rest_of_the_base(load, override):
    edit = ("backend: l2v", "backend: sdpa")
    recipe = load(edit, ("    lr: 3.0e-5", "    attention_dropout: 0\n    lr: 3.0e-5"), overrides=[override])
    assert (recipe.base.model, recipe.base.backend) == ("/a/folder", "sdpa")
    short = load(("base:\n  model: some/base\n  backend: l2v\n", "base: b\n"), overrides=[override, "base.backend=l2v"])
    assert short.base.model == "/a/folder"


@pytest.mark.parametrize(
    ("override", "stage", "part"),
    [
        ("steps", None, "command line 'steps': an override has the form key=value"),
        ("=3", None, "command line '=3': an override has the form key=value"),
        (
            "steps=3",
            None,
            "command line 'steps=3': 'steps' is a key of a stage: write stages.mntp.steps=..., or choose a --stage",
        ),
        ("sede=3", None, "command line 'sede=3': unknown key 'sede'; did you mean 'seed'?; or choose a --stage"),
        ("mnpt.steps=3", None, "unknown key 'mnpt'; did you mean 'mntp'?"),
        ("mntp.stepz=3", None, "command line 'mntp.stepz=3': unknown key 'stages.mntp.stepz'; did you mean 'steps'?"),
        ("stepz=3", "mntp", "unknown key 'stages.mntp.stepz'; did you mean 'steps'?"),
        ("mntp.steps=many", None, "command line 'mntp.steps=many': stages.mntp.steps is a whole number; found 'many'"),
        ("seed=[1", None, "command line 'seed=[1': seed is a whole number; found '[1'"),
        ("stages.mnpt.steps=3", None, "no stage 'mnpt'; did you mean 'mntp'?"),
        ("base.modle=x", None, "unknown key 'base.modle'; did you mean 'model'?"),
    ],
)
def test_a_bad_override_is_quoted(load, override, stage, part):
    assert part in refused(load, overrides=[override], stage=stage)


@pytest.mark.parametrize("overrides", [[], ["steps=3"]])
def test_a_stage_that_is_not_there_is_named(load, overrides):
    assert "no stage 'smicse'; did you mean 'simcse'?" in refused(load, overrides=overrides, stage="smicse")


def test_an_override_of_a_recipe_without_stages(load):
    assert "stages" in refused(load, text="name: x\nbase: b\nstages:\n", overrides=["steps=3"])


def test_recipes_are_found_by_path_and_by_name(tmp_path):
    assert find_recipe(SHIPPED[0]) == recipe_folder() / f"{SHIPPED[0]}.yaml"
    own = tmp_path / "own.yaml"
    own.write_text(GOOD)
    assert find_recipe(str(own)) == Path(own)
    with pytest.raises(RecipeError, match=rf"no recipe 'nope': give a YAML file or one of .*{SHIPPED[0]}"):
        find_recipe("nope")


def test_to_dict_and_back(load):
    recipe = load(overrides=["base.init=random", "base.overrides.num_hidden_layers=2", "mntp.decay_epochs="])
    tree = to_dict(recipe)
    assert tree["stages"]["simcse"]["from"] == "mntp" and "from_" not in tree["stages"]["simcse"]
    assert from_dict(tree, "stage.json") == recipe
    with pytest.raises(RecipeError, match=r"^stage\.json: unknown key 'strange'"):
        from_dict(tree | {"strange": 1}, "stage.json")
