import importlib.util
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.fp8 import kernels as benchmark
from benchmarks.fp8 import parity
from benchmarks.fp8.errors import COLUMNS, matmul_errors
from benchmarks.harness import Ceilings

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e12, 1e10)


def test_smoke_run_is_labelled_and_complete(tmp_path, capsys):
    assert benchmark.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    assert "SMOKE TEST on a CPU" in capsys.readouterr().out
    data = json.loads((tmp_path / "fp8.json").read_text())
    text = (tmp_path / "fp8.md").read_text()
    assert data["facts"]["smoke"] and data["facts"]["emulated"]
    assert text.startswith("SMOKE TEST on a CPU") and "Matmuls are EMULATED: their times are not FP8's." in text
    assert len(data["results"]) == 2 * (2 * 4 + 2 * 3)
    for x in data["results"]:
        assert (x["median"] is None) == (x["provider"] == "compiled") == bool(x["skipped"])
        assert x["flops"] > 0 or x["direction"] == "quantise"
    errors = {x["provider"]: x["error"] for x in data["results"] if x["direction"] == "gradient"}
    assert errors["bf16"] < 1e-2 < errors["l2v"] == pytest.approx(errors["eager quantise"])


@pytest.mark.parametrize("direction", ["forward", "gradient"])
def test_what_is_not_fp8_is_not_timed(direction, monkeypatch):
    """Neither what is wrong nor what is too exact to have been rounded to 8 bits."""
    made = benchmark.matmuls

    def changed(w):
        found = made(w)
        right, exact = found["l2v"](), found["exact"]()
        return {"l2v": lambda: lambda x: right(x) * 1.2, "eager quantise": lambda: exact, "exact": lambda: exact}

    monkeypatch.setattr(benchmark, "matmuls", changed)
    w = benchmark.Workload("tiny", direction, 8, 32, 48, CPU)
    assert all("wrong results" in x.skipped and x.median is None for x in benchmark.run(w, CEILINGS, seconds=0.001))


def test_the_distance_of_two_curves():
    found = parity.difference([2.0, 1.1, 0.9, 1.2], [2.0, 1.0, 1.0, 1.0])
    assert found == pytest.approx({"mean": 0.1, "largest": 0.2})
    assert parity.spread([1.0, 2.0, 3.0]) == "2.0000 ± 0.5774" and parity.spread([2.0]) == "2.0000"


def test_held_out_texts_are_seen_by_no_stage():
    texts = parity.held_out_texts(40)
    from l2v.data import sample

    seen = {row["text"] for kind in ("documents", "sentences") for row in sample.rows("sample:da/train", kind)}
    assert len(texts) == len(set(texts)) == 40 and not seen & set(texts)


def fake(monkeypatch, apart):
    """Trainings of which fp8 is `apart` from same, in losses and in the angle of vectors, and a seed by a tenth of it."""

    def distance(name):
        return apart * name.startswith("fp8") + 0.1 * apart * name.endswith("1042")

    def train(recipe, stage, overrides):
        out = parity.Path(next(x for x in overrides if x.startswith("out=")).removeprefix("out="))
        (folder := out / stage).mkdir(parents=True)
        by = 1 + distance(out.name)
        rows = [{"step": i, "eval_loss": (4 - i) * by} for i in (0, 2)]
        rows += [{"step": i, "loss": (4 - i) * by} for i in range(3)]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert f"base.base_precision={out.name.split(',')[0]}" in overrides and os.environ.get("L2V_FP8") == "emulate"
        assert (
            f"stages.mntp.seed={1042 if '1042' in out.name else 42}" in overrides and "stages.mntp.lr=1e-4" in overrides
        )

    class Encoder:
        def __init__(self, turn):
            self.turn, self.model = turn, SimpleNamespace(fused=None, decoder=self)

        @classmethod
        def from_pretrained(cls, folder):
            return cls(distance(folder.parent.name))

        def encode(self, texts):
            return np.tile([np.cos(self.turn), np.sin(self.turn)], (len(texts), 1))

    def to_fp8(_, encoder):
        encoder.turn += 0.05

    for name, stand_in in (("train", train), ("Encoder", Encoder), ("to_fp8", to_fp8)):
        monkeypatch.setattr(parity, name, stand_in)
    monkeypatch.setattr(parity, "matmul_errors", lambda *_: {"q_proj": dict.fromkeys(COLUMNS, 0.03)})


def test_what_parity_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("L2V_FP8", "")
    fake(monkeypatch, apart=0.2)
    arguments = ["--out", str(tmp_path), "--texts", "4", "--seeds", "2", "stages.mntp.lr=1e-4"]
    assert parity.main(arguments) == 0
    assert os.environ["L2V_FP8"] == ""
    data, text = json.loads((tmp_path / "fp8_parity.json").read_text()), (tmp_path / "fp8_parity.md").read_text()
    assert (
        data["emulated"] and "EMULATED: FP8's roundings in fp32 on" in text and text in capsys.readouterr().out + "\n"
    )
    assert list(data["losses"]) == ["same", "fp8", "same, seed 1042", "fp8, seed 1042"]
    assert data["curves"]["fp8, seed 42"] == pytest.approx({"mean": 0.2, "largest": 0.2})
    assert data["curves"]["fp8, seed 1042"]["mean"] == pytest.approx(1.22 / 1.02 - 1)
    assert data["curves"]["same, seed 1042"]["mean"] == pytest.approx(0.02)
    angles = {"fp8, seed 42": 0.2, "fp8, seed 1042": 0.2, "same, seed 1042": 0.02}
    angles |= {"fp8, on the FP8 base": 0.25, "same, on the FP8 base": 0.05}
    assert {k: c["least"] for k, c in data["cosines"].items()} == pytest.approx(
        {k: np.cos(a) for k, a in angles.items()}
    )
    assert "| 42 | 4.0000 | 4.8000 | 2.0000 | 2.4000 | +0.4000 |" in text and "standard error: 0.4000 ± 0.0000." in text
    assert (tmp_path / "fp8_parity.png").stat().st_size > 1000
    assert parity.main(["--out", str(tmp_path / "one"), "--texts", "4", "--seeds", "1", "stages.mntp.lr=1e-4"]) == 0
    assert "standard error: 0.4000." in (tmp_path / "one" / "fp8_parity.md").read_text()


def test_training_that_fails_is_reported(monkeypatch):
    monkeypatch.setattr(parity.subprocess, "run", lambda command: SimpleNamespace(returncode=3))
    with pytest.raises(SystemExit, match=r"training did not finish: smollm2-135m-da steps=1"):
        parity.train("smollm2-135m-da", "mntp", ["steps=1"])


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
def test_errors_of_matmuls_on_a_small_decoder():
    from l2v.model.load import inner_model, load_model
    from l2v.model.packed import PackedDecoder
    from l2v.recipe import Base

    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 50,
    }
    one = Base(model="tiny", init="random", config={"model_type": "llama", "num_key_value_heads": 2} | shape)
    model = PackedDecoder(inner_model(load_model(one, head=False, dtype=torch.float32)))
    tokenizer = SimpleNamespace(
        embedded=lambda texts, _: ([[3, 7, 11, 2 + len(t)] for t in texts], [0] * len(texts), 0)
    )
    found = matmul_errors(SimpleNamespace(model=model, tokenizer=tokenizer), ["en", "to", "tre"])
    assert set(found) == {f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")}
    for errors in found.values():
        assert set(errors) == set(COLUMNS) and 0.02 < errors["weights"] < 0.03
        assert 0.02 < errors["product"] < 0.06 and errors["gradient"] < 0.75 * errors["gradient_e5m2"]
