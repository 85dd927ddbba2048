"""Score encoders on the sample's questions, one model at a time; each text is encoded once by each."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from l2v.data.sample import Passage, Question
from l2v.encoder import Encoder
from l2v.errors import Notice
from l2v.evaluation.intervals import compare
from l2v.evaluation.retrieval import RetrievalResult, reciprocal_rank_fusion, score, tfidf_scores

KINDS = ("plain", "colloquial", "disjoint")
TFIDF = "TF-IDF (characters)"
CAUSAL, UNTRAINED = "untrained, causal", "untrained, bidirectional"


def row_of(result: RetrievalResult, questions: list[Question]) -> dict[str, Any]:
    """A row of the table: means over all questions and by kind."""
    kinds = np.array([q.kind for q in questions])
    by_kind = {f"ndcg_{kind}": float(result.ndcg[kinds == kind].mean()) for kind in KINDS if (kinds == kind).any()}
    return {"name": result.name, **result.summary(), **by_kind}


class Scores:
    """Results of one set of questions against one set of passages, in the order in which they are added.

    show: called with each row. seconds: what encoding and scoring took. passages_ME: float32 vectors of the passages by the
    model that was scored last.
    """

    def __init__(self, questions: list[Question], passages: list[Passage], show: Callable[[dict], None]) -> None:
        self.questions, self.passages, self.show = questions, passages, show
        self.texts, self.queries = [p.text for p in passages], [q.query for q in questions]
        position = {p.id: at for at, p in enumerate(passages)}
        self.relevant = [position[q.positive] for q in questions]
        self.results: dict[str, RetrievalResult] = {}
        self.seconds = 0.0
        self._lexical_NM = tfidf_scores(self.queries, self.texts)
        self._last_NM: np.ndarray | None = None
        self.passages_ME = np.zeros((0, 0), np.float32)

    def add_tfidf(self) -> None:
        """The row without a model."""
        self._add(TFIDF, self._lexical_NM)

    def add_model(self, name: str, encoder: Encoder) -> None:
        """The row of an encoder."""
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Notice)  # of texts that are cut: the table's title gives the length
            queries_NE = encoder.encode(self.queries, show_progress=True)
            self.passages_ME = encoder.encode(self.texts, show_progress=True)
        self._last_NM = queries_NE @ self.passages_ME.T
        self._add(name, self._last_NM)
        self.seconds += time.perf_counter() - began

    def add_fused(self, name: str) -> None:
        """The row of TF-IDF and the encoder that was scored last, fused by rank. Its scores are no cosines: no margin."""
        if self._last_NM is None:
            raise ValueError("no encoder was scored yet")
        self._add(name, reciprocal_rank_fusion(self._lexical_NM, self._last_NM), margin=False)

    def _add(self, name: str, scores_NM: np.ndarray, *, margin: bool = True) -> None:
        self.results[name] = score(name, scores_NM, self.relevant)
        if not margin:
            self.results[name].margin[:] = np.nan
        self.show(row_of(self.results[name], self.questions))

    def rows(self) -> list[dict[str, Any]]:
        """All rows."""
        return [row_of(result, self.questions) for result in self.results.values()]

    def compared(self, better: str, worse: str) -> dict[str, Any]:
        """The difference of two rows in nDCG@10, with its paired interval."""
        return {"better": better, "than": worse, **compare(self.results[better].ndcg, self.results[worse].ndcg)}
