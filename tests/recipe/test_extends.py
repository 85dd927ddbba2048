"""A recipe that says only what differs from another."""

import json
import re

import pytest
import yaml

from l2v.commands import recipes
from l2v.errors import RecipeError
from l2v.recipe import Mntp, Source, Supervised
from l2v.recipe.load import from_dict, load_recipe, to_dict
from l2v.recipe.shipped import recipe_folder
from l2v.tuning.apply import tuned_file

PARENT = """\
name: parent
out: runs/elsewhere
seed: 7
base: some/base
lora: {r: 8, alpha: 16}
stages:
  mntp:
    objective: mntp
    data: {path: documents.jsonl, text: tekst, skip_empty: true}
    batch: 4
    steps: 10
    lr: 5e-5
    decay_epochs: 3
    lora: {dropout: 0.1}
  simcse:
    objective: simcse
    from: mntp
    data: sentences.jsonl
    batch: 8
    steps: 10
    lr: 3e-5
  super:
    objective: supervised
    from: mntp
    data: [a.jsonl, b.jsonl]
    batch: 8
    group: 4
    negatives: micro
    steps: 10
    lr: 2e-4
"""


@pytest.fixture
def load(tmp_path):
    """load(child, parent=PARENT, overrides=[...], **files) -> recipe; the child is child.yaml next to parent.yaml."""

    def run(child, parent=PARENT, overrides=(), **files):
        for name, text in {"child": child, "parent": parent, **files}.items():
            (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
        return load_recipe(str(tmp_path / "child.yaml"), overrides)

    return run


def refused(load, *args, **files) -> str:
    with pytest.raises(RecipeError) as caught:
        load(*args, **files)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    return str(caught.value)


CHILD = "extends: parent.yaml\nname: child\n"


def test_what_the_child_leaves_out_is_the_parents(load, tmp_path):
    recipe = load(CHILD)
    assert (recipe.name, recipe.out) == ("child", None)  # a run is the recipe's own
    own = load_recipe(str(tmp_path / "parent.yaml"))
    assert to_dict(recipe) == to_dict(own) | {"name": "child", "out": None}
    assert from_dict(json.loads(json.dumps(to_dict(recipe))), "stage.json") == recipe  # a run's files hold all of it


def test_mappings_are_merged_and_all_else_is_replaced(load):
    recipe = load(
        CHILD
        + "base: {pooling: last}\nlora: {r: 4}\nstages:\n  mntp: {steps: 99, decay_epochs: null, lora: {r: 2}}\n"
        + "  super: {data: [c.jsonl], negatives: global, group: null}\n"
    )
    assert (recipe.base.model, recipe.base.pooling, recipe.seed) == ("some/base", "last", 7)
    assert (recipe.lora.r, recipe.lora.alpha) == (4, 16)
    mntp = recipe.stages["mntp"]
    assert isinstance(mntp, Mntp) and (mntp.steps, mntp.batch, mntp.decay_epochs) == (99, 4, None)
    assert (mntp.lora.r, mntp.lora.alpha, mntp.lora.dropout) == (2, 16, 0.1)
    assert recipe.stages["super"].data == [Source("c.jsonl")] and recipe.stages["super"].group is None
    assert list(recipe.stages) == ["mntp", "simcse", "super"]


def test_a_source_is_replaced_whole_however_it_is_written(load):
    data = load(CHILD + "stages: {mntp: {data: {path: own.csv}}}\n").stages["mntp"].data
    assert data == [Source("own.csv")]  # neither the parent's column nor its skip_empty


def test_stages_are_removed_added_and_replaced(load):
    recipe = load(
        CHILD
        + "stages:\n  simcse: null\n  super: null\n"
        + "  mntp: {objective: supervised, data: p.jsonl, batch: 2, steps: 3, lr: 1e-3}\n"
        + "  more: {objective: mntp, from: mntp, data: d.jsonl, batch: 2, steps: 3, lr: 1e-3}\n"
    )
    assert list(recipe.stages) == ["mntp", "more"]
    first = recipe.stages["mntp"]
    assert isinstance(first, Supervised) and first.decay_epochs == 3.0 and first.data == [Source("p.jsonl")]
    assert first.lora.dropout == 0.05  # nothing of the MNTP stage is left


def test_the_base_may_be_a_name_on_either_side(load):
    assert load(CHILD + "base: other/base\n").base.model == "other/base"
    parent = PARENT.replace("base: some/base", "base: {model: some/base, pooling: last}")
    base = load(CHILD + "base: other/base\n", parent).base
    assert (base.model, base.pooling) == ("other/base", "last")


def test_chains_and_folders(load, tmp_path):
    (tmp_path / "above").mkdir()
    (tmp_path / "above" / "top.yaml").write_text(PARENT)
    (tmp_path / "above" / "middle.yaml").write_text("extends: top.yaml\nname: middle\nseed: 8\nlora: {r: 5}\n")
    recipe = load("extends: above/middle.yaml\nname: child\nlora: {alpha: 3}\n")
    assert (recipe.seed, recipe.lora.r, recipe.lora.alpha) == (8, 5, 3)
    absolute = load(f"extends: {tmp_path / 'above' / 'middle.yaml'}\nname: child\n")
    assert absolute.lora.r == 5


def test_a_shipped_recipe_by_its_name_even_under_the_same_name(tmp_path):
    own = tmp_path / "llama3-8b-da.yaml"
    own.write_text("extends: llama3-8b-da\nname: own\nstages: {mntp: {steps: 5}}\n")
    recipe = load_recipe(str(own), ["simcse.steps=6"])
    shipped = load_recipe("llama3-8b-da")
    assert (recipe.stages["mntp"].steps, recipe.stages["simcse"].steps) == (5, 6)
    assert recipe.base == shipped.base and recipe.stages["supervised"] == shipped.stages["supervised"]


def test_overrides_come_last(load):
    recipe = load(CHILD + "stages: {mntp: {steps: 5}}\n", overrides=["mntp.steps=6", "simcse.steps=7", "base=b"])
    assert (recipe.stages["mntp"].steps, recipe.stages["simcse"].steps, recipe.base.model) == (6, 7, "b")
    assert "unknown key 'extends'" in refused(load, CHILD, overrides=["extends=llama3-8b-da"])


@pytest.mark.parametrize(
    ("child", "files", "sentence"),
    [
        ("name: a\nextends: child.yaml\n", {}, r"child\.yaml:2: the recipe extends itself"),
        (
            "extends: two.yaml\nname: a\n",
            {"two": "name: b\nextends: child.yaml\n"},
            r"two\.yaml:2: extends 'child\.yaml' is circular: .* \(.*child\.yaml:1\)$",
        ),
        (
            "extends: two.yaml\nname: a\n",
            {"two": "name: b\n\nextends: three.yaml\n", "three": "extends: two.yaml\n"},
            r"three\.yaml:1: extends 'two\.yaml' is circular: .* \(.*two\.yaml:3\)$",
        ),
        ("name: a\nextends: nope.yaml\n", {}, r"child\.yaml:2: extends 'nope\.yaml', .*/nope\.yaml\) nor one of .*llama3-8b-da"),
        ("extends: two.yaml\n", {"two": "\nextends: nope\n"}, r"two\.yaml:2: extends 'nope', which is neither a file \("),
        ("extends: [a]\nname: a\n", {}, r"child\.yaml:1: extends is text, a file or the name of a recipe; found a list"),
        ("extends: 3\nname: a\n", {}, r"child\.yaml:1: extends is text, .*; found '3'"),
        ("extends:\nname: a\n", {}, r"child\.yaml:1: the key 'base' is missing"),
        (CHILD + "stages:\n  mntp:\n    stepz: 4\n", {}, r"child\.yaml:5: unknown key 'stages\.mntp\.stepz'; did you"),
        (CHILD + "sede: 4\n", {}, r"child\.yaml:3: unknown key 'sede'; did you mean 'seed'"),
        (CHILD + "stages: {mntp: {steps: ten}}\n", {}, r"child\.yaml:3: stages\.mntp\.steps is a whole number"),
        (CHILD + "stages:\n  simsce: null\n", {}, r"child\.yaml:4: no stage 'simsce' to remove; did you mean 'simcse'"),
        (CHILD + "stages: {mntp: null}\n", {}, r"stage 'simcse': `from: mntp` names no stage"),
        (CHILD, {"parent": PARENT.replace("seed", "sede")}, r"parent\.yaml:3: unknown key 'sede'"),
        (CHILD, {"parent": "- a\n"}, r"parent\.yaml:1: a recipe is a mapping of keys; found a list"),
        (CHILD, {"parent": "a: [1\n"}, r"parent\.yaml:\d: not valid YAML"),
        ("extends: parent.yaml\n", {}, r"child\.yaml:1: the key 'name' is missing"),
        ("extends: parent.yaml\nname: c\nstages: {extends: x}\n", {}, r"child\.yaml:3: stages\.extends is a mapping"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_with_its_file_and_line(load, child, files, sentence):
    message = refused(load, child, files.pop("parent", PARENT), **files)
    assert re.search(sentence, message), message


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("tracking: {wandb: hf_abcdefghijklmnopqrstuvwxyz}", "contains a hub token"),
        ("base: {model: 'https://me:secret@host/x'}", "contains a login in its address"),
        ("token: abc", "token is not a key of a recipe"),
        ("out: ../../elsewhere", "leads out of the working directory"),
        ("zero: {config: ../ds.json}", "leads out of the working directory"),
        ("name: a/b", "name 'a/b' becomes the name of a folder"),
    ],
)
def test_what_no_recipe_may_hold_no_parent_may_either(load, line, part):
    key = line.partition(":")[0]
    parent = "\n".join(text for text in PARENT.splitlines() if not text.startswith(f"{key}:")) + f"\n{line}\n"
    # The child has its own value of the same key: the parent is refused for what it says, not for what is left of it.
    own = {"tracking": "tracking: {wandb: mine}\n", "base": "base: mine\n", "out": "out: mine\n"}.get(key, "")
    message = refused(load, CHILD + own, parent)
    assert "parent.yaml:" in message and part in message and "secret" not in message and "hf_abc" not in message


def test_a_deepspeed_file_of_the_child_goes_before_the_parents_stage(load):
    parent = PARENT + "zero: {stage: 1, offload_optimizer: true}\n"
    zero = load(CHILD + "zero: {config: zero3-offload}\n", parent).zero
    assert zero.stage == 3 and zero.offload_optimizer
    assert load(CHILD + "zero: {stage: 2}\n", parent).zero.stage == 2
    assert "zero.stage is 1" in refused(load, CHILD + "zero: {config: zero3-offload, stage: 1}\n", parent)


def test_what_was_tuned_lies_next_to_the_child(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("extends: llama3-8b-da\nname: own\n")
    assert tuned_file(str(own)) == tmp_path / "own.tuned.json"


@pytest.mark.parametrize("name", ["ai-sweden-llama3-8b-da", "llama3-8b-en"])
def test_recipes_prints_the_file_says_what_it_extends_and_prints_all(name, capsys, tmp_path):
    assert recipes.main([name]) == 0
    shown = capsys.readouterr()
    assert (
        shown.out == (recipe_folder() / f"{name}.yaml").read_text(encoding="utf-8") and "extends: llama3" in shown.out
    )
    assert shown.err == f"{name} extends llama3-8b-da; --resolved prints all keys\n"
    assert recipes.main([name, "--resolved"]) == 0
    out = capsys.readouterr().out
    assert "extends" not in out and yaml.safe_load(out)["stages"]["mntp"]["batch"] == 32
    alone = tmp_path / "alone.yaml"
    alone.write_text(out, encoding="utf-8")
    assert load_recipe(str(alone)) == load_recipe(name)


def test_shipped_recipes_differ_where_they_say_so():
    danish, swedish, english = (load_recipe(n) for n in ("llama3-8b-da", "ai-sweden-llama3-8b-da", "llama3-8b-en"))
    a, b = to_dict(danish), to_dict(swedish)
    assert b["base"].pop("model") == "AI-Sweden-Models/Llama-3-8B-instruct" and a["base"].pop("model")
    assert a | {"name": ""} == b | {"name": ""}
    assert to_dict(english.base) == to_dict(danish.base)
    stage = english.stages["supervised"]
    assert (stage.negatives, stage.group, stage.length, stage.steps, stage.max_negatives) == (
        "global",
        None,
        512,
        1000,
        1,
    )
    assert (stage.batch, stage.lr, stage.warmup, stage.scale) == (512, 2e-4, 300, 50)
    assert stage.data == [Source("e5_pairs.jsonl", instruction="instruction")]
    assert english.stages["simcse"].data == [Source("wiki1m_for_simcse.txt")]
    assert english.stages["mntp"].data[0].path == "hub:Salesforce/wikitext" and english.stages["mntp"].batch == 32
