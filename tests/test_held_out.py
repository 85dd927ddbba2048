"""Retrieval on held-out pairs while a stage trains."""

import json

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from l2v.training.held_out import ndcg_at_10


def segments(count: int, seed: int = 0):
    """count queries, each followed by its positive and one negative: vectors [3 * count, 8], columns, keys, no groups."""
    generator = np.random.default_rng(seed)
    vectors = generator.standard_normal((3 * count, 8)).astype(np.float32)
    columns = np.tile([0, 1, 2], count)
    return vectors, columns, np.arange(3 * count), np.full(3 * count, -1)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_scikit_learns(seed):
    vectors, columns, keys, groups = segments(40, seed)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    queries, documents = np.flatnonzero(columns == 0), np.flatnonzero(columns > 0)
    truth = (documents[None] == queries[:, None] + 1).astype(float)
    assert ndcg_at_10(vectors, columns, keys, groups) == pytest.approx(
        ndcg_score(truth, unit[queries] @ unit[documents].T, k=10)
    )


def test_equal_texts_and_the_own_group_do_not_compete():
    vectors, columns, keys, groups = segments(12)
    vectors[0], vectors[1], vectors[4] = np.eye(8, dtype=np.float32)[[0, 0, 0]] + np.float32(
        0.1
    )  # 4: another's positive
    vectors[1] += np.eye(8, dtype=np.float32)[1]  # the positive is near, the other document nearer
    alone = ndcg_at_10(vectors[:6], columns[:6], keys[:6], groups[:6])
    groups[[0, 1, 2, 3, 4, 5]] = 7
    assert ndcg_at_10(vectors[:6], columns[:6], keys[:6], groups[:6]) > alone
    keys[4] = keys[1]
    assert ndcg_at_10(vectors[:6], columns[:6], keys[:6], np.full(6, -1)) >= alone


def test_another_answer_to_the_same_question_does_not_compete():
    e = np.eye(8, dtype=np.float32)
    # Queries, each before its positive: to the first query, the positives of the others are nearer than its own.
    vectors = np.stack([e[0], e[0] + e[1], e[2], e[0], e[3], e[0]])
    columns, keys, groups = np.tile([0, 1], 3), np.arange(6), np.full(6, -1)
    assert ndcg_at_10(vectors, columns, keys, groups) == pytest.approx(0.5)
    keys[2] = keys[0]  # ranks 2, 2 and 3
    assert ndcg_at_10(vectors, columns, keys, groups) == pytest.approx((1 / np.log2([3, 3, 4])).mean())
    keys[4] = keys[0]
    assert ndcg_at_10(vectors, columns, keys, groups) == 1
    columns, keys = np.append(columns, 2), np.append(keys, 99)  # a hard negative of the question competes
    vectors, groups = np.concatenate([vectors, e[:1]]), np.append(groups, -1)
    assert ndcg_at_10(vectors, columns, keys, groups) < 1


def test_training_writes_it_for_pairs(run_here, tiny_recipe, tmp_path):
    recipe = tiny_recipe(tmp_path, **{"stages.supervised.from": "base", "stages.supervised.eval_data": "pairs.jsonl"})
    run_here(recipe, "--stage", "supervised")
    rows = [json.loads(line) for line in (tmp_path / "run/supervised/metrics.jsonl").read_text().splitlines()]
    found = [row["eval_ndcg_at_10"] for row in rows if "eval_loss" in row]
    assert len(found) == 2 and all(0 < value <= 1 for value in found) and found[1] >= found[0]
