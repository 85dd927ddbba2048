"""`l2v verify` of the ONNX and GGUF files in an export, each through the engine that reads it."""

import shutil

import pytest
from transformers import AutoTokenizer

from l2v import Encoder
from l2v.commands import main as cli
from l2v.recipe import Template
from l2v.serving.runtimes import LlamaCpp, OnnxRuntime, engines_in
from l2v.serving.verify import engines_of, verify

pytestmark = pytest.mark.filterwarnings("ignore")


def make(base, folder, *formats, **options):
    """An export with further files."""
    for package, flag in (("onnxruntime", "--onnx"), ("onnxscript", "--onnx"), ("llama_cpp", "--gguf")):
        if flag in formats:
            pytest.importorskip(package)
    encoder = Encoder.from_pretrained(base, precision="fp32", length=48, **options)
    source = folder.parent / f"{folder.name}-source"
    encoder.save(source)
    assert cli.main(["export", str(source), str(folder), *formats]) == 0
    return folder


@pytest.fixture(scope="module")
def graphs(base, tmp_path_factory):
    """The default: BOS is not pooled, and becomes the prompt."""
    folder = tmp_path_factory.mktemp("graphs") / "export"
    return make(base, folder, "--onnx", "fp32,int8", template=Template(suffix="</s>"))


@pytest.fixture(scope="module")
def gguf(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf") / "export"
    return make(base, folder, "--gguf", "f16,q8_0", template=Template(suffix="</s>"), pooling="last")


def rows(folder):
    found = verify(folder, engines=engines_in(folder), log=lambda _: None)
    return {row.engine: row for row in found.rows}


@pytest.mark.slow
def test_onnx_runtime_gives_the_vectors_and_int8_shows_its_loss(graphs, capsys):
    assert cli.main(["verify", str(graphs)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[2] for line in lines if line[:2] == ["onnxruntime", "fp32"]] == ["same"]
    assert [line[2] for line in lines if line[:2] == ["onnxruntime", "int8"]] == ["lossy"]
    found = rows(graphs)
    assert (
        found["onnxruntime int8"].cosine > found["onnxruntime fp32"].cosine and found["onnxruntime int8"].recall > 0.5
    )


@pytest.mark.slow
def test_a_graph_of_another_export_differs(graphs, base, tmp_path, capsys):
    """Of the same weights, causal."""
    other = make(base, tmp_path / "causal", "--onnx", "fp32", template=Template(suffix="</s>"), attention="causal")
    mixed = shutil.copytree(graphs, tmp_path / "mixed")
    shutil.copyfile(other / "onnx" / "model.onnx", mixed / "onnx" / "model.onnx")
    assert rows(mixed)["onnxruntime fp32"].same is False
    assert cli.main(["verify", str(mixed)]) == 1


@pytest.mark.slow
def test_llama_cpp_gives_the_vectors_with_its_own_tokenizer(gguf):
    found = rows(gguf)
    assert found["llama.cpp f16"].same is True and found["llama.cpp f16"].cosine < 1e-4
    lossy = found["llama.cpp q8_0"]
    assert lossy.same is None and lossy.cosine > found["llama.cpp f16"].cosine and lossy.recall > 0.9


@pytest.mark.slow
def test_a_gguf_of_another_export_differs(gguf, base, tmp_path):
    options = {"template": Template(suffix="</s>"), "pooling": "last"}
    other = make(base, tmp_path / "causal", "--gguf", "f16", attention="causal", **options)
    mixed = shutil.copytree(gguf, tmp_path / "mixed")
    shutil.copyfile(other / "gguf" / "model-f16.gguf", mixed / "gguf" / "model-f16.gguf")
    assert rows(mixed)["llama.cpp f16"].same is False


def test_only_files_that_exist_are_engines_and_what_is_not_installed_is_skipped(base, tmp_path, monkeypatch):
    folder = tmp_path / "export"
    Encoder.from_pretrained(base, precision="fp32").save(folder)
    assert engines_in(folder) == []
    for file in ("onnx/model_fp16.onnx", "gguf/model-q8_0.gguf"):
        (folder / file).parent.mkdir()
        (folder / file).write_bytes(b"")
    assert engines_in(folder) == [OnnxRuntime("fp16"), LlamaCpp("q8_0")]
    assert engines_of(folder)[-2:] == engines_in(folder)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = rows(folder)
    assert [row.same for row in found.values()] == [None, None]
    assert "pip install 'l2v[onnx]'" in found["onnxruntime fp16"].note
    assert "pip install 'l2v[gguf]'" in found["llama.cpp q8_0"].note


def test_llama_cpp_keeps_eos_of_a_text_that_is_cut(gguf):
    pytest.importorskip("llama_cpp")
    from l2v.formats import gguf_engine
    from l2v.serving.runtimes import _cut

    ids = AutoTokenizer.from_pretrained(gguf)("byen " * 90, truncation=True, max_length=48)["input_ids"]
    with gguf_engine.open_model(gguf) as model:
        assert _cut(model, ("byen " * 90).strip().encode(), 48) == ids and len(ids) == 48
