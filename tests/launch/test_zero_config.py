"""The DeepSpeed configurations that come with l2v: found by name, and each trains the same adapter."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.processes import finish, start_ranks

from l2v.errors import RecipeError
from l2v.recipe.load import load_recipe
from l2v.recipe.shipped import shipped_folder
from l2v.training.engine import deepspeed_config

NAMES = sorted(path.stem for path in shipped_folder("deepspeed").glob("*.json"))


def test_there_is_one_for_every_stage_and_offload():
    assert NAMES == [
        "zero0", "zero1", "zero1-offload", "zero2", "zero2-offload", "zero3", "zero3-offload", "zero3-offload-optimizer",
        "zero3-offload-parameters",
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_name_says_what_deepspeed_is_told(name):
    recipe = load_recipe("llama3-8b-da", [f"zero.config={name}"])
    assert recipe.zero.stage == int(name[4])
    config = deepspeed_config(recipe.stages["mntp"], recipe.zero, torch.bfloat16, 41_943_040)
    zero = config["zero_optimization"]
    assert zero["stage"] == int(name[4]) and zero["overlap_comm"] is False
    assert ("offload_optimizer" in zero) == (name.endswith(("offload", "offload-optimizer")))
    assert ("offload_param" in zero) == (name in ("zero3-offload", "zero3-offload-parameters"))
    assert zero["reduce_bucket_size"] == 41_943_040  # what the trainer makes of an adapter's size, left as it is
    assert config["gradient_clipping"] == 1.0 and config["timers"] == {"throughput": {"enabled": False}}
    # Where the ranks agree on NaN and Inf before the update, DeepSpeed does not search for them again.
    ours = {"check_grad_overflow": False} if name in ("zero1", "zero2") else {}
    assert config["bf16"] == {"enabled": True} | ours


def test_a_configuration_of_ones_own(tmp_path, tiny_recipe):
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    recipe = tiny_recipe(tmp_path, **{"zero.config": str(own)})
    assert load_recipe(str(recipe)).zero.stage == 2
    own.write_text(json.dumps({"zero_optimization": {"stage": 2}, "bf16": {"check_grad_overflow": True}}))
    chosen = load_recipe(str(recipe))
    config = deepspeed_config(chosen.stages["mntp"], chosen.zero, torch.bfloat16, 100)
    assert config["bf16"] == {"enabled": True, "check_grad_overflow": True}, "the user's key is kept"
    # The command line goes before the recipe, and what contradicts itself is refused.
    recipe = tiny_recipe(tmp_path, **{"zero.stage": 1})
    assert load_recipe(str(recipe), [f"zero.config={own}"]).zero.stage == 2
    for overrides in ([f"zero.config={own}", "zero.stage=3"], ["zero.stage=3", f"zero.config={own}"]):
        with pytest.raises(RecipeError, match=r"zero.stage is 3 and .*own.json is for stage 2; remove zero.stage"):
            load_recipe(str(recipe), overrides)
    recipe = tiny_recipe(tmp_path, **{"zero.config": str(own), "zero.stage": 1})
    with pytest.raises(RecipeError, match=r"tiny.yaml:\d+: zero.stage is 1 and .*own.json is for stage 2"):
        load_recipe(str(recipe))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("nowhere", None, r"zero.config: nowhere not found; give a DeepSpeed JSON file or one of zero0, zero1,"),
        ("zero3.json", None, r"zero.config: zero3.json not found"),
        ("broken.json", '{"a": 1,\n}', r"broken.json:2: not valid JSON"),
        ("list.json", "[]", r"list.json: a DeepSpeed configuration is a JSON object"),
        ("four.json", '{"zero_optimization": {"stage": 4}}', r"zero.stage is '4'; choose one of 0, 1, 2, 3"),
    ],
)
def test_a_wrong_configuration_is_one_sentence(tmp_path, monkeypatch, tiny_recipe, name, text, says):
    monkeypatch.chdir(tmp_path)
    if text:
        (tmp_path / name).write_text(text)
    with pytest.raises(RecipeError, match=says):
        load_recipe(str(tiny_recipe(tmp_path)), [f"zero.config={name}"])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_recipe):
    """adapter(*overrides) -> tensors of an adapter that two ranks trained."""
    folder = tmp_path_factory.mktemp("zero")
    recipe = tiny_recipe(folder)

    def train(name: str, *overrides: str) -> dict[str, torch.Tensor]:
        out = folder / name
        arguments = [recipe, f"out={out}", "--stage", "mntp", *overrides]
        finish(start_ranks([arguments, arguments]))
        return load_file(out / "mntp" / "adapter" / "adapter_model.safetensors")

    return train


@pytest.fixture(scope="module")
def expected(adapter):
    return adapter("zero0", "zero.config=zero0")


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert value.abs().max() > 0
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "zero0"])
def test_each_trains_the_same_adapter(adapter, expected, name, tmp_path):
    config = name
    if name.startswith("zero3"):  # the tiny weights would all count as too small to be sharded
        tree = json.loads((shipped_folder("deepspeed") / f"{name}.json").read_text())
        tree["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        config = str(tmp_path / "sharded.json")
        (tmp_path / "sharded.json").write_text(json.dumps(tree))
    assert_same(adapter(name, f"zero.config={config}"), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("zero.stage=1", "zero.offload_optimizer=true"),
        ("zero.stage=3", "zero.offload_optimizer=true", "zero.offload_parameters=true"),
    ],
    ids=["optimizer", "both"],
)
def test_the_recipes_own_keys_offload_too(adapter, expected, overrides, request):
    assert_same(adapter(f"keys-{request.node.callspec.id}", *overrides), expected)
