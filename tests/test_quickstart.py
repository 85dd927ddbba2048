"""The quickstart's flow on a tiny base: rows as they come, each text encoded once by each model, both bases by one command."""

import collections
import json

import numpy as np
import pytest
from support.made_run import make_run

from benchmarks.quickstart.trial import moved_to_the_cut
from l2v import Encoder
from l2v.commands import main as cli
from l2v.data import sample
from l2v.data.text import crops
from l2v.errors import UserError
from l2v.evaluation.retrieval import reciprocal_rank_fusion, score
from l2v.model.embedded import EMBEDDED, SMOLLM2
from l2v.quickstart import run
from l2v.quickstart.table import markdown
from l2v.recipe.load import load_recipe


def test_the_same_command_takes_either_base():
    assert run.choose_recipe(["seed=1"]) == ("gemma-3-270m-da", ["seed=1"])
    assert run.choose_recipe(["seed=1", f"base={SMOLLM2}", "out=x"]) == ("smollm2-135m-da", ["seed=1", "out=x"])
    with pytest.raises(UserError, match=r"no recipe for the base 'x/y'; choose base=gemma-3-270m or base=smollm2"):
        run.choose_recipe(["base=x/y"])
    for base, name in run.RECIPES.items():
        recipe = load_recipe(name)
        assert recipe.base.model == base and base in EMBEDDED
        assert len(recipe.order()) == 3 and recipe.order()[0] == "mntp"


def test_the_whole_flow(base, tiny_recipe, tmp_path, monkeypatch, capsys):
    given = {"base.model": str(base), "base.init": "pretrained", "base.config": None, "base.tokenizer": None}
    recipe = tiny_recipe(tmp_path, **given, **{"stages.supervised.length": 192, "stages.supervised.from": "simcse"})
    monkeypatch.setattr(run, "RECIPES", {"lille": str(recipe)} | run.RECIPES)
    encoded: dict[int, collections.Counter] = {}
    plain = Encoder.encode

    def counted(self, texts, *args, **options):
        encoded.setdefault(id(self.model), collections.Counter()).update([texts] if isinstance(texts, str) else texts)
        kept.append(self)  # no id is used twice
        return plain(self, texts, *args, **options)

    def train(name, overrides, fresh):
        print("TRAINING")
        make_run(recipe, ("mntp", "simcse", "supervised"))

    kept: list[Encoder] = []
    monkeypatch.setattr(Encoder, "encode", counted)
    monkeypatch.setattr(run, "train_stages", train)
    assert cli.main(["quickstart", "base=lille", "--share", "1", "--questions", "12"]) == 0
    out = capsys.readouterr().out
    order = ["TF-IDF (characters)", "untrained, causal", "untrained, bidirectional", "TRAINING", "\nmntp", "\nsimcse",
             "\nsupervised", "\nTF-IDF + supervised", run.SEARCHES[0], run.SEARCHES[2], "Search it yourself"]  # fmt: skip
    places = [out.index(mark) for mark in order]
    assert places == sorted(places)
    passages = {q.positive for q in run._held_out(12)[0]}
    assert len(encoded) == 5
    for counter in encoded.values():
        assert set(counter.values()) == {1} and len(counter) in (
            12 + len(passages),
            12 + len(passages) + len(run.SEARCHES),
        )
    report = json.loads((tmp_path / "run" / "quickstart.json").read_text(encoding="utf-8"))
    names = [row["name"] for row in report["rows"]]
    assert names == [mark.strip() for mark in order[:3] + order[4:8]]
    assert report["rows"][-1]["margin"] is None and report["rows"][-2]["margin"] is not None
    assert {(p["better"], p["than"]) for p in report["paired"]} == {
        ("mntp", "untrained, bidirectional"), ("simcse", "mntp"), ("supervised", "simcse"),
        ("supervised", "TF-IDF (characters)"), ("TF-IDF + supervised", "TF-IDF (characters)"),
        ("TF-IDF + supervised", "supervised"),
    }  # fmt: skip
    assert report["seconds"].keys() == {"training", "scoring", "all"} and report["base"] == str(base)
    assert markdown(report) == (tmp_path / "run" / "quickstart.md").read_text(encoding="utf-8")
    assert markdown(report).splitlines()[8].endswith("|  |") and "nan" not in markdown(report)
    assert (tmp_path / "run" / "encoder-supervised" / "modules.json").is_file()


def test_a_difference_is_above_only_where_its_interval_excludes_zero():
    report = {"rows": [], "mntp_held_out": None, "seconds": {"all": 1, "training": 1},
              "machine": {"cores": 2, "processor": "p", "accelerator": "none", "precision": "float32"}}  # fmt: skip
    pairs = [{"better": "b", "than": "a", "difference": d, "low": d - 0.1, "high": d + 0.1} for d in (0.2, 0.05, -0.3)]
    lines = markdown(report | {"paired": pairs}).splitlines()
    assert [line.split(":")[0] for line in lines[2:5]] == ["b above a", "b level with a", "b below a"]


def test_fusion_by_hand():
    """Ranks 1 2 3 and, with a tie, 2.5 2.5 1."""
    fused = reciprocal_rank_fusion(np.array([[0.9, 0.5, 0.1]]), np.array([[0.0, 0.0, 7.0]]))
    np.testing.assert_allclose(fused, [[1 / 61 + 1 / 62.5, 1 / 62 + 1 / 62.5, 1 / 63 + 1 / 61]], rtol=1e-12)
    alone = np.array([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0]])
    once, fused_once = score("x", alone, [0, 1]), score("x", reciprocal_rank_fusion(alone), [0, 1])
    np.testing.assert_array_equal(once.ndcg, fused_once.ndcg)  # one ranking keeps its order
    few = reciprocal_rank_fusion(alone, np.zeros((2, 3)), constant=1)
    np.testing.assert_array_equal(np.argsort(few), np.argsort(alone))  # a ranking that knows nothing changes none


def test_crops_are_a_sentence_and_the_rest():
    text = "Den første sætning har seks ord. Kort. Den anden sætning har også nogle ord! Og så en sidste lang en til."
    pairs = crops(text)
    assert [query for query, _ in pairs] == [
        "Den første sætning har seks ord.", "Den anden sætning har også nogle ord!", "Og så en sidste lang en til.",
    ]  # fmt: skip
    for query, rest in pairs:
        assert query not in rest and "Kort." in rest
        assert sorted((query + " " + rest).split()) == sorted(text.split())
    assert crops("Kun en eneste sætning står her.") == [] == crops("")
    rows = sample.rows("sample:da/train/crops", "pairs")
    texts = {p.text for p in sample.passages().values() if p.split == "train"}
    assert len(rows) > 1000 and all(not row["negatives"] for row in rows)
    assert not {row["query"] for row in rows} & {q.query for q in sample.questions("train")}
    assert all(any(row["query"] in text for text in texts) for row in rows[::100])
    with pytest.raises(UserError, match="crops are pairs"):
        sample.rows("sample:da/train/crops", "documents")


def test_trials_never_see_the_held_out_part():
    cut = sample.splits()
    assert cut["fit"] | cut["dev"] == cut["train"] and not cut["fit"] & cut["dev"] and not cut["train"] & cut["heldout"]
    assert 100 < len(sample.questions("dev")) < len(sample.questions("fit"))
    asked = {q.query for q in sample.questions("dev")}
    for recipe in run.RECIPES.values():
        moved = moved_to_the_cut(load_recipe(recipe))
        assert len(moved) >= 4 and not any("train" in text or "heldout" in text for text in moved)
        loaded = load_recipe(recipe, moved)
        for stage in loaded.stages.values():
            kinds = {"mntp": "documents", "simcse": "sentences", "supervised": "pairs"}
            rows = [row for source in stage.data for row in sample.rows(source.path, kinds[stage.objective])]
            texts = {row.get("query") or row["text"] for row in rows}
            assert texts and not texts & asked
    foreign = load_recipe("llama3-8b-da")
    with pytest.raises(ValueError, match="is not of the sample"):
        moved_to_the_cut(foreign)
