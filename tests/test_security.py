"""Nothing from outside is unpickled or run, recipes stay in their folder, and no secret reaches a file or the terminal."""

import ast
import json
import pickle
from pathlib import Path

import pytest
import torch
import yaml

from l2v.errors import RecipeError, UserError
from l2v.model.load import load_model
from l2v.model.lora import merge_adapters
from l2v.recipe import Base
from l2v.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "l2v").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
HUB_TOKEN = "hf_" + "aBcDeFgHiJ" * 3
SECRETS = {
    "HF_TOKEN": HUB_TOKEN,
    "WANDB_API_KEY": "0123456789abcdef" * 2,
    "HTTPS_PROXY": "http://someone:secret-word@proxy:1",
}


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.fixture
def bomb(tmp_path) -> Path:
    """Where a bomb would go off; the fixture shows once that it is one."""
    mark = tmp_path / "went-off"
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()
    mark.unlink()
    return mark


def calls():
    """(file, dotted name, the call) for every call in l2v and its kernels."""
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield file, ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


def test_nothing_unpickles():
    loads = 0
    for file, name, call in calls():
        last = name.rsplit(".", 1)[-1]
        where = f"{file.relative_to(ROOT)}:{call.lineno}"
        assert name.split(".")[0] not in {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}, where
        assert name not in {"eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}, where
        if name in {"torch.load", "torch.jit.load"} or last == "load_state_dict_from_url":
            assert keyword(call, "weights_only") == "True", where
        if name in {"np.load", "numpy.load"}:
            loads += 1
            assert keyword(call, "allow_pickle") == "False", where
    assert loads, "the walk found no call at all"


def test_a_pickled_adapter_is_refused(tmp_path, tiny_config, bomb):
    base = Base("tiny", init="random", config=tiny_config, precision="fp32")
    inner = load_model(base, head=False, dtype=torch.float32).base_model
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]})
    )
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(bomb)))
    with pytest.raises(
        UserError, match=r"no adapter_model.safetensors in that folder; l2v does not load pickled adapters"
    ):
        merge_adapters(inner, [str(adapter)])
    assert not bomb.exists()


def test_a_pickled_base_is_refused(tmp_path, tiny_config, bomb):
    from transformers import LlamaConfig

    folder = tmp_path / "base"
    LlamaConfig(**tiny_config).save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(bomb)))
    with pytest.raises(UserError, match=r"holds pickled weights \(\*.bin\), which l2v does not load"):
        load_model(Base(str(folder)), head=False, dtype=torch.float32)
    assert not bomb.exists()


def test_a_pickled_base_beside_safetensors_is_not_read(tmp_path, tiny_config, bomb):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**tiny_config)).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(bomb)))
    load_model(Base(str(tmp_path / "base")), head=False, dtype=torch.float32)
    assert not bomb.exists()


def refused(tmp_path, changes: dict, *overrides: str) -> str:
    """What is said of the tiny recipe with these top keys."""
    stage = {"objective": "simcse", "data": "x.jsonl", "batch": 2, "steps": 1, "lr": 1e-3}
    tree = {"name": "mine", "base": {"model": "tiny"}, "stages": {"simcse": stage}} | changes
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    with pytest.raises(RecipeError) as error:
        load_recipe(str(file), overrides)
    return str(error.value)


@pytest.mark.parametrize("out", ["../elsewhere", "runs/../../elsewhere", ".."])
def test_a_recipes_run_stays_where_it_is_started(tmp_path, out):
    text = refused(tmp_path, {"out": out})
    assert f"mine.yaml:11: out '{out}' leads out of the working directory; give an absolute path, or out=" in text


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "..", "c:\\run", ""])
def test_a_recipes_name_is_the_name_of_a_folder(tmp_path, name):
    assert f"name '{name}' becomes the name of a folder" in refused(tmp_path, {"name": name})


def test_stages_and_configurations_stay_there_too(tmp_path):
    stage = {"objective": "simcse", "data": "x.jsonl", "batch": 2, "steps": 1, "lr": 1e-3}
    text = refused(tmp_path, {"stages": {"../simcse": stage}})
    assert "stage '../simcse': use letters, digits, - and _ in its name" in text
    assert "zero.config '../z.json' leads out of the working directory" in refused(
        tmp_path, {"zero": {"config": "../z.json"}}
    )


def test_the_users_own_word_goes_anywhere(tmp_path, tiny_recipe):
    assert load_recipe(str(tiny_recipe(tmp_path)), ["out=../elsewhere"]).out == "../elsewhere"
    assert load_recipe(str(tiny_recipe(tmp_path, out="/scratch/run"))).out == "/scratch/run"


@pytest.mark.parametrize(
    ("changes", "overrides", "says"),
    [
        (
            {"token": "x"},
            [],
            "mine.yaml:11: token is not a key of a recipe; tokens must come from the environment: set HF_TOKEN",
        ),
        (
            {"base": {"model": "m", "token": HUB_TOKEN}},
            [],
            "mine.yaml:4: base.token is not a key of a recipe; tokens must come",
        ),
        (
            {"base": {"model": "m", "config": {"use_auth_token": HUB_TOKEN}}},
            [],
            "base.config.use_auth_token is not a key",
        ),
        ({"base": {"model": f"https://hub/{HUB_TOKEN}"}}, [], "base.model contains a hub token; tokens must come"),
        (
            {"base": {"model": "https://me:secret-word@hub/m"}},
            [],
            "base.model contains a login in its address; remove it",
        ),
        ({}, [f"base.token={HUB_TOKEN}"], "command line: base.token is not a key of a recipe; tokens must come"),
        ({}, [f"token={HUB_TOKEN}"], "command line: token is not a key of a recipe; tokens must come"),
        ({}, [f"base.revision={HUB_TOKEN}"], "command line: base.revision contains a hub token"),
        ({}, ["base.model=https://me:secret-word@hub/m"], "command line: base.model contains a login in its address"),
    ],
)
def test_secrets_have_no_place_in_a_recipe_and_are_not_repeated(tmp_path, changes, overrides, says):
    text = refused(tmp_path, changes, *overrides)
    assert says in text
    assert HUB_TOKEN not in text and "secret-word" not in text


def test_no_secret_of_the_environment_is_written_or_said(run_here, tiny_recipe, tmp_path, monkeypatch):
    for key, value in SECRETS.items():
        monkeypatch.setenv(key, value)
    said = run_here(tiny_recipe(tmp_path, **{"stages.mntp.steps": 2, "tracking.tensorboard": True}), "--stage", "mntp")
    written = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert {"metrics.jsonl", "stage.json", "lineage.json"} <= {file.name for file in written}
    for secret in [HUB_TOKEN, SECRETS["WANDB_API_KEY"], "secret-word"]:
        assert secret not in said
        for file in written:
            assert secret.encode() not in file.read_bytes(), file


def test_a_failure_says_no_secret_either(run_here, tiny_recipe, tmp_path, monkeypatch):
    for key, value in SECRETS.items():
        monkeypatch.setenv(key, value)
    said = run_here(
        tiny_recipe(tmp_path), "--stage", "mntp", "base.init=pretrained", "base.model=nobody/nothing", expect=1
    )
    assert "the base 'nobody/nothing' was not found" in said
    assert HUB_TOKEN not in said and "secret-word" not in said
