"""What a base's licence requires goes with every model made from it."""

import shutil

import pytest
import torch

from l2v import Encoder
from l2v.commands import main as cli
from l2v.errors import UserError
from l2v.model.licence import GEMMA_NOTICE, base_licence, has_notice, has_terms, licence_of_folder, licence_of_type
from l2v.push.licence import check_papers, find_licence

TYPES = {
    "gemma": "gemma", "gemma2": "gemma", "gemma3_text": "gemma", "gemma3n": "gemma", "recurrent_gemma": "gemma",
    "vaultgemma": "gemma", "t5gemma2": "gemma", "gemma4_text": None, "llama": None, "": None, "mamba": None,
}  # fmt: skip


def test_licences_by_type():
    assert {kind: licence_of_type(kind) for kind in TYPES} == TYPES


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({"config.json": '{"model_type": "gemma2"}'}, "gemma"),
        (
            {"config.json": '{"model_type": "gemma2"}', "README.md": "---\nlicense: mit\n---\n"},
            "mit",
        ),  # its card decides
        ({"README.md": "---\nlicense: other\nlicense_name: gemma-terms-of-use\n---\n"}, "gemma"),
        ({"README.md": "---\nlicense: other\nlicense_link: https://ai.google.dev/gemma/terms\n---\n"}, "gemma"),
        ({"Notice": GEMMA_NOTICE.replace("under and", "under\nand") + ".\n"}, "gemma"),
        ({"config.json": '{"model_type": "llama"}', "README.md": "---\nlicense: other\n---\n"}, "other"),
        ({"config.json": "{", "NOTICE": "Meta Llama 3 is licensed"}, None),
        ({}, None),
    ],
)
def test_what_a_folder_shows(files, licence, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert licence_of_folder(tmp_path) == licence == base_licence(str(tmp_path), "qwen3")


def test_embedded_bases_and_hub_names():
    assert base_licence("gemma-3-270m", "") == "gemma" and base_licence("smollm2-135m-instruct", "") == "apache-2.0"
    assert base_licence("google/gemma-3-1b-pt", "gemma3_text") == "gemma" and base_licence("x/y", "llama") is None
    for name in ("gemma-3-270m", "google/gemma-2-2b", "google/embeddinggemma-300m", "google/gemma-3n-E2B"):
        assert find_licence(name, name, None, lambda _: None).identifier == "gemma", name
        assert find_licence(name, name, None, lambda _: "other").identifier == "gemma", name
        with pytest.raises(UserError, match="Gemma Terms of Use, which bind every model made from it"):
            find_licence(name, name, "mit", lambda _: None)
    assert (
        find_licence("google/gemma-4-E2B", "google/gemma-4-E2B", "apache-2.0", lambda _: None).identifier
        == "apache-2.0"
    )


@pytest.fixture(scope="module")
def gemma(tmp_path_factory, bos_tokenizer_folder):
    """A folder with a tiny Gemma 3, as a user may have one."""
    from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

    folder = tmp_path_factory.mktemp("gemma") / "base"
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    torch.manual_seed(0)
    Gemma3ForCausalLM(Gemma3TextConfig(**sizes, num_key_value_heads=1, vocab_size=300)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(bos_tokenizer_folder).save_pretrained(folder)
    return folder


def test_an_export_and_what_is_pushed_carry_them(gemma, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("L2V_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("l2v.model.licence.package_file", lambda part: None)  # on a machine without the embedded Gemma
    export, ready, again = tmp_path / "export", tmp_path / "ready", tmp_path / "again"
    Encoder.from_pretrained(gemma).save(export)
    notice = (export / "NOTICE").read_text(encoding="utf-8")
    assert notice.startswith(GEMMA_NOTICE + "\n") and "modified" in notice and "bidirectional" in notice
    Encoder.from_pretrained(export, attention="causal").save(again)
    assert (again / "NOTICE").read_text(encoding="utf-8").startswith(notice) and has_notice(again, GEMMA_NOTICE)
    push = ["push", str(export), "mig/dansk", "--base-model", "google/gemma-3-270m", "--dry-run"]
    assert cli.main([*push, str(tmp_path / "without")]) == 1
    assert (
        "missing: a copy of the terms (the page ai.google.dev/gemma/terms as GEMMA_TERMS.html)"
        in capsys.readouterr().err
    )
    (export / "GEMMA_TERMS.html").write_text("<p>Vilkår</p>", encoding="utf-8")
    assert cli.main([*push, str(ready)]) == 0
    assert (ready / "GEMMA_TERMS.html").is_file() and (export / "NOTICE").read_text(encoding="utf-8") == notice
    card = (ready / "README.md").read_text(encoding="utf-8")
    assert "license: gemma" in card and GEMMA_NOTICE in card and "prohibited_use_policy" in card and "modified" in card
    capsys.readouterr()
    assert cli.main([*push, str(tmp_path / "other"), "--license", "mit"]) == 1
    assert "omit --license, or give --license gemma" in capsys.readouterr().err


BARE = "---\nlicense: gemma\n---\n"
HARMS = {
    "NOTICE": ("that sentence in a file NOTICE", lambda folder: (folder / "NOTICE").unlink()),
    "terms": ("a copy of the terms", lambda folder: (folder / "GEMMA_TERMS.html").unlink()),
    "card": ("'license: gemma' in its card", lambda f: (f / "README.md").write_text("---\nlicense: mit\ntags: [l2v]\n---\n")),
    "sentence": (f"the sentence '{GEMMA_NOTICE}' in its card", lambda f: (f / "README.md").write_text(BARE)),
}  # fmt: skip


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("kind", ["adapter_config.json", "l2v_encoder.json"])
def test_push_refuses_a_folder_without_them(harm, kind, tmp_path, capsys, monkeypatch):
    """A folder that `l2v push --dry-run` wrote, and that someone has changed since."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    named = {"adapter_config.json": '{"base_model_name_or_path": "google/gemma-3-1b-pt"}',
             "l2v_encoder.json": '{"lineage": {"base": {"model": "gemma-3-270m"}, "merged": []}}'}  # fmt: skip
    (tmp_path / kind).write_text(named[kind])
    (tmp_path / "NOTICE").write_text(GEMMA_NOTICE)
    (tmp_path / "GEMMA_TERMS.html").write_text("Vilkår")
    (tmp_path / "README.md").write_text(f"---\nlicense: gemma\ntags: [l2v]\n---\n{GEMMA_NOTICE}\n")
    check_papers(tmp_path)
    says, change = HARMS[harm]
    change(tmp_path)
    assert cli.main(["push", str(tmp_path), "mig/dansk"]) == 1
    said = capsys.readouterr().err
    assert says in said and "made from Gemma" in said and said.count("\n") == 1


def test_other_models_owe_nothing(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3-0.6B"}')
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    check_papers(tmp_path)
    assert not has_terms(tmp_path)
    shutil.copyfile(tmp_path / "config.json", tmp_path / "Gemma_Terms_of_Use.md")
    assert has_terms(tmp_path)
