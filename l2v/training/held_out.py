"""Held-out loss and retrieval quality of a stage during training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from l2v.data.collate import Masking, collate
from l2v.data.sampler import Sampler
from l2v.objectives.contrastive import Groups, contrastive_loss
from l2v.objectives.mntp import mntp_loss_of_hidden
from l2v.recipe import Contrastive, Mntp, Stage, Supervised
from l2v.training.steps import loss_options

MAX_RANKED_QUERIES = 2000
"""Queries that are ranked; more cost a larger matmul and make the estimate little better."""


def evaluator(engine, stage: Stage, examples, masking: Masking | None) -> Callable[[int], dict[str, float]]:
    """Returns a function from the step to a metrics row: eval_loss, for MNTP eval_accuracy, for pairs eval_ndcg_at_10.

    It runs without dropout, with the same masks and batches at every call. Every rank evaluates all examples.
    """
    group = getattr(stage, "group", None)
    sampler = Sampler(examples, batch=stage.batch, micro_tokens=stage.micro_tokens, seed=0, group=group)

    def evaluate(step: int) -> dict[str, float]:
        loss, hits, count = 0.0, 0.0, 0
        parts: list[tuple[torch.Tensor, ...]] = []
        for unit in (unit for at in range(sampler.steps_per_epoch) for unit in sampler.plan(at).units[0]):
            micros = [collate(examples, micro, seed=0, step=0, masking=masking) for micro in unit.micros]
            if not isinstance(stage, Contrastive):
                for micro in (m.to(engine.device) for m in micros):
                    part, found = engine(micro, "loss", functools.partial(mntp_loss_of_hidden, count=1.0))
                    loss += part.item()
                    hits += found.item()
                    count += len(micro.labels_L)
                continue
            vectors_SE = torch.cat([engine(m.to(engine.device), "vectors") for m in micros])
            labels = [torch.cat([getattr(m, n) for m in micros]) for n in ("columns_S", "text_keys_S", "groups_S")]
            groups = Groups.from_columns(*labels).to(engine.device)
            loss += contrastive_loss(vectors_SE, groups, **loss_options(stage)).item() * groups.total
            count += groups.total
            if isinstance(stage, Supervised):
                parts.append((vectors_SE.float().cpu(), *labels))
        row: dict[str, Any] = {"eval_loss": loss / max(count, 1)}
        if isinstance(stage, Mntp):
            row["eval_accuracy"] = hits / max(count, 1)
        if parts:
            row["eval_ndcg_at_10"] = ndcg_at_10(*(torch.cat(part).numpy() for part in zip(*parts, strict=True)))
        return row

    return evaluate


def ndcg_at_10(vectors_SE: np.ndarray, columns_S: np.ndarray, keys_S: np.ndarray, groups_S: np.ndarray) -> float:
    """Mean nDCG@10 of the queries (column 0), each for its positive (the next segment) among all documents, by cosine.

    Documents with the same text count once. Documents of the query's own group and other answers to the same question do
    not compete with its positive. Ties count against it. With one relevant document nDCG is 1 / log2(1 + rank), and 0 beyond
    rank 10 (Jaervelin & Kekaelaeinen 2002). groups_S: -1 for none. Only the first 2,000 queries are ranked.
    """
    unit_SE = vectors_SE / np.maximum(np.linalg.norm(vectors_SE, axis=1, keepdims=True), 1e-12)
    at_N = np.flatnonzero(columns_S == 0)[:MAX_RANKED_QUERIES]
    documents = np.flatnonzero(columns_S > 0)
    at_M = documents[np.unique(keys_S[documents], return_index=True)[1]]
    own_N = (unit_SE[at_N] * unit_SE[at_N + 1]).sum(1)
    scores_NM = unit_SE[at_N] @ unit_SE[at_M].T
    same_NM = keys_S[at_N + 1][:, None] == keys_S[at_M][None]
    mates_NM = (groups_S[at_N][:, None] == groups_S[at_M][None]) & (groups_S[at_N][:, None] >= 0)
    asked = np.flatnonzero(columns_S == 0)
    for question in _repeated(keys_S[asked]):
        answers = keys_S[asked[keys_S[asked] == question] + 1]
        mates_NM[np.ix_(keys_S[at_N] == question, np.isin(keys_S[at_M], answers))] = True
    rank_N = 1 + ((scores_NM >= own_N[:, None]) & ~same_NM & ~mates_NM).sum(1)
    return float(np.where(rank_N <= 10, 1 / np.log2(1 + rank_N), 0.0).mean())


def _repeated(keys: np.ndarray) -> np.ndarray:
    """The keys that occur more than once."""
    found, counts = np.unique(keys, return_counts=True)
    return found[counts > 1]
