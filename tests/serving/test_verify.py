"""`l2v verify`: engines that agree, and every way in which one does not."""

import json
import shutil

import numpy as np
import pytest
from support.made_run import make_run
from tokenizers import Tokenizer, processors

from l2v import Encoder
from l2v.commands import main as cli
from l2v.errors import UserError
from l2v.serving.engines import ENGINES, Transformers
from l2v.serving.verify import _judged, recall_at, verify


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_recipe, base):
    given = {"base.model": str(base), "base.init": "pretrained", "base.config": None, "base.tokenizer": None}
    given |= {"base.template": {"prefix": "<pad>bruger\n", "suffix": "</s>"}}
    return make_run(tiny_recipe(tmp_path_factory.mktemp("verified"), **given))


@pytest.fixture(scope="module")
def export(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("verified") / "export"
    Encoder.from_pretrained(run, precision="fp32").save(folder)
    return folder


class Other(Transformers):
    """An engine that changes vectors, as the ones that follow are plugged in."""

    name = "other"

    def __init__(self, change):
        self.change = change

    def open(self, folder):
        encode = super().open(folder)
        return lambda texts, instruction: self.change(encode(texts, instruction))


def rows(folder, *engines, **options):
    return {row.engine: row for row in verify(folder, engines=engines, log=lambda _: None, **options).rows}


def test_all_engines_agree_and_the_command_says_so(export, run, capsys):
    assert cli.main(["verify", str(export), "--against", str(run)]) == 0
    out = capsys.readouterr().out
    assert f"{export}: 64 texts, " in out and "in fp32 (largest difference of an entry 1e-05; in half" in out
    for engine in ("l2v", *(engine.name for engine in ENGINES)):
        assert any(line.split()[:2] == [engine, "same"] for line in out.splitlines()), out


def test_some_texts_are_cut_and_some_have_an_instruction(export, run):
    found = verify(export, engines=[], log=lambda _: None)
    assert found.texts == 64 and found.cut >= 2 and found.longest == 48 and found.same


@pytest.mark.parametrize("change", ["causal", "pooled", "prompt"])
def test_a_folder_that_an_engine_reads_in_another_way_differs(export, tmp_path, change, capsys):
    """Against the run-made export in l2v, whose own file is untouched."""
    shutil.copytree(export, tmp_path / "out")
    file, key, value = {
        "causal": ("config.json", "is_causal", True),
        "pooled": ("1_Pooling/config.json", "include_prompt", True),
        "prompt": ("config_sentence_transformers.json", "default_prompt_name", None),
    }[change]
    facts = json.loads((tmp_path / "out" / file).read_text()) | {key: value}
    (tmp_path / "out" / file).write_text(json.dumps(facts))
    assert cli.main(["verify", str(tmp_path / "out"), "--against", str(export)]) == 1
    assert "sentence-transformers  DIFFERS" in capsys.readouterr().out


def test_a_lost_eos_is_seen_only_against_the_run(export, run, tmp_path):
    shutil.copytree(export, tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(tmp_path / "out" / "tokenizer.json"))
    assert rows(tmp_path / "out", against=str(run))["l2v"].same is False
    assert verify(tmp_path / "out", engines=[], log=lambda _: None).same


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "same", "note"),
    [
        (lambda v: v + np.float32(3e-6), True, "empty text"),
        (lambda v: v + np.where(np.arange(v.shape[1]) == 3, np.float32(3e-5), 0), False, "empty text"),
        (lambda v: v[:, :8], False, "gives vectors of shape"),
        (lambda v: v * np.nan, False, "NaN"),
        (lambda v: [][0], False, "fails: "),
    ],
    ids=["rounding", "one entry", "width", "nan", "error"],
)
def test_an_engine_is_judged_by_its_vectors(export, change, same, note):
    row = rows(export, Other(change))["other"]
    assert row.same is same and note in row.note


@pytest.mark.slow
def test_in_bf16_cosine_and_recall_decide(run, tmp_path):
    """Of l2v's own vectors with noise; two implementations of a random bf16 model exchange some of its crowded neighbours."""
    Encoder.from_pretrained(run, precision="bf16").save(tmp_path / "out")
    noise = np.random.default_rng(0)

    class Noisy:
        name, precision = "noisy", None

        def __init__(self, scale):
            self.scale = scale

        def missing(self):
            return None

        def open(self, folder):
            encode = Encoder.from_pretrained(folder).encode
            return lambda texts, asked: (
                encode(texts, asked, empty="zeros") + noise.normal(0, self.scale, (len(texts), 32)).astype(np.float32)
            )

    row = rows(tmp_path / "out", Noisy(1e-5))["noisy"]
    assert row.same and row.entry > 1e-5  # which fp32 would not allow
    row = rows(tmp_path / "out", Noisy(0.01))["noisy"]
    assert row.same is False and row.cosine > 1e-3
    assert rows(tmp_path / "out", Transformers())["transformers"].cosine < 1e-3


@pytest.mark.parametrize(
    ("precisions", "entry", "cosine", "recall", "same"),
    [
        ({"fp32"}, 9e-6, 1e-9, 1.0, True),
        ({"fp32"}, 2e-5, 1e-9, 1.0, False),
        ({"fp32", "fp16"}, 2e-2, 9e-4, 0.99, True),
        ({"bf16"}, 2e-2, 2e-3, 1.0, False),
        ({"bf16", "f16"}, 1e-3, 1e-4, 0.98, False),
        ({"fp32", "int8"}, 0.5, 0.3, 0.4, None),
        ({"bf16", "q8_0"}, float("nan"), float("nan"), 0.4, False),
    ],
)
def test_the_coarser_precision_decides_and_what_is_quantised_is_not_judged(precisions, entry, cosine, recall, same):
    assert _judged(precisions, entry, cosine, recall) is same


def test_an_engine_that_is_not_installed_is_skipped(export, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = rows(export, ENGINES[1])["sentence-transformers"]
    assert found.same is None and "pip install 'l2v[export]'" in found.note


def test_recall_counts_shared_neighbours():
    """Four vectors in a plane; two nearest of each."""
    angles = np.radians([0, 10, 50, 100])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1)
    assert recall_at(vectors, vectors, nearest=2) == 1
    moved = vectors[[0, 1, 3, 2]]  # the last two exchanged: their places in every list are exchanged
    assert recall_at(vectors, moved, nearest=1) == pytest.approx(0.5)


def test_mistakes_get_a_sentence(base, export, tmp_path, capsys):
    with pytest.raises(UserError, match="not an export of l2v"):
        verify(base)
    assert cli.main(["verify", str(tmp_path / "nowhere")]) == 1
    assert "no such folder" in capsys.readouterr().err
    shutil.copytree(export, tmp_path / "old")
    facts = json.loads((export / "l2v_encoder.json").read_text())
    del facts["strips"]
    (tmp_path / "old" / "l2v_encoder.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="written by an older l2v; export again"):
        verify(tmp_path / "old")
