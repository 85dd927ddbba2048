"""`l2v push` against a stand-in Hub: what arrives is what lies on disk, cards hold what the files say, mistakes are sentences."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from support.build_cases import configure, danish, make, source, write_lines
from support.hub import Hub
from support.made_run import make_run, merged, write_results

from l2v import Encoder
from l2v.commands import main as cli
from l2v.errors import UserError
from l2v.evaluation.seb import BY_NAME
from l2v.push.licence import Licence, find_licence
from l2v.recipe import Template

TOKEN = "hf_hemmelig"
KNOWN = ("--license", "apache-2.0", "--base-model", "nogen/lille")


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_recipe):
    """A run whose base is a folder that others can load, with scores."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("push")
    tree = yaml.safe_load(tiny_recipe(folder).read_text(encoding="utf-8"))
    base = folder / "base"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**tree["base"]["config"], initializer_range=0.2)).save_pretrained(base)
    AutoTokenizer.from_pretrained(tree["base"]["tokenizer"]).save_pretrained(base)
    (base / "LICENSE").write_text("Basens licens.\n", encoding="utf-8")
    given = {"base.model": str(base), "base.init": "pretrained", "base.config": None, "base.tokenizer": None}
    template = {"base.template": {"prefix": "tekst: ", "suffix": ""}, "stages.mntp.data": [{"path": "hub:nogen/dansk"}]}
    run = make_run(tiny_recipe(folder, **given, **template))
    write_results(run)
    return run


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_merged_encoder_arrives_whole(run, hub, tmp_path, capsys, sentences):
    assert cli.main(["push", str(run), "mig/dansk-lille", "--private", *KNOWN]) == 0
    out = capsys.readouterr()
    assert f"{hub.url}/mig/dansk-lille" in out.out and TOKEN not in out.out + out.err
    arrived = hub.repos["model", "mig/dansk-lille"]
    assert hub.private["model", "mig/dansk-lille"] and {
        token for token, path in hub.tokens if "/repos/" in path or "lille" in path
    } == {f"Bearer {TOKEN}"}
    assert {"README.md", "model.safetensors", "1_Pooling/config.json", "LICENSE", "l2v_encoder.json"} <= arrived.keys()
    for name, data in arrived.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
        assert str(run).encode() not in data and str(run.parent).encode() not in data, name  # no path of this machine
    here, there = Encoder.from_pretrained(run), Encoder.from_pretrained(tmp_path)
    np.testing.assert_array_equal(here.encode(sentences[:8]), there.encode(sentences[:8]))
    assert not list(run.glob("hub-*"))  # sent, so not kept
    lineage = json.loads(arrived["l2v_encoder.json"])["lineage"]
    assert [entry["sha256"] for entry in lineage["merged"]] == merged(run)
    assert [entry["adapter"] for entry in lineage["merged"]] == ["mntp", "supervised"]


def test_the_card_says_what_the_files_say(run, tmp_path, capsys):
    folder = tmp_path / "dry"
    assert cli.main(["push", str(run), "mig/dansk-lille", "--dry-run", str(folder), *KNOWN]) == 0
    said = capsys.readouterr().out
    assert "nothing was sent" in said and "model.safetensors" in said and "model mig/dansk-lille" in said
    text = (folder / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    data = card.data
    assert (data.base_model, data.language, data.license) == ("nogen/lille", "da", "apache-2.0")
    assert (data.library_name, data.pipeline_tag) == ("sentence-transformers", "sentence-similarity")
    assert data.datasets == ["nogen/dansk"] and {"l2v", "danish", "sentence-transformers"} <= set(data.tags)
    results = json.loads((run / "eval" / "results.json").read_text(encoding="utf-8"))
    own = results["rows"][1]["scores"]
    found = {re.match(r"(\S+) \((.*)\)", e.dataset_name)[1]: e for e in data.eval_results}
    assert found.keys() == own.keys()
    for name, one in found.items():
        assert one.metric_value == pytest.approx(100 * own[name]["score"]) and one.metric_type == own[name]["metric"]
        assert one.dataset_revision == "abc123" and one.task_type == own[name]["type"]
        if name in BY_NAME:
            assert (one.dataset_split, one.dataset_config) == (BY_NAME[name].split, BY_NAME[name].subset)
            assert one.dataset_type != name  # the data set on the Hub, as mteb knows it
    mean = 100 * np.mean([own[name]["score"] for name in BY_NAME])
    assert f"| tiny/run | {mean:.2f} |" in text and "| TF-IDF (characters) |" in text
    for sha in merged(run):
        assert sha in text
    assert "| lr | 0.005 | 0.003 |" in text and "8 steps in total" in text
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(code, "card", "exec")
    assert str(run.parent) not in text


def test_adapters_alone_give_the_same_vectors(run, hub, tmp_path, monkeypatch, auto_precision):
    """On either kind of processor: the recipe states its precision, so the card states it too."""
    assert cli.main(["push", str(run), "mig/adaptere", "--adapter-only", *KNOWN]) == 0
    for name, data in hub.repos["model", "mig/adaptere"].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
        assert str(run.parent).encode() not in data, name
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "nogen/lille"
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft" and card.data.base_model_relation == "adapter"
    [code] = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    base = str(run.parent / "base")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo: {"mig/adaptere": str(tmp_path)}[repo])
    space = {}
    exec(code.replace('"nogen/lille"', repr(base)), space)  # the card's own words, with the base that is here
    texts = ["Hvor ligger Skagen?", "Skagen er Danmarks nordligste by."]
    assert '    precision="fp32",\n)\n' in code
    ours = Encoder.from_pretrained(run)
    np.testing.assert_allclose(space["vectors"], ours.encode(texts), atol=1e-6)
    assert space["encoder"].model.decoder.dtype == ours.model.decoder.dtype == torch.float32
    assert isinstance(space["encoder"].tokenizer.template, Template)


def test_an_export_goes_with_a_card_of_its_run(run, tmp_path, capsys):
    export = run / "encoder"
    Encoder.from_pretrained(run).save(export)
    try:
        dry = tmp_path / "dry"
        assert cli.main(["push", str(export), "mig/x", "--dry-run", str(dry), *KNOWN]) == 0
        assert (dry / "model.safetensors").read_bytes() == (export / "model.safetensors").read_bytes()
        assert str(run.parent) not in (dry / "l2v_encoder.json").read_text(encoding="utf-8")
        assert str(run.parent) in (export / "l2v_encoder.json").read_text(encoding="utf-8")  # the user's stays as it is
        text = (dry / "README.md").read_text(encoding="utf-8")
        assert "| lr | 0.005 | 0.003 |" in text and ModelCard(text).data.eval_results
    finally:
        shutil.rmtree(export)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build")
    write_lines(folder / "a.jsonl", [{"text": danish(i)} for i in range(60)])
    make(configure(folder, "documents", [source("a.jsonl", origin="skrevet til prøven")]), folder / "out")
    return folder / "out"


@pytest.mark.slow
def test_a_data_set_arrives_whole_through_the_environment(dataset, hub, tmp_path):
    """A process of its own, which gets HF_ENDPOINT and HF_TOKEN and nothing else."""
    root = Path(__file__).parents[2]
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}",
    }  # fmt: skip
    command = [sys.executable, "-m", "l2v.commands.main", "push", str(dataset), "mig/prove-data"]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    arrived = hub.repos["dataset", "mig/prove-data"]
    on_disk = {name: data for name, data in files(dataset).items() if name in arrived}
    assert arrived == on_disk and {"README.md", "report.md", "report.json"} < arrived.keys()
    assert any(name.endswith(".parquet") for name in arrived)
    assert TOKEN not in done.stdout + done.stderr


def test_a_data_set_that_does_not_hold_what_its_report_counts(dataset, tmp_path, capsys):
    bad = tmp_path / "bad"
    shutil.copytree(dataset, bad)
    report = json.loads((bad / "report.json").read_text(encoding="utf-8"))
    report["splits"]["train"] += 1
    (bad / "report.json").write_text(json.dumps(report), encoding="utf-8")
    assert cli.main(["push", str(bad), "mig/d", "--dry-run", str(tmp_path / "dry")]) == 1
    assert "report.json counts" in capsys.readouterr().err and not (tmp_path / "dry").exists()


@pytest.mark.parametrize(
    ("fail", "says"),
    [
        ({"/api/repos/create": 401}, "does not accept the token (401)"),
        ({"/api/repos/create": 403}, "may not write to mig/x (403)"),
        ({"/commit/": 403}, "may not write to mig/x (403)"),
        ({"/api/repos/create": 500}, "failed (500)"),
        ({"/lfs/": 403}, "may not write to mig/x (403)"),
        ({"/api/repos/create": 429}, "limits the rate of requests (429)"),
    ],
)
def test_refusals_are_one_sentence_each_and_nothing_is_lost(run, hub, fail, says, capsys):
    hub.fail = fail
    assert cli.main(["push", str(run), "mig/x", "--adapter-only", *KNOWN]) == 1
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("l2v: ")]
    assert len(lines) == 1 and says in lines[0] and "Traceback" not in said and TOKEN not in said
    kept = run / "hub-x"
    assert str(kept) in lines[0]
    hub.fail = {}
    assert cli.main(["push", str(kept), "mig/x"]) == 0  # what the sentence says
    assert hub.repos["model", "mig/x"] == files(kept)
    shutil.rmtree(kept)


def test_no_network_no_login_and_offline(run, hub, monkeypatch, tmp_path, capsys):
    hub.server.shutdown()
    hub.server.server_close()
    command = ["push", str(run), "mig/y", "--adapter-only", *KNOWN]
    assert cli.main(command) == 1
    assert f"{hub.url} cannot be reached" in capsys.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert cli.main(command) == 1
    assert "no login for the hub" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert cli.main(command) == 0
    assert "nothing was sent" in capsys.readouterr().out and (run / "hub-y" / "README.md").is_file()
    shutil.rmtree(run / "hub-y")


def test_private_never_becomes_public(run, hub, capsys):
    hub.repos["model", "mig/aaben"], hub.private["model", "mig/aaben"] = {}, False
    assert cli.main(["push", str(run), "mig/aaben", "--private", "--adapter-only", *KNOWN]) == 1
    assert "is public" in capsys.readouterr().err and not hub.repos["model", "mig/aaben"]
    shutil.rmtree(run / "hub-aaben")


def test_a_bare_name_is_the_users_own_in_the_card_too(run, hub, capsys):
    assert cli.main(["push", str(run), "--adapter-only", *KNOWN]) == 0
    assert 'snapshot_download("mig/tiny")' in hub.repos["model", "mig/tiny"]["README.md"].decode()
    hub.fail = {"/api/whoami-v2": 401}
    assert cli.main(["push", str(run), "--adapter-only", *KNOWN]) == 1
    assert "does not accept the token (401)" in capsys.readouterr().err


def test_llama_3_has_its_notice_and_its_name(run, tmp_path, capsys):
    given = ["--license", "llama3", "--base-model", "meta-llama/Meta-Llama-3-8B-Instruct", "--adapter-only"]
    assert cli.main(["push", str(run), "mig/dansk", "--dry-run", str(tmp_path / "a"), *given]) == 1
    assert "use mig/Llama-3-dansk" in capsys.readouterr().err
    assert cli.main(["push", str(run), "mig/Llama-3-dansk", "--dry-run", str(tmp_path / "a"), *given]) == 0
    text = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert "**Built with Meta Llama 3**" in text and ModelCard(text).data.license == "llama3"
    assert (tmp_path / "a" / "NOTICE").read_text(encoding="utf-8").startswith("Meta Llama 3 is licensed under")
    capsys.readouterr()
    assert cli.main(["push", str(run), "--dry-run", str(tmp_path / "b"), *given]) == 0
    assert "model Llama-3-tiny" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("base", "identifier"),
    [
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3"),
        ("AI-Sweden-Models/Llama-3-8B-instruct", "llama3"),
        ("meta-llama/Llama-3.1-8B", "llama3.1"),
        ("meta-llama/Llama-3.2-1B", "llama3.2"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
    ],
)
def test_licences_by_name(base, identifier):
    assert find_licence(base, base, None, lambda _: None).identifier == identifier
    assert find_licence(base, base, None, lambda _: "mit").identifier == "mit"  # the base's own card knows better
    assert find_licence(base, base, "cc0-1.0", lambda _: "mit").identifier == "cc0-1.0"


def test_the_card_in_the_bases_folder_tells_its_licence(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: llama3\n---\n# Base\n", encoding="utf-8")
    found = find_licence(str(tmp_path), "nogen/lille", None, lambda _: "mit")
    assert found.identifier == "llama3" and found.prefix == "Llama-3"
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n", encoding="utf-8")
    with pytest.raises(UserError, match="not valid YAML"):
        find_licence(str(tmp_path), "nogen/lille", None, lambda _: None)


def test_names_that_llama_licences_allow():
    three, later = Licence.of("llama3"), Licence.of("llama3.2")
    assert three.name("llama3-8b-da") == "Llama-3-8b-da" and three.name("Llama-3-x") == "Llama-3-x"
    assert later.name("mit-navn") == "Llama-mit-navn" and later.built_with == "Built with Llama"
    assert Licence.of("apache-2.0").name("navn") == "navn"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{run}", "mig/x", "--license", "mit"], "give its name on the hub with --base-model"),
        (["{run}", "mig/x", "--base-model", "nogen/lille"], "licence of the base"),
        (["{run}", "a/b/c", *KNOWN], "not a valid repository name"),
        (["{run}/nowhere", "mig/x"], "no such folder"),
        (["{run}/eval", "mig/x"], "neither a run"),
        (["{run}/mntp", "mig/x", "--dry-run", "{run}", *KNOWN], "not empty"),
        (["{run}", "mig/x", "--results", "{run}/mntp/stage.json", *KNOWN], "not the results.json"),
    ],
)
def test_mistakes_are_sentences(arguments, says, run, capsys):
    assert cli.main(["push", *(a.format(run=run) for a in arguments)]) == 1
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
