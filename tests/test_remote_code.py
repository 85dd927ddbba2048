"""Code that comes with a base runs only if the caller says so: never by a run, a recipe or an export that came from elsewhere."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from support.made_run import make_run

from l2v import Encoder
from l2v.commands import main as cli
from l2v.data.tokens import load_tokenizer
from l2v.errors import RecipeError, UserError
from l2v.model.load import load_config, load_model
from l2v.recipe import Base
from l2v.recipe.load import load_recipe
from l2v.recipe.shipped import recipe_folder

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "l2v").rglob("*.py"))
KNOWN = ("--license", "apache-2.0", "--base-model", "nogen/lille")
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast
Path({mark!r}).touch()
class C(LlamaConfig):
    model_type = "of-its-own"
class M(LlamaModel):
    config_class = C
class T(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def mark(tmp_path, monkeypatch) -> Path:
    """The file that the code writes when it runs; modules that transformers copies stay in the test's folder."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return tmp_path / "it-ran"


def add_code(base: Path, mark: Path, **config) -> Path:
    """Gives a base code of its own; config: changes of its config.json."""
    (base / "code.py").write_text(CODE.format(mark=str(mark)), encoding="utf-8")
    file = base / "config.json"
    auto = {"auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | auto | config))
    return base


@pytest.fixture(params=["of-its-own", "llama"])
def received(request, tmp_path, base, tiny_recipe, mark) -> tuple[Path, Path]:
    """A run whose recipe says `trust_remote_code: true`, and its base; for a known type transformers has a class itself."""
    own = shutil.copytree(base, tmp_path / "its-base")
    given = {"base.model": str(own), "base.init": "pretrained", "base.config": None, "base.tokenizer": None}
    run = make_run(tiny_recipe(tmp_path, **given))
    add_code(own, mark, model_type=request.param)
    for file in run.glob("*/stage.json"):
        facts = json.loads(file.read_text(encoding="utf-8"))
        facts["recipe"]["base"]["trust_remote_code"] = True
        file.write_text(json.dumps(facts), encoding="utf-8")
    return run, own


def refusal(base: Path) -> str:
    return (
        f"'{base}' needs the code that comes with '{base}', and l2v does not run it unasked; read it, then allow it with "
        "--trust-remote-code (in Python: trust_remote_code=True; for l2v train: base.trust_remote_code=true)"
    )


def test_a_received_run_runs_nothing_by_any_command(received, mark, tmp_path, write_jsonl, sentences, capsys):
    run, base = received
    for load in (Encoder.from_pretrained, Encoder.identity):
        with pytest.raises(UserError) as error:
            load(run)
        assert str(error.value) == refusal(base)
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in sentences[:8]])
    pairs = write_jsonl(tmp_path / "p.jsonl", [{"query": t, "positive": t[::-1]} for t in sentences[:8]])
    bitext = tmp_path / "set"
    bitext.mkdir()
    write_jsonl(bitext / "bitext.jsonl", [{"da": t, "en": t[::-1]} for t in sentences[:8]])
    commands = {
        "search": ["search", run, "hund", "--texts", texts],
        "eval": ["eval", run, "--benchmark", f"local:{bitext}", "--out", tmp_path / "scores"],
        "eval --stages": ["eval", run, "--stages", "--benchmark", f"local:{bitext}", "--out", tmp_path / "scores"],
        "export": ["export", run, tmp_path / "out"],
        "push": ["push", run, "mig/x", "--dry-run", tmp_path / "dry", *KNOWN],
        "data mine": ["data", "mine", run, pairs, "--out", tmp_path / "mined.jsonl"],
    }
    for name, command in commands.items():
        assert cli.main([str(word) for word in command]) == 1, name
        said = "".join(capsys.readouterr())
        assert refusal(base) in said.replace("\n", " ") and "Traceback" not in said, name
        assert not mark.exists(), name
    assert cli.main(["report", str(run)]) == 0  # the page, without the map that needs the model
    assert refusal(base) in (run / "report.md").read_text(encoding="utf-8")
    assert not mark.exists()


def test_the_caller_may_allow_it(received, mark, tmp_path, write_jsonl, sentences, capsys):
    run, base = received
    with pytest.raises(UserError):
        load_config(Base(str(base), trust_remote_code=True))  # what a base says is a wish
    assert not mark.exists()
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in sentences[:8]])
    assert cli.main(["search", str(run), "hund", "--texts", texts, "--trust-remote-code"]) == 0
    assert mark.exists() and capsys.readouterr().out.count(f"{texts}, line ") == 3


def test_an_export_with_code_is_refused_too(tmp_path, base, mark):
    folder = tmp_path / "export"
    Encoder.from_pretrained(base).save(folder)
    add_code(folder, mark, model_type="of-its-own")
    with pytest.raises(UserError, match=re.escape(refusal(folder))):
        Encoder.from_pretrained(folder)
    assert not mark.exists()


def test_the_repository_that_holds_the_code_is_named(tmp_path, base):
    """A repository may point to the code of another one, and have some of its own."""
    own = shutil.copytree(base, tmp_path / "pointer")
    file = own / "config.json"
    auto = {"auto_map": {"AutoConfig": "nogen/andet--code.C", "AutoModel": "code.M"}, "model_type": "of-its-own"}
    file.write_text(json.dumps(json.loads(file.read_text()) | auto))
    with pytest.raises(
        UserError, match=rf"^'{own}' needs the code that comes with 'nogen/andet' and '{own}', and l2v "
    ):
        Encoder.from_pretrained(own)


def test_a_tokenizer_with_code_is_refused(tmp_path, base, mark):
    own = shutil.copytree(base, tmp_path / "tokenizer")
    add_code(own, mark, model_type="of-its-own")
    file = own / "tokenizer_config.json"
    facts = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": [None, "code.T"]}, "tokenizer_class": "T"}
    file.write_text(json.dumps(facts))
    with pytest.raises(UserError, match=re.escape(f"'{own}' needs the code that comes with '{own}'")):
        load_tokenizer(str(own))
    assert not mark.exists()


@pytest.mark.parametrize("config", [{}, {"model_type": "llama"}], ids=["own type", "known type"])
def test_code_beside_a_base_does_not_run(tmp_path, base, mark, config):
    own = add_code(shutil.copytree(base, tmp_path / "base"), mark, **{"model_type": "of-its-own"} | config)
    if config:  # nobody asked for its code, and transformers has a class for it
        load_model(Base(str(own)), head=False, dtype=torch.float32)
    else:
        with pytest.raises(UserError, match="needs the code that comes with"):
            load_model(Base(str(own)), head=False, dtype=torch.float32)
    assert not mark.exists()


def test_training_takes_the_word_of_the_command_line_alone(tmp_path, base, tiny_recipe, mark, run_here):
    own = add_code(shutil.copytree(base, tmp_path / "base"), mark, model_type="of-its-own")
    given = {"base.model": str(own), "base.init": "pretrained", "base.config": None, "base.tokenizer": None}
    file = tiny_recipe(tmp_path, **given, **{"base.trust_remote_code": True})
    line = next(n for n, text in enumerate(file.read_text().splitlines(), 1) if "trust_remote_code" in text)
    says = (
        f"{file}:{line}: base.trust_remote_code: true would run the code that comes with '{own}', and a file cannot allow "
        "that; read the code, then add base.trust_remote_code=true to the command line"
    )
    assert says in run_here(file, "--stage", "simcse", "simcse.from=base", expect=2)
    child = tmp_path / "child.yaml"
    child.write_text(yaml.safe_dump({"extends": str(file), "name": "child"}))
    for path in (file, child):
        with pytest.raises(RecipeError, match=re.escape(says)):
            load_recipe(str(path))
        assert load_recipe(str(path), ["base.trust_remote_code=true"]).base.trust_remote_code is True
        assert load_recipe(str(path), ["base.trust_remote_code=false"]).base.trust_remote_code is False
    said = run_here(file, "--stage", "simcse", "simcse.from=base", "base.trust_remote_code=false", expect=1)
    assert refusal(own) in said and not mark.exists()
    run_here(file, "--stage", "simcse", "simcse.from=base", "base.trust_remote_code=true")
    assert mark.exists()
    assert "already trained" in run_here(file, "--stage", "simcse", "simcse.from=base", "base.trust_remote_code=true")


def calls():
    """(file, dotted name, the call) for every call in l2v."""
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield file, ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def test_no_call_leaves_the_question_to_transformers():
    """Without the argument transformers asks at the keyboard. No call says True."""
    loads = 0
    said = set()
    for file, name, given in calls():
        owner, _, last = name.rpartition(".")
        if last in ("from_pretrained", "from_config") and re.fullmatch(r"auto|Auto[A-Z]\w+", owner):
            loads += 1
            # The embedded base is a GGUF file of a package, which cannot hold code.
            assert "trust_remote_code" in given or "gguf_file" in given, file
        said.add(given.get("trust_remote_code"))
    assert loads >= 7 and "True" not in said


def test_what_a_base_says_is_read_in_few_places():
    """The check itself, and three that get their recipe from `load_recipe`, which lets it through from the command line alone."""
    found = set()
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == "trust_remote_code":
                found.add((str(file.relative_to(ROOT / "l2v")), ast.unparse(node.value)))
    allowed = {"model/load.py", "training/build.py", "training/stage.py", "plan/shapes.py"}
    assert {file for file, owner in found if owner != "args"} == allowed
    assert Base("any").trust_remote_code is False
    for recipe in recipe_folder().glob("*.yaml"):
        assert load_recipe(str(recipe)).base.trust_remote_code is False
