"""The forward of a base: packed batch in; hidden states, vectors, logits or a loss out. Everything here uses it."""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn

from l2v.batch import PackedBatch
from l2v.errors import RecipeError, UserError
from l2v.model.fused import FlatAdapters, FusedStack, Recompute, Unsupported
from l2v.model.head import Loss, WithHead
from l2v.model.keyed_dropout import DropoutKeys, install_keyed_dropout
from l2v.model.path import Grid, accepted, first_position, grids, path_of, position_limit, takes_positions
from l2v.model.pooling import pool, pool_weights
from l2v.model.read import PickRows, Read
from l2v_kernels import AttentionPlan
from l2v_kernels.integrations.transformers import PackedAttention


class PackedDecoder(nn.Module):
    """A decoder or encoder of transformers (plain, or with LoRA) over packed batches.

    Layers of the Llama and Gemma families run fused, all others as transformers implements them; `unfused_reason` then says why
    (None if they are fused or plain layers were requested). `path` is how a batch runs: all texts in one sequence, or, where a
    layer would carry one text into the next, a row each (see `l2v.model.proof`).
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
            RecipeError: layers is "fused" and the decoder's layers cannot be fused; or attention dropout is asked for where
                transformers computes the attention.
        """
        super().__init__()
        self.decoder, self.head = decoder, head
        self.with_head = None if head is None else WithHead(head)
        self.causal, self.backend, self.pooling = causal, backend, pooling
        self.attention_dropout = attention_dropout
        self.path = path_of(decoder, backend)
        if attention_dropout and self.path.attention != "l2v":
            remedy = (
                "set attention_dropout: 0 (lora.dropout then makes the views differ)"
                if isinstance(decoder, PeftModel)
                else "train the stage with lora, whose dropout then makes the views differ, and set attention_dropout: 0"
            )
            raise RecipeError(
                f"attention_dropout {attention_dropout} needs l2v's attention, and this base runs with transformers' "
                f"{self.path.attention} attention; {remedy}"
            )
        self.at_once = False  # every batch in one forward, also where its texts are rows
        self.limit, self.first_position = position_limit(decoder), first_position(decoder)
        self.accepted, self.takes_positions = accepted(decoder), takes_positions(decoder)
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

        All ranks then gather together, so each runs a batch in one forward.

        Returns the modules whose forward uses the parameters of their submodules directly.

        Raises:
            RecipeError: the base takes texts of one length alone, so that ranks would run unequal numbers of forwards.
        """
        if self.path.layout == "rows":
            raise RecipeError(
                "zero.stage: 3 needs one forward a batch, and this base takes only texts of one length together; use "
                "zero.stage: 2"
            )
        self.at_once = True
        if self.fused is None:
            return []
        self.fused.gathered = True
        for group in (group for spec in self.fused.specs for group in spec.groups):
            group.unbind()  # a forward before this one has kept weights that the engine will replace
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
            inner.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": self._same_keys})

    def _same_keys(self) -> tuple[Any, Any]:
        """For checkpointing: a layer is recomputed with the dropout keys of its own forward, not those of a later one."""
        kept = self.dropout_keys.seeds_T, self.dropout_keys.rows_T

        @contextlib.contextmanager
        def restored():
            now = self.dropout_keys.seeds_T, self.dropout_keys.rows_T
            self.dropout_keys.seeds_T, self.dropout_keys.rows_T = kept
            try:
                yield
            finally:
                self.dropout_keys.seeds_T, self.dropout_keys.rows_T = now

        return contextlib.nullcontext(), restored()

    def forward(
        self,
        batch: PackedBatch,
        want: Literal["hidden", "vectors", "logits", "loss"] = "vectors",
        loss: Loss[Any] | None = None,
    ) -> Any:
        if self.limit is not None and max(batch.lengths) > self.limit[0]:
            raise UserError(
                f"a text has {max(batch.lengths):,} tokens, and {self.limit[1]}; set the length to at most {self.limit[0]:,} "
                "(max_length, --length, or length of the stage)"
            )
        if self.fused is not None:
            attention = self._attention(batch)
            read = Read.of(batch, want, self.pooling)
            pooling = read.pooled if read else None
            if want == "vectors" and pooling is None:
                pooling = pool_weights(batch, self.pooling), batch.cu_seqlens
            hidden_TE = self.fused(
                batch.input_ids_T,
                batch.position_ids_T,
                attention["packed"],
                *self._keys(batch),
                pooling,
                None if read is None else read.index_R,
            )
            if want == "vectors":
                return hidden_TE  # pooled within the final norm
            picked = read is not None
        else:
            hidden_TE = self._packed(batch) if self.path.layout == "packed" else self._rows(batch)
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

    def _keys(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Set and return the dropout keys of a packed sequence: seeds and rows of its tokens."""
        lengths_S = batch.cu_seqlens.diff().long()
        self.dropout_keys.seeds_T = batch.seeds_S.repeat_interleave(lengths_S, output_size=batch.tokens)
        self.dropout_keys.rows_T = batch.position_ids_T
        return self.dropout_keys.seeds_T, self.dropout_keys.rows_T

    def _packed(self, batch: PackedBatch) -> torch.Tensor:
        """Hidden states [T, E] of transformers' layers, all texts in one sequence."""
        self._keys(batch)
        positions_T = batch.position_ids_T + self.first_position
        return self._call(batch.input_ids_T[None], position_ids=positions_T[None], **self._attention(batch))[0]

    def _rows(self, batch: PackedBatch) -> torch.Tensor:
        """Hidden states [T, E] of transformers' layers, a row a text; several forwards where lengths differ much."""
        parts = grids(batch, self.path.layout, at_once=self.at_once)
        states = [self._grid(batch, grid) for grid in parts]
        places_T = torch.cat([grid.places for grid in parts])
        return torch.cat(states).index_select(0, places_T.argsort())

    def _grid(self, batch: PackedBatch, grid: Grid) -> torch.Tensor:
        n, t = grid.tokens_nt.shape
        rows = torch.tensor(grid.rows, device=batch.seeds_S.device)
        self.dropout_keys.seeds_T = batch.seeds_S[rows].repeat_interleave(t, output_size=n * t)
        self.dropout_keys.rows_T = torch.arange(t, device=rows.device).repeat(n)
        more: dict[str, Any] = {}
        if self.path.attention == "l2v":
            plan = AttentionPlan.from_lengths(grid.lengths, device=rows.device)
            ends = torch.tensor([0, *grid.lengths]).cumsum(0, dtype=torch.int32).to(rows.device)
            more["packed"] = PackedAttention(
                cu_seqlens=ends, seeds_S=batch.seeds_S[rows], plan=plan, causal=self.causal,
                dropout_p=self.attention_dropout, slots=grid.slots,
            )  # fmt: skip
        else:
            more["attention_mask"] = grid.valid_nt.long()
        states = self._call(batch.input_ids_T[grid.tokens_nt], **more)
        return states.reshape(n * t, -1).index_select(0, grid.slots)

    def _call(self, ids_nt: torch.Tensor, **more: Any) -> torch.Tensor:
        """Hidden states of the model's own forward, [n, t, E]."""
        if "position_ids" in more and not self.takes_positions:
            raise ValueError("its forward takes no positions, so it cannot tell packed texts apart")
        more["use_cache"] = False
        if self.accepted is not None:
            if "packed" in more and "packed" not in self.accepted:
                raise ValueError("its forward does not pass the borders of texts on to its layers")
            more = {k: v for k, v in more.items() if k in self.accepted}
        return self.decoder(input_ids=ids_nt, **more)[0]

    def _attention(self, batch: PackedBatch) -> dict:
        if self.path.attention == "l2v":
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
            return {"attention_mask": None, "packed": packed} | _borders(batch)
        if self.path.attention == "flash_attention_2":
            return {"attention_mask": None} | _borders(batch)
        return {"attention_mask": block_mask(batch, causal=self.causal)}


def _borders(batch: PackedBatch) -> dict[str, Any]:
    """The segments as transformers names them; layers besides attention that take them keep texts apart as well."""
    longest = max(batch.lengths)
    return {
        "cu_seq_lens_q": batch.cu_seqlens,
        "cu_seq_lens_k": batch.cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def block_mask(batch: PackedBatch, *, causal: bool) -> torch.Tensor:
    """Block-diagonal mask, bool [1, 1, T, T], True where a token is seen; the slow path, for backends without segments."""
    lengths_S = batch.cu_seqlens.diff().long()
    segment_T = torch.arange(len(lengths_S), device=lengths_S.device)
    segment_T = segment_T.repeat_interleave(lengths_S, output_size=batch.tokens)
    mask_TT = segment_T.unsqueeze(1) == segment_T.unsqueeze(0)
    if causal:
        mask_TT = mask_TT & (batch.position_ids_T.unsqueeze(1) >= batch.position_ids_T.unsqueeze(0))
    return mask_TT[None, None]
