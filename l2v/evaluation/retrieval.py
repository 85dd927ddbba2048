"""Retrieval scores with their uncertainty: nDCG@10, recall@1, margin, bootstrap intervals, a TF-IDF row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from l2v.evaluation.intervals import bootstrap_interval


@dataclass
class RetrievalResult:
    """Scores of every query: ndcg, recall and margin are float64 [queries]."""

    name: str
    ndcg: np.ndarray
    recall: np.ndarray
    margin: np.ndarray

    def summary(self, seed: int = 0) -> dict[str, float]:
        """Means, and the bootstrap interval of nDCG@10."""
        low, high = bootstrap_interval(self.ndcg, seed=seed)
        return {
            "ndcg_at_10": float(self.ndcg.mean()),
            "ndcg_low": low,
            "ndcg_high": high,
            "recall_at_1": float(self.recall.mean()),
            "margin": float(self.margin.mean()),
        }


def score(name: str, scores_NM: np.ndarray, relevant_N: Sequence[int] | np.ndarray) -> RetrievalResult:
    """Score N queries against M passages, one of which answers each query.

    nDCG@10 with one relevant passage is 1 / log2(1 + rank), 0 beyond rank 10 (Jaervelin & Kekaelaeinen 2002); ties count
    against the query. margin: score of the answer minus the mean score of all other passages.
    """
    relevant_N = np.asarray(relevant_N)
    rows = np.arange(len(relevant_N))
    own_N = scores_NM[rows, relevant_N]
    rank_N = (scores_NM >= own_N[:, None]).sum(axis=1)
    ndcg_N = np.where(rank_N <= 10, 1 / np.log2(1 + rank_N), 0.0)
    others_N = (scores_NM.sum(axis=1) - own_N) / max(scores_NM.shape[1] - 1, 1)
    return RetrievalResult(name, ndcg_N.astype(float), (rank_N == 1).astype(float), (own_N - others_N).astype(float))


def reciprocal_rank_fusion(*scores_NM: np.ndarray, constant: float = 60.0) -> np.ndarray:
    """Fused scores of several rankings, float64 [N, M]: the sum of 1 / (constant + rank) (Cormack, Clarke & Buettcher 2009).

    scores_NM: higher is better, [N, M] each. Passages with equal scores share the mean of their ranks.
    """
    from scipy.stats import rankdata

    return sum(1 / (constant + rankdata(-np.asarray(scores), method="average", axis=1)) for scores in scores_NM)


def tfidf_vectorizer() -> Any:
    """TF-IDF over character 3- to 5-grams within words: the baseline without a model in every table of scores."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True)


def tfidf_scores(queries: Sequence[str], passages: Sequence[str]) -> np.ndarray:
    """Cosine of TF-IDF vectors fitted on the passages: float [queries, passages]."""
    vectors = tfidf_vectorizer()
    passages_MV = vectors.fit_transform(passages)
    return (vectors.transform(queries) @ passages_MV.T).toarray()
