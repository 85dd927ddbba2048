"""One vector for one text: Encoder, model card, `l2v search` and export agree, whatever `auto` means on the processor."""

import json
import re
import warnings

import huggingface_hub
import numpy as np
import pytest
import torch
from support.made_run import make_run

from l2v import Encoder
from l2v.commands import main as cli
from l2v.errors import Notice
from l2v.model.load import dtype_of

KNOWN = ("--license", "apache-2.0", "--base-model", "nogen/lille")
CLOSE = {"rtol": 0, "atol": 1e-5}  # fp32 in two implementations; bf16 differs by more than 1e-3


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_recipe, base):
    """A run that leaves its precision to the machine."""
    given = {"base.model": str(base), "base.init": "pretrained", "base.config": None, "base.tokenizer": None}
    return make_run(tiny_recipe(tmp_path_factory.mktemp("one-vector"), **given, **{"base.precision": "auto"}))


@pytest.fixture(scope="module")
def expected(run, sentences):
    """Vectors in fp32, which those in bf16 are far from."""
    vectors = Encoder.from_pretrained(run, precision="fp32").encode(sentences[:12])
    rounded = Encoder.from_pretrained(run, precision="bf16").encode(sentences[:12])
    assert np.abs(rounded - vectors).max() > 1e-3
    return vectors


def card_codes(folder, *arguments):
    """The Python of the card that `l2v push` writes into `folder`."""
    assert cli.main(["push", *arguments, "--dry-run", str(folder), *KNOWN]) == 0
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_all_ways_give_the_same_vectors(run, expected, auto_precision, sentences, tmp_path, monkeypatch, capsys):
    texts = sentences[:12]
    assert dtype_of("auto") == auto_precision and dtype_of("auto", encoding=True) == torch.float32
    encoder = Encoder.from_pretrained(run)
    assert encoder.model.decoder.dtype == torch.float32
    assert Encoder.identity(run) == Encoder.identity(run, precision="fp32")
    np.testing.assert_allclose(encoder.encode(texts), expected, **CLOSE)

    export = tmp_path / "export"
    assert cli.main(["export", str(run), str(export)]) == 0
    np.testing.assert_allclose(Encoder.from_pretrained(export).encode(texts), expected, **CLOSE)

    lines = "".join(text + "\n" for text in texts)
    (tmp_path / "texts.txt").write_text(lines, encoding="utf-8")
    for model in (run, export):
        capsys.readouterr()
        question = ["search", str(model), texts[3], "--texts", str(tmp_path / "texts.txt"), "--top", "12", "--json"]
        assert cli.main(question) == 0
        hits = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        scores = {hit["text"]: hit["score"] for hit in hits}
        np.testing.assert_allclose([scores[text] for text in texts], expected @ expected[3], **CLOSE)


def test_so_does_the_code_of_the_cards(run, auto_precision, base, tmp_path, monkeypatch):
    texts = ["Hvor ligger Skagen?", "Skagen er Danmarks nordligste by."]
    expected = Encoder.from_pretrained(run, precision="fp32").encode(texts)
    folders = {"mig/ens": tmp_path / "merged", "mig/dele": tmp_path / "adapters"}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo: str(folders[repo]))
    codes = card_codes(folders["mig/ens"], str(run), "mig/ens")
    codes += card_codes(folders["mig/dele"], str(run), "mig/dele", "--adapter-only")
    assert len(codes) == 3 and "precision" not in codes[2]
    for code in codes:
        code = code.replace('SentenceTransformer("mig/ens")', f"SentenceTransformer({str(folders['mig/ens'])!r})")
        space: dict = {}
        exec(code.replace('"nogen/lille"', repr(str(base))), space)
        np.testing.assert_allclose(space["vectors"], expected[: len(space["vectors"])], **CLOSE)


def test_an_unfinished_run_says_which_stage_is_used(run):
    says = rf"^{run}: its stage 'supervised' is used; not trained yet: simcse \(l2v train resumes\)$"
    with pytest.warns(Notice, match=says) as seen:
        Encoder.from_pretrained(run)
    assert seen[0].filename == __file__
    assert cli._format(seen[0].message, Notice, "f.py", 1) == f"l2v: {seen[0].message}\n"
    assert cli._format(UserWarning("x"), UserWarning, "f.py", 7).startswith("f.py:7: UserWarning: x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Encoder.from_pretrained(run / "mntp")  # asked for by its name


@pytest.mark.parametrize("stated", ["bf16", "fp32"])
def test_a_stated_precision_is_kept(base, auto_precision, tmp_path, stated):
    """By the caller, and then by the export, which says so in its file."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[stated]
    encoder = Encoder.from_pretrained(base, precision=stated)
    assert encoder.model.decoder.dtype == dtype
    assert cli.main(["export", str(base), str(tmp_path / "out"), "--precision", stated, "--length", "24"]) == 0
    again = Encoder.from_pretrained(tmp_path / "out")
    assert again.model.decoder.dtype == dtype and again.max_length == 24
    np.testing.assert_array_equal(again.encode("Hunden løber."), encoder.encode("Hunden løber."))
    assert json.loads((tmp_path / "out" / "l2v_encoder.json").read_text())["precision"] == stated


def test_on_a_gpu_auto_stays_what_it_is_in_training(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("L2V_AUTO_PRECISION", raising=False)
    assert dtype_of("auto", encoding=True) == torch.bfloat16
    monkeypatch.setenv("L2V_AUTO_PRECISION", "fp32")
    assert dtype_of("auto", encoding=True) == torch.float32
