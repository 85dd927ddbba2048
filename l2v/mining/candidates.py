"""Search for candidates: exact search on the encoder's vectors, or FAISS, and BM25."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from l2v.errors import RecipeError, UserError, first_line

DOCUMENTS = 65536


class Exact:
    """The `depth` best documents of a query by cosine, over all of them, in blocks on the device.

    documents_ME: float32 [M, E], normalised, may be memory-mapped. kinds_M: int64 [M] or None; a query is compared only with
    documents of its kind. At most DOCUMENTS x queries scores are in memory at a time.
    """

    def __init__(self, documents_ME: np.ndarray, device: torch.device, kinds_M: np.ndarray | None = None) -> None:
        self.documents_ME, self.device, self.kinds_M = documents_ME, device, kinds_M

    def search(
        self, queries_NE: np.ndarray, depth: int, kinds_N: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Numbers [N, k] and cosines [N, k] of the best, best first; ties are ordered by number.

        k is `depth`, or the number of documents if there are fewer; -1 fills the places if a query's kind has no more.
        """
        queries = torch.from_numpy(np.array(queries_NE)).to(self.device)
        best_NK = torch.empty(len(queries), 0, device=self.device)
        at_NK = torch.empty(len(queries), 0, dtype=torch.int64, device=self.device)
        for begin in range(0, len(self.documents_ME), DOCUMENTS):
            block = torch.from_numpy(np.array(self.documents_ME[begin : begin + DOCUMENTS])).to(self.device)
            scores_NM = queries @ block.T
            if self.kinds_M is not None:
                kinds = torch.from_numpy(self.kinds_M[begin : begin + DOCUMENTS]).to(self.device)
                other = torch.from_numpy(kinds_N).to(self.device)[:, None] != kinds
                scores_NM.masked_fill_(other, -torch.inf)
            top = scores_NM.topk(min(depth, len(block)), dim=1)
            best_NK, at_NK = torch.cat([best_NK, top.values], 1), torch.cat([at_NK, top.indices + begin], 1)
            best_NK, keep = best_NK.topk(min(depth, best_NK.shape[1]), dim=1)
            at_NK = at_NK.gather(1, keep)
        return _ordered(at_NK.cpu().numpy(), best_NK.cpu().numpy())


class Faiss:
    """The same through a FAISS index of any factory string (Douze et al. 2024, arXiv 2401.08281); for the CPU."""

    def __init__(self, documents_ME: np.ndarray, factory: str) -> None:
        try:
            import faiss
        except ImportError:
            raise UserError("--faiss needs the package faiss: pip install faiss-cpu") from None
        try:
            self.index = faiss.index_factory(documents_ME.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
            documents = np.ascontiguousarray(documents_ME)
            self.index.train(documents)
            self.index.add(documents)
        except RuntimeError as error:
            raise RecipeError(f"--faiss {factory}: FAISS rejects it: {first_line(error)}") from None

    def search(self, queries_NE: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """As `Exact.search`; -1 if the index found no more."""
        scores, at = self.index.search(np.ascontiguousarray(queries_NE), min(depth, self.index.ntotal))
        return _ordered(at, np.where(at < 0, -np.inf, scores))


class Bm25:
    """BM25 (Robertson & Zaragoza 2009; Lucene's variant, k1 1.5, b 0.75) by bm25s, on Danish word stems.

    Raises:
        UserError: if bm25s or PyStemmer is not installed.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        try:
            import bm25s
            import Stemmer
        except ImportError:
            raise UserError(
                "BM25 needs the packages bm25s and PyStemmer: pip install 'l2v[mine]', or do without it: --by encoder"
            ) from None
        self._library, self._stemmer = bm25s, Stemmer.Stemmer("danish")
        self.count, self.words = len(texts), bm25s.BM25()
        self.words.index(self.tokens(texts), show_progress=False)

    def tokens(self, texts: Sequence[str]) -> list[list[str]]:
        """Stems of each text. No stop words: BM25 gives them low weights. Words of one letter (å, ø, 7) count."""
        return self._library.tokenize(
            list(texts), token_pattern=r"(?u)\b\w+\b", stopwords=[], stemmer=self._stemmer, return_ids=False,
            show_progress=False,
        )  # fmt: skip

    def search(self, queries: Sequence[str], depth: int) -> tuple[np.ndarray, np.ndarray]:
        """As `Exact.search`, with BM25's scores; -1 if no further document shares a word with the query."""
        k = min(depth, self.count)
        at, scores = self.words.retrieve(self.tokens(queries), k=k, show_progress=False)
        at = np.asarray(at).astype(np.int64)
        return _ordered(np.where(scores > 0, at, -1), np.where(scores > 0, scores, -np.inf))


def _ordered(at: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    at = np.where(np.isneginf(scores), -1, at)
    # By score, then by number: libraries order equal scores differently.
    order = np.lexsort((at, -scores), axis=1)
    return np.take_along_axis(at, order, 1), np.take_along_axis(scores, order, 1)
