"""The command from end to end: tables by stage and ablation, several processes, failures that are counted, bad input."""

import json

import numpy as np
import pytest
import torch
import yaml

from l2v import Encoder
from l2v.commands.eval import parser
from l2v.commands.main import main
from l2v.evaluation.model import EncoderSpec, MtebEncoder
from l2v.evaluation.score import specs


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_base, tiny_recipe):
    """A run with two trained stages, as training leaves it, the adapters random."""
    from peft import LoraConfig, get_peft_model

    from l2v.model.load import inner_model, load_model
    from l2v.recipe import Base
    from l2v.recipe.load import load_recipe, to_dict

    folder = tmp_path_factory.mktemp("trained")
    path = tiny_recipe(folder, **{"base": {"model": str(tiny_base), "precision": "fp32"}})
    recipe = load_recipe(str(path))
    for at, stage in enumerate(("mntp", "supervised")):
        torch.manual_seed(at)
        inner = inner_model(load_model(Base(model=str(tiny_base)), head=False, dtype=torch.float32))
        shape = LoraConfig(r=4, lora_alpha=8, target_modules=["up_proj"], init_lora_weights=False)
        get_peft_model(inner, shape).save_pretrained(folder / "run" / stage / "adapter")
        facts = {"name": "tiny", "stage": stage, "recipe": to_dict(recipe)}
        (folder / "run" / stage / "stage.json").write_text(json.dumps(facts))
    return folder / "run"


@pytest.fixture(scope="module")
def mini(tmp_path_factory, sentences, write_jsonl):
    """A folder with one bitext and one retrieval set."""
    folder = tmp_path_factory.mktemp("sets") / "mini"
    folder.mkdir()
    write_jsonl(folder / "bitext.jsonl", [{"da": t, "en": t.replace("en", "ena")} for t in sentences[:40]])
    rows = [{"query": t.rsplit(" ", 2)[0], "positive": t} for t in sentences[:40]]
    write_jsonl(folder / "pairs.jsonl", rows)
    return folder


def report(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_a_table_by_stage_and_by_ablation(run, mini, capsys):
    assert main(["eval", str(run), "--stages", "--baselines", "tfidf", "--benchmark", f"local:{mini}"]) == 0
    found = report(run / "eval")
    names = ["TF-IDF (characters)", "untrained, causal", "untrained, bidirectional", "mntp", "supervised"]
    assert [row["name"] for row in found["rows"]] == names
    assert [len(row["scores"]) for row in found["rows"]] == [2] * 5
    bitext = [row["scores"]["mini-bitext"]["score"] for row in found["rows"]]
    assert len(set(bitext)) > 3  # rows are different encoders
    raw = found["rows"][1]["identity"]
    assert (raw["attention"], raw["merged"], raw["length"]) == ("causal", [], 48)
    assert [len(row["identity"]["merged"]) for row in found["rows"][3:]] == [1, 1]
    table = (run / "eval" / "table.md").read_text(encoding="utf-8")
    assert "|  | bitext | pairs | Mean of tasks | Mean of types |" in table and table in capsys.readouterr().out
    assert (run / "eval" / "table.png").read_bytes()[:4] == b"\x89PNG"

    assert main(["eval", str(run), "--ablations", "pooling", "--benchmark", f"local:{mini}"]) == 0
    rows = report(run / "eval")["rows"]
    assert [row["name"].split(", ")[1] for row in rows] == ["mean", "weighted_mean", "last"]
    assert [row["identity"]["pooling"] for row in rows] == ["mean", "weighted_mean", "last"]
    same = rows[0]["scores"]["mini-pairs"]  # the row `supervised` of the table before
    assert same["cached"] and same["score"] == found["rows"][-1]["scores"]["mini-pairs"]["score"]
    assert not rows[1]["scores"]["mini-pairs"]["cached"]


def test_rows_of_ablations(run):
    def rows(*arguments):
        found = specs(parser().parse_args([str(run), *arguments]))
        return {name: (spec.identity()["attention"], spec.identity()["pooling"]) for name, spec in found}

    name = f"{run.parent.name}/run"
    assert rows("--ablations") == {
        f"{name}, {attention}, {pooling}": (attention, pooling)
        for attention in ("causal", "bidirectional")
        for pooling in ("mean", "weighted_mean", "last")
    }
    staged = rows("--stages", "--ablations", "attention")
    assert staged == {
        "untrained, causal": ("causal", "mean"),
        "untrained, bidirectional": ("bidirectional", "mean"),
        "mntp, causal": ("causal", "mean"),
        "mntp, bidirectional": ("bidirectional", "mean"),
        "supervised, causal": ("causal", "mean"),
        "supervised, bidirectional": ("bidirectional", "mean"),
    }


@pytest.mark.slow
def test_several_processes_give_the_same_vectors(tiny_base, sentences):
    spec = EncoderSpec(str(tiny_base), (), {"precision": "fp32"})
    texts = [*sentences, " ", *sentences[::-1]] * 3  # more than one piece
    one = MtebEncoder(spec, "one").vectors(texts, "Find")
    model = MtebEncoder(spec, "two", processes=2, show_progress=False)
    try:
        two = model.vectors(texts, "Find")
    finally:
        model.close()
    np.testing.assert_allclose(one, two, atol=1e-6)
    assert model.empty == 3 and not two[len(sentences)].any() and two[0].any()
    expected = Encoder.from_pretrained(tiny_base, precision="fp32").encode(sentences[:5], "Find", normalize=False)
    np.testing.assert_allclose(one[:5], expected, atol=1e-5)


@pytest.mark.slow
def test_a_process_that_cannot_load_is_one_sentence(tmp_path):
    from l2v.errors import UserError
    from l2v.evaluation.pool import EncoderPool

    pool = EncoderPool(EncoderSpec(str(tmp_path)), 2)
    with pytest.raises(UserError, match=r"an encoding process failed: .*neither a model"):
        list(pool.encode(["tekst"], [[0]]))


def test_what_fails_is_said_counted_and_left_out(tiny_base, mini, tmp_path, capsys, write_jsonl):
    (tmp_path / "pairs.jsonl").write_text("nothing\n")
    tasks = [{"type": "retrieval", "file": "gone.jsonl", "name": "gone"}, {"type": "retrieval", "file": "pairs.jsonl"}]
    tasks.append({"type": "bitext", "file": str(mini / "bitext.jsonl"), "name": "good"})
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump({"name": "x", "tasks": tasks}))
    out = tmp_path / "out"
    names = ["--benchmark", f"local:{tmp_path}", "--benchmark", "DKHateClassification"]
    code = main(["eval", str(tiny_base), "no/such-model", *names, "--out", str(out), "--prompts", "off"])
    assert code == 1
    said, found = capsys.readouterr().out, report(out)
    for sentence in (
        f"x-gone: {tmp_path / 'gone.jsonl'}: no such file; skipped",
        f"x-retrieval-pairs: {tmp_path / 'pairs.jsonl'}, line 1: malformed JSON",
        "DKHateClassification: its data is not on this machine and the hub cannot be reached; skipped",
        "no/such-model",
    ):
        assert sentence in said
    assert "Traceback" not in said
    assert list(found["rows"][0]["scores"]) == ["x-good"] and found["rows"][0]["means"]["task"] is None
    table = (out / "table.md").read_text(encoding="utf-8")
    assert "Skipped (3 results):" in table and "- DKHateClassification: its data" in table


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ([], 2, "name a run"),
        (["x", "--benchmark", "Scandinavian"], 2, "no task or benchmark of mteb"),
        (["x", "--benchmark", "local:/no/where"], 1, "local:/no/where: no such file, folder or manifest"),
        (
            ["--baselines", "tfidf", "--benchmark", "local:sample", "--prompts", "dk"],
            1,
            "use en, da, mteb, off, trained",
        ),
        (
            ["x", "--ablations", "layers", "--benchmark", "local:sample"],
            2,
            "'layers' is unknown; use attention, pooling",
        ),
        (["x", "--batch-tokens", "0"], 2, "--batch-tokens is 0; use 1 or more"),
        (["x", "--stages", "--benchmark", "local:sample"], 1, "--stages needs a run; x has no stages"),
        (["--published", "--results", "/no/where"], 1, "/no/where: no published results in it"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, code, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", *arguments]) == code
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
