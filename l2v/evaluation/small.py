"""Retrieval on a small held-out set, quick enough to run again and again while a model trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from l2v.errors import UserError


class SmallRetrieval:
    """nDCG@10 of queries against the documents of a few pairs.

    The rows are chosen by hash-free stride over the file, so every call and every rank sees the same ones; group-mates and
    equal texts of a query's document count as relevant too.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        limit: int = 256,
        query: str = "query",
        positive: str = "positive",
        group: str = "group",
    ) -> None:
        if limit < 2:
            raise UserError(f"a retrieval set of {limit} pairs measures nothing; use at least 2")
        good = [row for row in rows if row.get(query) and row.get(positive)]
        if len(good) < 2:
            raise UserError(
                f"the retrieval set has {len(good)} pairs with '{query}' and '{positive}'; it needs at least 2"
            )
        stride = max(1, len(good) / limit)
        chosen = [good[int(at * stride)] for at in range(min(limit, len(good)))]
        self.queries = [row[query] for row in chosen]
        self.documents = list(dict.fromkeys(row[positive] for row in chosen))
        place = {text: at for at, text in enumerate(self.documents)}
        mates: dict[Any, set[int]] = {}
        for row in chosen:
            mates.setdefault(row.get(group), set()).add(place[row[positive]])
        self.relevant = [
            {place[row[positive]]} | (mates[row[group]] if row.get(group) is not None else set()) for row in chosen
        ]
        by_query: dict[str, set[int]] = {}
        for text, found in zip(self.queries, self.relevant, strict=True):
            by_query.setdefault(text, set()).update(found)
        self.queries, self.relevant = list(by_query), list(by_query.values())

    def __call__(self, embed: Callable[[list[str]], np.ndarray]) -> dict[str, float]:
        """Scores with `embed`: texts to float [texts, dimension], of any length; compared by cosine.

        Returns eval_ndcg_at_10 and eval_recall_at_10, 0 to 1.
        """
        vectors = np.asarray(embed([*self.queries, *self.documents]), dtype=np.float64)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        scores_NM = vectors[: len(self.queries)] @ vectors[len(self.queries) :].T
        order_NM = np.argsort(-scores_NM, axis=1, kind="stable")[:, :10]
        ndcg, recall = [], []
        for best, relevant in zip(order_NM, self.relevant, strict=True):
            hits = np.array([document in relevant for document in best], dtype=float)
            discounts = 1 / np.log2(np.arange(2, len(best) + 2))
            ideal = discounts[: min(len(relevant), len(best))].sum()
            ndcg.append((hits * discounts).sum() / ideal)
            recall.append(hits.sum() / min(len(relevant), 10))
        return {"eval_ndcg_at_10": float(np.mean(ndcg)), "eval_recall_at_10": float(np.mean(recall))}
