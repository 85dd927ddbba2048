"""In-batch negatives for SentenceTransformerTrainer without the score matrix.

loss = FusedMultipleNegativesRankingLoss(model)
SentenceTransformerTrainer(model=model, train_dataset=dataset, loss=loss).train()
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from torch import nn
from torch.distributed.nn.functional import all_gather

from l2v_kernels import info_nce
from l2v_kernels.info_nce.quantize import Quantize


class FusedMultipleNegativesRankingLoss(nn.Module):
    """sentence-transformers' MultipleNegativesRankingLoss, computed by `l2v_kernels.info_nce`.

    Takes the same columns (anchor, positive[, negative_1, ...]) and computes the same loss and gradients, in memory linear
    in the batch. Similarity is always the cosine: for a dot product or for the hardness weights of the original, use the
    original. A query's own texts are known by their place in the batch, so equal texts in one batch count as negatives;
    `BatchSamplers.NO_DUPLICATES` keeps them apart.

    Args:
        model: the SentenceTransformer that is trained.
        scale: as in the original, see `l2v_kernels.info_nce`.
        directions: likewise.
        partition_mode: likewise (there `partition`).
        gather_across_devices: candidates of all ranks, each with a batch of the same size; gradients of remote candidates
            are sent back to their ranks.
        false_negative_margin: candidates whose cosine exceeds the positive's by more than this are not negatives.
        own_hard_negatives: hard negatives are compared with their own query only.
        matryoshka_dims: prefixes of the embeddings whose weighted losses are added up, in one pass. MatryoshkaLoss around
            the original computes the same; around this class it works too, with a pass a prefix.
        matryoshka_weights: the weight of each of these losses, default 1.
        quantize: compare int8 or binary embeddings, with a straight-through gradient.

    Raises:
        ValueError: settings contradict each other; in the first step also for dims beyond the embedding.

    Source: van den Oord et al. 2018 (InfoNCE, arXiv 1807.03748).
    """

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 20.0,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        gather_across_devices: bool = False,
        false_negative_margin: float | None = None,
        own_hard_negatives: bool = False,
        matryoshka_dims: Sequence[int] | None = None,
        matryoshka_weights: Sequence[float] | None = None,
        quantize: Quantize | None = None,
    ) -> None:
        super().__init__()
        if matryoshka_weights is not None and len(matryoshka_weights) != len(matryoshka_dims or ()):
            raise ValueError(f"{len(matryoshka_weights)} matryoshka_weights for {len(matryoshka_dims or ())} dims")
        self.model = model
        self.scale = scale
        self.directions = tuple(directions)
        self.partition_mode = partition_mode
        self.gather_across_devices = gather_across_devices
        self.false_negative_margin = false_negative_margin
        self.own_hard_negatives = own_hard_negatives
        self.quantize = quantize
        self.matryoshka_dims, self.matryoshka_weights = None, None
        if matryoshka_dims is not None:
            # The op takes them ascending; people write them from the largest down.
            pairs = sorted(zip(matryoshka_dims, matryoshka_weights or [1.0] * len(matryoshka_dims), strict=True))
            self.matryoshka_dims, self.matryoshka_weights = ([x[i] for x in pairs] for i in (0, 1))
        # The op checks its settings; two rows of ones make it do so now and not in the first step.
        probe = torch.ones(2, int(max(self.matryoshka_dims or (1,))))
        info_nce(probe, probe, torch.arange(2), **self._settings())

    def _settings(self) -> dict[str, Any]:
        """The settings, which do not depend on the batch, as the op's arguments."""
        return {
            "scale": self.scale,
            "directions": self.directions,
            "partition": self.partition_mode,
            "false_negative_margin": self.false_negative_margin,
            "prefixes": self.matryoshka_dims,
            "prefix_weights": self.matryoshka_weights,
            "quantize": self.quantize,
        }

    def forward(self, sentence_features: Iterable[dict[str, torch.Tensor]], labels: torch.Tensor) -> torch.Tensor:
        """Called by the trainer. The labels are not used: the positive is the second column."""
        return self.compute_loss_from_embeddings(_embed_columns(self.model, list(sentence_features)), labels)

    def compute_loss_from_embeddings(
        self, embeddings: Sequence[torch.Tensor], labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The mean loss of this rank's queries, fp32 without dimensions.

        Args:
            embeddings: one [B, E] a column: queries, positives, hard negatives.
            labels: not used.

        Raises:
            ValueError: there is only one column.
        """
        if len(embeddings) < 2:
            raise ValueError(f"the loss needs at least two columns, anchor and positive, and got {len(embeddings)}")
        queries_BE, docs_BCE = embeddings[0], torch.stack(list(embeddings[1:]), 1)
        B, C, device = len(queries_BE), docs_BCE.shape[1], queries_BE.device
        offset, everyone = 0, None
        if self.gather_across_devices and dist.is_initialized() and dist.get_world_size() > 1:
            offset = dist.get_rank() * B
            docs_BCE = torch.cat(all_gather(docs_BCE))
            if {"query_to_query", "doc_to_query"} & set(self.directions):
                everyone = torch.cat(all_gather(queries_BE.contiguous()))
        everyones = len(docs_BCE)
        if everyones * C < 2:
            # The last batch of an epoch may hold one pair: without negatives its probability is 1 and there is no gradient.
            return (queries_BE.sum() + docs_BCE.sum()) * 0.0
        # Texts lie query by query: candidate i * C is the positive of query i, its hard negatives follow.
        candidates = torch.arange(everyones * C, device=device)
        belonging = {}
        if self.own_hard_negatives or "doc_to_doc" in self.directions:
            belonging["owners_M"] = candidates // C
        if self.own_hard_negatives:
            belonging["restricted_M"] = candidates % C > 0
        return info_nce(
            queries_BE,
            docs_BCE.flatten(0, 1),
            (torch.arange(B, device=device) + offset) * C,
            all_queries_QE=everyone,
            query_offset=offset,
            **belonging,
            **self._settings(),
        )

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, for the model card."""
        names = ["scale", "directions", "partition_mode", "gather_across_devices", "false_negative_margin"]
        names += ["own_hard_negatives", "matryoshka_dims", "matryoshka_weights", "quantize"]
        return {name: getattr(self, name) for name in names}

    @property
    def temperature(self) -> float:
        """One over the scale."""
        return 1.0 / self.scale

    @property
    def citation(self) -> str:
        """BibTeX of the papers behind these settings, for the model card."""
        papers = [_INFO_NCE]
        if len(set(self.directions)) == 4:
            papers.append(_GTE)
        if self.matryoshka_dims is not None:
            papers.append(_MATRYOSHKA)
        return "\n".join(papers)


def _embed_columns(model: nn.Module, columns: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """One [B, E] a column. Newer versions of sentence-transformers embed the documents in one forward pass."""
    try:
        from sentence_transformers.base.losses.merged_forward import embed_columns
    except ImportError:
        return [model(features)["sentence_embedding"] for features in columns]
    return embed_columns(model, columns)


_INFO_NCE = """
@misc{oord2018cpc,
    title = {Representation Learning with Contrastive Predictive Coding},
    author = {van den Oord, Aaron and Li, Yazhe and Vinyals, Oriol},
    year = {2018},
    eprint = {1807.03748},
    archivePrefix = {arXiv},
}"""

_GTE = """
@misc{li2023gte,
    title = {Towards General Text Embeddings with Multi-stage Contrastive Learning},
    author = {Li, Zehan and Zhang, Xin and Zhang, Yanzhao and Long, Dingkun and Xie, Pengjun and Zhang, Meishan},
    year = {2023},
    eprint = {2308.03281},
    archivePrefix = {arXiv},
}"""

_MATRYOSHKA = """
@misc{kusupati2022matryoshka,
    title = {Matryoshka Representation Learning},
    author = {Kusupati, Aditya and Bhatt, Gantavya and Rege, Aniket and Wallingford, Matthew and Sinha, Aditya and
        Ramanujan, Vivek and Howard-Snyder, William and Chen, Kaifeng and Kakade, Sham and Jain, Prateek and Farhadi, Ali},
    year = {2022},
    eprint = {2205.13147},
    archivePrefix = {arXiv},
}"""
