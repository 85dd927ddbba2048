"""A run folder that version 0.1.0 wrote before its code moved: it resumes, evaluates and exports.

tests/golden/old_run holds the recipe, its data and tokenizer, the trained stage mntp, the stage supervised as it was after
step 2 of 4, and the adapter that the same version trained from there.
"""

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.processes import ROOT

from l2v import Encoder
from l2v.commands import main as cli
from l2v.runs.facts import read_run
from l2v.runs.folder import trained_stages


@pytest.fixture
def old_run(tmp_path):
    shutil.copytree(ROOT / "tests" / "golden" / "old_run", tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def test_an_old_run_resumes_evaluates_and_exports(old_run, run_here, tmp_path, sentences):
    output = run_here("tiny.yaml")
    assert "mntp: already trained" in output and "supervised: continues after step 2" in output

    started = load_file(old_run / "supervised/checkpoints/step-000002/state.safetensors")
    expected = load_file(tmp_path / "expected.safetensors")
    trained = load_file(old_run / "supervised/adapter/adapter_model.safetensors")
    assert trained.keys() == expected.keys()
    # Of another processor the last bits differ; of one that resumed from other weights or moments, everything does.
    change = sum(float(np.square(expected[k] - started[f"weight.{k}"]).sum()) for k in expected) ** 0.5
    difference = sum(float(np.square(expected[k] - trained[k]).sum()) for k in expected) ** 0.5
    assert change > 0 and difference <= 1e-3 * change

    run = read_run(old_run)
    assert (
        [stage.name for stage in run.stages if stage.trained] == ["mntp", "supervised"] == list(trained_stages(old_run))
    )
    assert [row["step"] for row in run.stages[1].metrics] == [1, 2, 3, 4]

    encoder = Encoder.from_pretrained("run")
    assert cli.main(["export", "run", "export"]) == 0
    assert np.allclose(
        Encoder.from_pretrained("export").encode(sentences[:4]), encoder.encode(sentences[:4]), atol=1e-6
    )


def test_an_old_run_is_evaluated(old_run, run_here, tmp_path, capfd):
    run_here("tiny.yaml")
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "sts.jsonl").write_text(
        "".join(f'{{"a": "Hun finder {n}.", "b": "Hun finder {n * m}.", "score": {m % 5}}}\n' for n, m in
                ((n, m) for n in range(3, 9) for m in range(1, 5)))
    )  # fmt: skip
    assert cli.main(["eval", "run", "--stages", "--benchmark", f"local:{folder}"]) == 0
    assert (old_run / "eval" / "results.json").is_file()
    assert "supervised" in capfd.readouterr().out
