"""`l2v export --onnx` and `--gguf`: what is asked for wrongly is said before anything is loaded, and what was written after."""

import pytest

from l2v.commands.main import main


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--onnx", "fp32,int4"], "no ONNX precision 'int4'; choose from fp32, fp16, int8"),
        (["--gguf", "q4_k_m"], "no GGUF precision 'q4_k_m'; choose from f16, q8_0"),
    ],
)
def test_a_precision_that_does_not_exist_costs_nothing(base, tmp_path, capsys, option, said):
    assert main(["export", str(base), str(tmp_path / "encoder"), *option]) == 1
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_missing_extra_costs_nothing(base, tmp_path, capsys, monkeypatch):
    from l2v.formats import facts

    monkeypatch.setattr(facts.importlib.util, "find_spec", lambda name: None)
    for option, said in (
        (["--onnx", "fp32"], "pip install 'l2v[onnx]'"),
        (["--gguf", "f16"], "pip install 'l2v[gguf]'"),
    ):
        assert main(["export", str(base), str(tmp_path / "encoder"), *option]) == 1
        assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_export_writes_onnx(base, tmp_path, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    folder = tmp_path / "encoder"
    assert main(["export", str(base), str(folder), "--onnx", "fp32"]) == 0
    assert f"{folder}/onnx/model.onnx: written, fp32, 1 - cosine to fp32 at most" in capsys.readouterr().out
    assert {path.name for path in (folder / "onnx").iterdir()} == {"model.onnx"}


def test_export_says_why_a_gguf_cannot_be(base, tmp_path, capsys):
    """Its BOS token is not pooled; the export itself is written and stays."""
    pytest.importorskip("llama_cpp")
    folder = tmp_path / "encoder"
    assert main(["export", str(base), str(folder), "--gguf", "f16"]) == 1
    assert "cannot be written as GGUF: llama.cpp pools every token" in capsys.readouterr().err
    assert (folder / "config.json").is_file() and not (folder / "gguf").exists()
