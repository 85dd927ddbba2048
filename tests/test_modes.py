"""What l2v writes has the mode that the umask gives, so that a colleague can read it; safetensors itself writes 0600."""

import dataclasses
import hashlib
import os
import stat
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from support.made_run import make_run

from l2v import Encoder
from l2v.files import follow_umask
from l2v.machine import calibration
from l2v.training.checkpoint import Checkpoint, newest, save


@pytest.fixture(params=[0o022, 0o027, 0o002, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path) -> str:
    return oct(stat.S_IMODE(path.stat().st_mode))


def check(folder, umask, *needed):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert set(needed) <= {file.name for file in files}
    for path in [folder, *folder.rglob("*")]:
        assert mode(path) == oct((0o777 if path.is_dir() else 0o666) & ~umask), path


def test_a_run_an_export_and_a_checkpoint(umask, tmp_path, tiny_recipe, base, monkeypatch):
    given = {"base.model": str(base), "base.init": "pretrained", "base.config": None, "base.tokenizer": None}
    run = make_run(tiny_recipe(tmp_path, **given), stages=("mntp",))
    check(run, umask, "adapter_model.safetensors", "lineage.json", "stage.json")
    Encoder.from_pretrained(run).save(tmp_path / "out")
    check(tmp_path / "out", umask, "model.safetensors", "tokenizer.json", "modules.json")
    save(tmp_path / "checkpoints", Checkpoint(3, {"x": torch.ones(2)}, {}), keep=1)
    check(tmp_path / "checkpoints", umask, "state.safetensors", "state.json")
    assert newest(tmp_path / "checkpoints").step == 3
    monkeypatch.setenv("L2V_CACHE", str(tmp_path / "cache"))
    calibration(torch.device("cpu"), measure=True, seconds=0.01)
    check(tmp_path / "cache", umask)


def test_a_single_file(umask, tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(1)}, file)
    other = tmp_path / "private"
    other.touch(0o600)
    follow_umask(file)
    assert mode(file) == oct(0o666 & ~umask) and mode(other) == oct(0o600 & ~umask)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["private", "x.safetensors"]


def test_the_converted_base_too(umask, tmp_path, monkeypatch):
    """The embedded base, without its minutes: the conversion's own last steps on a tiny model."""
    import transformers

    from l2v.model import embedded, embedded_convert

    class Tiny:
        config, init_kwargs = SimpleNamespace(), {}

        @classmethod
        def from_pretrained(cls, *_, **__):
            return cls()

        def save_pretrained(self, folder):
            folder.mkdir(exist_ok=True)
            save_file({"x": torch.ones(1)}, folder / "model.safetensors")
            (folder / "config.json").write_text("{}")

    monkeypatch.setattr(transformers, "AutoModelForCausalLM", Tiny)
    monkeypatch.setattr(transformers, "AutoTokenizer", Tiny)
    (tmp_path / "x.gguf").write_bytes(b"x")
    base = dataclasses.replace(embedded.EMBEDDED["gemma-3-270m"], sha256=hashlib.sha256(b"x").hexdigest())
    embedded_convert._convert(base, [tmp_path / "x.gguf"], tmp_path / "models")
    check(tmp_path / "models", umask, "model.safetensors", "NOTICE", embedded.MARKER)
