"""The loop on one rank: what a batch of one does, and by which options held-out examples are judged."""

import json

import pytest

ALONE = {"stages.simcse.from": "base", "stages.supervised.from": "base"}


@pytest.fixture
def rows(run_here, tiny_recipe, tmp_path):
    """rows(stage, *overrides) -> the metrics of a run, a dict a row."""

    def run(stage: str, *overrides: str) -> list[dict]:
        run_here(tiny_recipe(tmp_path, **ALONE), "--stage", stage, "--fresh", *overrides)
        lines = (tmp_path / "run" / stage / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return run


@pytest.mark.parametrize("directions", ["[query_to_doc]", "[query_to_doc, query_to_query, doc_to_query, doc_to_doc]"])
def test_a_last_batch_of_one_has_no_loss(rows, directions):
    """40 sentences in batches of 13: of the fourth, with one text and so one candidate, nothing can be learnt."""
    steps = rows("simcse", "batch=13", f"directions={directions}")
    assert [row["loss"] > 0 for row in steps] == [True, True, True, False]
    assert steps[3]["loss"] == 0 and steps[3]["gradient_norm"] == 0


def test_held_out_examples_are_judged_by_the_stages_own_options(rows, tmp_path):
    def before(*overrides: str) -> float:
        first = rows("supervised", "eval_data=pairs.jsonl", "steps=1", *overrides)[0]
        assert first["step"] == 0
        return first["eval_loss"]

    plain = before()
    assert before("matryoshka=[32]") == pytest.approx(plain, rel=1e-6)
    both = before("matryoshka=[8, 32]")
    assert before("matryoshka=[8]") == pytest.approx(both - plain, rel=1e-5) and both > plain > 0
    assert before("hard_negatives=own") < plain
    assert before("directions=[query_to_doc, doc_to_doc]") > plain
    assert before("negatives=micro", "group=2") < plain
