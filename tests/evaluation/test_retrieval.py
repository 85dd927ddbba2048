import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from l2v.evaluation.intervals import bootstrap_interval
from l2v.evaluation.retrieval import score, tfidf_scores


def test_scores_equal_an_independent_ndcg():
    generator = np.random.default_rng(0)
    scores, relevant = generator.normal(size=(40, 60)), generator.integers(0, 60, 40)
    result = score("x", scores, relevant)
    truth = np.zeros_like(scores)
    truth[np.arange(40), relevant] = 1
    assert result.ndcg.mean() == pytest.approx(ndcg_score(truth, scores, k=10))
    assert result.recall.mean() == pytest.approx(np.mean(scores.argmax(1) == relevant))
    others = np.ma.masked_array(scores, truth.astype(bool)).mean(1)
    assert result.margin == pytest.approx(scores[np.arange(40), relevant] - np.asarray(others))


def test_ties_count_against_the_query():
    assert score("x", np.zeros((1, 20)), [3]).ndcg[0] == 0.0


def test_rank_ten_counts_and_rank_eleven_does_not():
    scores = -np.arange(20.0)[None].repeat(2, 0)
    assert score("x", scores, [9, 10]).ndcg.tolist() == pytest.approx([1 / np.log2(11), 0.0])


def test_bootstrap_covers_the_mean_and_narrows():
    generator = np.random.default_rng(1)
    few, many = generator.normal(0.3, 1, 50), generator.normal(0.3, 1, 5000)
    for values in (few, many):
        low, high = bootstrap_interval(values)
        assert low < values.mean() < high
        assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(len(values)), rel=0.1)


def test_tfidf_finds_the_shared_word():
    scores = tfidf_scores(["hvor er cyklen"], ["Bilen er rød.", "Min cykel er blå.", "Solen skinner."])
    assert scores[0].argmax() == 1
