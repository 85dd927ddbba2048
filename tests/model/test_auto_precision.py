"""`precision: auto` on either kind of processor: with bf16 in hardware (AVX512-BF16, AMX) and without."""

import json
import re

import numpy as np
import pytest
import torch

from l2v import Encoder
from l2v.commands import doctor
from l2v.errors import UserError
from l2v.machine import calibration, calibration_file
from l2v.model import load
from l2v.model.load import dtype_of

CPU = torch.device("cpu")


def test_auto_alone_depends_on_the_machine(auto_precision):
    assert dtype_of("auto") == auto_precision
    assert (dtype_of("bf16"), dtype_of("fp32")) == (torch.bfloat16, torch.float32)
    assert dtype_of("auto", named_gpu=True) == torch.bfloat16


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("name", ["_is_avx512_bf16_supported", "_is_amx_tile_supported", None])
def test_unforced_it_follows_the_hardware(monkeypatch, gpu, name):
    monkeypatch.delenv(load.AUTO_PRECISION, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, check, lambda check=check: check == name, raising=False)
    assert dtype_of("auto") == (torch.bfloat16 if gpu or name else torch.float32)


@pytest.mark.parametrize("value", ["fp16", "", "BF16", "auto"])
def test_any_other_value_is_refused_in_one_sentence(monkeypatch, run_here, tiny_recipe, tmp_path, value):
    monkeypatch.setenv("L2V_AUTO_PRECISION", value)
    with pytest.raises(UserError, match=rf"^L2V_AUTO_PRECISION is '{value}'; set it to bf16 or fp32, or unset it$"):
        dtype_of("auto")
    assert dtype_of("fp32") == torch.float32, "a recipe that states its precision does not read it"
    if value == "fp16":
        said = run_here(tiny_recipe(tmp_path, **{"base.precision": "auto"}), "--stage", "mntp", expect=1)
        own = [line for line in said.splitlines() if line.startswith("l2v: ")]
        assert own == ["l2v: L2V_AUTO_PRECISION is 'fp16'; set it to bf16 or fp32, or unset it"]
        assert "Traceback" not in said
        assert not (tmp_path / "run").exists()


def test_a_run_trains_in_it_and_encodes_in_fp32(auto_precision, run_here, tiny_recipe, tmp_path, sentences):
    """A tiny run with `auto` against the same run with its precision stated."""
    name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[auto_precision]
    auto = tiny_recipe(tmp_path, **{"base.precision": "auto"})
    run_here(auto, "--stage", "mntp")
    run_here(auto, "--stage", "mntp", f"base.precision={name}", f"out={tmp_path / 'stated'}")

    def losses(run):
        rows = map(json.loads, (tmp_path / run / "mntp" / "metrics.jsonl").read_text().splitlines())
        return [row["loss"] for row in rows if "loss" in row]

    assert len(losses("run")) == 4 and losses("run") == losses("stated")
    assert json.loads((tmp_path / "run/mntp/adapter/lineage.json").read_text())["dtype"] == str(auto_precision)[6:]
    encoder = Encoder.from_pretrained(tmp_path / "run")
    assert encoder.model.decoder.dtype == torch.float32, "encoding on a CPU, where vectors are compared across machines"
    stated = Encoder.from_pretrained(tmp_path / "run", precision="fp32")
    np.testing.assert_array_equal(encoder.encode(sentences[:4]), stated.encode(sentences[:4]))
    assert Encoder.from_pretrained(tmp_path / "stated").model.decoder.dtype == auto_precision
    assert Encoder.identity(tmp_path / "run") == Encoder.identity(tmp_path / "run", precision="fp32")
    assert Encoder.identity(tmp_path / "run") != Encoder.identity(tmp_path / "run", precision="bf16")


def test_doctor_and_calibration_name_it(auto_precision, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("L2V_CACHE", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    name = str(auto_precision).removeprefix("torch.")
    found = calibration(CPU, measure=True, seconds=0.02)
    assert found.dtype == name and calibration_file(CPU, auto_precision).is_file()
    assert doctor.main(["--seconds", "0"]) == 0
    text = capsys.readouterr().out
    hardware = r"yes +" if load.cpu_multiplies_bf16() else r"no +slow, not in hardware; "
    assert re.search(
        rf"precision: bf16 +{hardware}auto is {name} in training \(by L2V_AUTO_PRECISION\)$", text, re.M
    ), text
