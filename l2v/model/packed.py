"""The forward of a decoder: packed batch in; hidden states, vectors, logits or a loss out. Everything here uses it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn

from l2v.batch import PackedBatch
from l2v.errors import RecipeError
from l2v.model.fused import FlatAdapters, FusedStack, Recompute, Unsupported
from l2v.model.head import Loss, WithHead
from l2v.model.keyed_dropout import DropoutKeys, install_keyed_dropout
from l2v.model.pooling import pool, pool_weights
from l2v.model.read import PickRows, Read
from l2v_kernels import AttentionPlan
from l2v_kernels.integrations.transformers import PackedAttention


class PackedDecoder(nn.Module):
    """A decoder (plain, or with LoRA) over packed sequences.

    Layers of the Llama family run fused, all others as transformers implements them; `unfused_reason` then says why (None if
    they are fused or plain layers were requested).
    `forward(batch, want)` gives hidden_TE (model dtype), vectors_SE (float32) or logits_LV (model dtype, labelled
    positions only). `forward(batch, "loss", loss)` gives loss(head, hidden_LE, labels_L), without logits in memory unless
    the loss computes them. Dropout is keyed by the batch's seeds, and active in training mode only.
    """

    decoder: Any  # from transformers or PEFT; its attributes depend on its class
    head: Any

    def __init__(
        self,
        decoder: nn.Module,
        *,
        head: nn.Module | None = None,
        causal: bool = False,
        backend: str = "l2v",
        pooling: str = "mean",
        attention_dropout: float = 0.0,
        layers: Literal["auto", "fused", "plain"] = "auto",
    ) -> None:
        """layers: "fused" requires fused layers, "auto" uses them where possible.

        Raises:
            RecipeError: layers is "fused" and the decoder's layers cannot be fused.
        """
        super().__init__()
        self.decoder, self.head = decoder, head
        self.with_head = None if head is None else WithHead(head)
        self.causal, self.backend, self.pooling = causal, backend, pooling
        self.attention_dropout = attention_dropout
        self.dropout_keys: DropoutKeys = install_keyed_dropout(decoder)
        self.fused: FusedStack | None = None
        self.flat: FlatAdapters | None = None
        self.unfused_reason: str | None = None
        if layers != "plain":
            try:
                self.fused = FusedStack(decoder)
            except Unsupported as reason:
                if layers == "fused":
                    raise RecipeError(
                        f"base.layers: fused does not fit this model: {reason}; use base.layers: auto"
                    ) from None
                self.unfused_reason = str(reason)

    def as_units(self) -> list[nn.Module]:
        """Prepare for an engine that gathers parameters when a module runs (ZeRO-3).

        Returns the modules whose forward uses the parameters of their submodules directly.
        """
        if self.fused is None:
            return []
        self.fused.gathered = True
        return [spec.module for spec in self.fused.specs]

    def flatten_adapters(self) -> None:
        """Make the adapters of fused layers one trainable parameter (see `FlatAdapters`), unless an engine gathers parameters.

        After the engine has moved the model, call `flat.bind()`.
        """
        if self.fused is not None and not self.fused.gathered:
            self.flat = self.fused.flatten_adapters()

    def set_recompute(self, how: Recompute) -> None:
        """Set what the backward recomputes (see `FusedStack`); plain layers support `layer`, and else keep everything."""
        if self.fused is not None:
            self.fused.recompute = how
        elif how == "layer":
            inner: Any = self.decoder.get_base_model() if isinstance(self.decoder, PeftModel) else self.decoder
            inner.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(
        self,
        batch: PackedBatch,
        want: Literal["hidden", "vectors", "logits", "loss"] = "vectors",
        loss: Loss[Any] | None = None,
    ) -> Any:
        lengths_S = batch.cu_seqlens.diff().long()
        self.dropout_keys.seeds_T = batch.seeds_S.repeat_interleave(lengths_S, output_size=batch.tokens)
        self.dropout_keys.rows_T = batch.position_ids_T
        attention = self._attention(batch)
        if self.fused is not None:
            read = Read.of(batch, want, self.pooling)
            pooling = read.pooled if read else None
            if want == "vectors" and pooling is None:
                pooling = pool_weights(batch, self.pooling), batch.cu_seqlens
            hidden_TE = self.fused(
                batch.input_ids_T,
                batch.position_ids_T,
                attention["packed"],
                self.dropout_keys.seeds_T,
                self.dropout_keys.rows_T,
                pooling,
                None if read is None else read.index_R,
            )
            if want == "vectors":
                return hidden_TE  # pooled within the final norm
            picked = read is not None
        else:
            hidden_TE = self.decoder(
                input_ids=batch.input_ids_T.unsqueeze(0),
                position_ids=batch.position_ids_T.unsqueeze(0),
                use_cache=False,
                **attention,
            )[0].squeeze(0)
            picked = False
        if want == "hidden":
            return hidden_TE
        if want == "vectors":
            return pool(hidden_TE, batch, self.pooling)
        if self.head is None or self.with_head is None:
            raise ValueError(f"{want} needs the language-model head; build the PackedDecoder with head=")
        labelled_LE = hidden_TE if picked else PickRows.apply(hidden_TE, batch.label_index_L)
        if want == "loss":
            return self.with_head(loss, labelled_LE, batch.labels_L)
        return self.head(labelled_LE)

    def _attention(self, batch: PackedBatch) -> dict:
        if self.backend == "l2v":
            if batch.cu_seqlens.is_cuda:
                # Nothing waits for the device: the lengths come from the collator and are not checked again.
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
    """Block-diagonal mask, bool [1, 1, T, T], True where a token is seen; the slow path, for backends without segments."""
    lengths_S = batch.cu_seqlens.diff().long()
    segment_T = torch.arange(len(lengths_S), device=lengths_S.device)
    segment_T = segment_T.repeat_interleave(lengths_S, output_size=batch.tokens)
    mask_TT = segment_T.unsqueeze(1) == segment_T.unsqueeze(0)
    if causal:
        mask_TT = mask_TT & (batch.position_ids_T.unsqueeze(1) >= batch.position_ids_T.unsqueeze(0))
    return mask_TT[None, None]
