"""The one way through a decoder: a packed batch in, hidden states, vectors, logits or a loss of them out."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from l2v.batch import PackedBatch
from l2v.model.head import Loss, WithHead
from l2v.model.noise import NoiseState, address_dropout
from l2v.model.pooling import pool
from l2v_kernels import AttentionPlan
from l2v_kernels.integrations.transformers import PackedAttention


class PackedDecoder(nn.Module):
    """A decoder (plain, or with LoRA) over packed sequences.

    `forward(batch, want)` gives hidden_TE (model dtype), vectors_SE (float32) or logits_LV (model dtype, labelled
    positions only); `forward(batch, "loss", loss)` gives loss(head, hidden_LE, labels_L), without logits in memory if the
    loss does not make them. Noise is taken from the batch's seeds, in training mode only.
    """

    def __init__(
        self,
        decoder: nn.Module,
        *,
        head: nn.Module | None = None,
        causal: bool = False,
        backend: str = "l2v",
        pooling: str = "mean",
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.decoder, self.head = decoder, head
        self.with_head = None if head is None else WithHead(head)
        self.causal, self.backend, self.pooling = causal, backend, pooling
        self.attention_dropout = attention_dropout
        self.noise: NoiseState = address_dropout(decoder)

    def forward(
        self,
        batch: PackedBatch,
        want: Literal["hidden", "vectors", "logits", "loss"] = "vectors",
        loss: Loss[Any] | None = None,
    ) -> Any:
        lengths_S = batch.cu_seqlens.diff().long()
        self.noise.seeds_T = batch.seeds_S.repeat_interleave(lengths_S, output_size=batch.tokens)
        self.noise.rows_T = batch.position_ids_T
        hidden_TE = self.decoder(
            input_ids=batch.input_ids_T.unsqueeze(0),
            position_ids=batch.position_ids_T.unsqueeze(0),
            use_cache=False,
            **self._attention(batch),
        )[0].squeeze(0)
        if want == "hidden":
            return hidden_TE
        if want == "vectors":
            return pool(hidden_TE, batch, self.pooling)
        if self.head is None:
            raise ValueError(f"{want} needs the language-model head; build the PackedDecoder with head=")
        labelled_LE = hidden_TE[batch.label_index_L]
        if want == "loss":
            return self.with_head(loss, labelled_LE, batch.labels_L)
        return self.head(labelled_LE)

    def _attention(self, batch: PackedBatch) -> dict:
        if self.backend == "l2v":
            if batch.cu_seqlens.is_cuda:
                # Nothing waits for the device: the collator made the lengths, so they need no look.
                plan = AttentionPlan.on_device(batch.cu_seqlens, batch.tokens)
            else:
                plan = AttentionPlan.from_lengths(batch.lengths)
            packed = PackedAttention(
                cu_seqlens=batch.cu_seqlens,
                seeds_S=batch.seeds_S,
                plan=plan,
                causal=self.causal,
                dropout_p=self.attention_dropout,
            )
            return {"attention_mask": None, "packed": packed}
        if self.backend == "flash_attention_2":
            longest = max(batch.lengths)
            return {
                "attention_mask": None,
                "cu_seq_lens_q": batch.cu_seqlens,
                "cu_seq_lens_k": batch.cu_seqlens,
                "max_length_q": longest,
                "max_length_k": longest,
            }
        return {"attention_mask": block_mask(batch, causal=self.causal)}


def block_mask(batch: PackedBatch, *, causal: bool) -> torch.Tensor:
    """Block-diagonal mask bool [1, 1, T, T] for backends that know no segments (True is seen): the slow path."""
    lengths_S = batch.cu_seqlens.diff().long()
    segment_T = torch.arange(len(lengths_S), device=lengths_S.device)
    segment_T = segment_T.repeat_interleave(lengths_S, output_size=batch.tokens)
    mask_TT = segment_T.unsqueeze(1) == segment_T.unsqueeze(0)
    if causal:
        mask_TT = mask_TT & (batch.position_ids_T.unsqueeze(1) >= batch.position_ids_T.unsqueeze(0))
    return mask_TT[None, None]
