"""The engines that `l2v verify` compares. A new one is a class with the members of `Engine`, added to `ENGINES`."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from l2v.errors import UserError
from l2v.model.export import ENCODER_FILE
from l2v.recipe import Template

Encode = Callable[[list[str], str | None], np.ndarray]
"""Texts and an instruction (None for plain texts) to vectors float32 [texts, width], of length 1 where the encoder's are."""

BATCH = 8


class Engine(Protocol):
    """What reads an export and gives vectors."""

    @property
    def name(self) -> str:
        """As the table shows it."""

    @property
    def precision(self) -> str | None:
        """Of its arithmetic: fp32, fp16, f16, bf16, int8, q8_0; None for the export's."""

    def missing(self) -> str | None:
        """Why it cannot run here, as part of a sentence; None if it can."""

    def open(self, folder: Path) -> Encode:
        """The engine with the export loaded, as its own documentation loads it."""


@dataclass(frozen=True)
class Facts:
    """What an export says of itself. strips: white space that its tokenizer removes (`export_tokenizer.STRIPS`)."""

    template: Template
    precision: str
    length: int
    pooling: str
    normalize: bool
    strips: str
    include_prompt: bool

    @classmethod
    def read(cls, folder: Path) -> Facts:
        """From the files of an export.

        Raises:
            UserError: it is none, or it was written by an older version, or as an adapter.
        """
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                f"{folder}: an unmerged adapter, which was compared with the merged encoder when it was written; verify a "
                "merged export"
            )
        if not (folder / ENCODER_FILE).is_file():
            raise UserError(f"{folder}: not an export of l2v; write one with 'l2v export'")
        try:
            facts, pooling = (
                json.loads((folder / name).read_text(encoding="utf-8"))
                for name in (ENCODER_FILE, "1_Pooling/config.json")
            )
            known = {key: facts[key] for key in ("precision", "length", "pooling", "normalize", "strips")}
            return cls(Template(**facts["template"]), include_prompt=pooling.get("include_prompt", True), **known)
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{folder}: damaged, or written by an older l2v; export again with 'l2v export'") from None

    def prompt(self, instruction: str | None) -> str:
        """What comes before a text."""
        return self.template.prefix + (self.template.instruction.format(instruction=instruction) if instruction else "")


class Transformers:
    """Plain transformers: AutoModel and AutoTokenizer, padded batches, and the pooling that the export's files state."""

    name = "transformers"
    precision = None

    def missing(self) -> str | None:
        """It is always there."""
        return None

    def open(self, folder: Path) -> Encode:
        """AutoModel in the dtype of its weights, on the CPU or GPU that l2v uses."""
        from transformers import AutoModel, AutoTokenizer

        from l2v.model.load import device

        facts, where = Facts.read(folder), device()
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = AutoModel.from_pretrained(folder, dtype="auto", trust_remote_code=False).eval().to(where)

        @torch.inference_mode()
        def encode(texts: list[str], instruction: str | None) -> np.ndarray:
            prompt, out = facts.prompt(instruction), []
            for at in range(0, len(texts), BATCH):
                batch = tokenizer(
                    [prompt + text for text in texts[at : at + BATCH]], padding=True, truncation=True, max_length=facts.length,
                    return_tensors="pt",
                ).to(where)  # fmt: skip
                hidden_SNE = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0].float()
                mask_SN = batch["attention_mask"].bool()
                if prompt and not facts.include_prompt:
                    mask_SN[:, : prompt_length(tokenizer, prompt)] = False
                vectors_SE = _pooled(hidden_SNE, mask_SN, facts.pooling)
                out.append(torch.nn.functional.normalize(vectors_SE, dim=-1) if facts.normalize else vectors_SE)
            return torch.cat(out).cpu().numpy()

        return encode


def prompt_length(tokenizer: Any, prompt: str) -> int:
    """Tokens of a prompt, without the one that the tokenizer puts behind every text."""
    ids = tokenizer(prompt)["input_ids"]
    return len(ids) - bool(ids[-1] in tokenizer.all_special_ids)


def _pooled(hidden_SNE: torch.Tensor, mask_SN: torch.Tensor, how: str) -> torch.Tensor:
    """One vector for each text, of its tokens in the mask."""
    rank_SN = mask_SN.cumsum(1) * mask_SN
    if how == "mean":
        weights_SN = mask_SN.float()
    elif how == "weighted_mean":
        weights_SN = rank_SN.float()
    else:
        wanted_S1 = rank_SN.amax(1, keepdim=True) if how == "last" else torch.ones_like(rank_SN[:, :1])
        weights_SN = ((rank_SN == wanted_S1) & mask_SN).float()
    return torch.einsum("sne,sn->se", hidden_SNE, weights_SN) / weights_SN.sum(1, keepdim=True)


class SentenceTransformers:
    """sentence-transformers: `SentenceTransformer(folder).encode`, with `prompt=` where there is an instruction."""

    name = "sentence-transformers"
    precision = None

    def missing(self) -> str | None:
        """Whether the package is installed."""
        found = importlib.util.find_spec("sentence_transformers")
        return None if found else "not installed: pip install 'l2v[export]'"

    def open(self, folder: Path) -> Encode:
        """On the CPU or GPU that l2v uses."""
        from sentence_transformers import SentenceTransformer

        from l2v.model.load import device

        facts = Facts.read(folder)
        model = SentenceTransformer(str(folder), device=str(device()))

        def encode(texts: list[str], instruction: str | None) -> np.ndarray:
            prompt = {"prompt": facts.prompt(instruction)} if instruction else {}  # else its own default
            return np.asarray(
                model.encode(texts, batch_size=BATCH, show_progress_bar=False, **prompt), dtype=np.float32
            )

        return encode


ENGINES: list[Engine] = [Transformers(), SentenceTransformers()]
