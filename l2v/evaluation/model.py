"""An l2v encoder with mteb's model interface: packed, by token budget, on every GPU, loaded only when a task needs it."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from tqdm import tqdm

from l2v.encoder import Encoder, nonempty
from l2v.evaluation.pool import EncoderPool, by_length
from l2v.evaluation.prompts import TRAINED, Prompts
from l2v.recipe.instructions import Instructions
from l2v.runs.source import find


@dataclass(frozen=True)
class EncoderSpec:
    """How to load an encoder: the arguments of `Encoder.from_pretrained`, to be sent to another process."""

    source: str
    adapters: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> Encoder:
        """The encoder, on the current device."""
        return Encoder.from_pretrained(self.source, self.adapters, **self.options)

    def instructions(self) -> Instructions:
        """Those that it was trained with, without loading it."""
        return find(self.source).instructions

    def identity(self) -> dict[str, Any]:
        """Everything that determines its vectors, without loading it."""
        return Encoder.identity(self.source, self.adapters, **self.options)


class MtebEncoder(AbsEncoder):
    """mteb's EncoderProtocol around an encoder.

    Vectors are not normalised unless asked (as for the published LLM2Vec rows; it matters to a linear classifier but not
    to cosines). An empty text, or None, gets a vector of zeros; `empty` counts them. With `processes` above 1, one
    process per GPU encodes pieces of texts of similar length.
    """

    batch = 1024  # texts that mteb's loader hands over at a time; forwards are packed to a token budget

    def __init__(
        self,
        spec: EncoderSpec,
        name: str,
        *,
        prompts: Prompts | None = None,
        normalize: bool = False,
        batch_tokens: int | None = None,
        processes: int = 1,
        show_progress: bool = True,
    ) -> None:
        self.spec, self.name, self.prompts = spec, name, prompts or Prompts()
        self.normalize, self.batch_tokens, self.processes, self.show = normalize, batch_tokens, processes, show_progress
        self.identity = spec.identity() | {"normalize": normalize}
        self.empty = 0
        self.trained = spec.instructions() if self.prompts.choice == TRAINED else None
        words = {"prompts": self.prompts.choice, "table": dict(self.prompts.table)}
        words |= {"trained": asdict(self.trained)} if self.trained else {}
        self.mteb_model_meta = model_meta(f"l2v/{Path(self.identity['base']).name}", self.identity | words)
        self._encoder: Encoder | None = None
        self._pool: EncoderPool | None = None

    def encode(
        self, inputs: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, prompt_type: Any = None, **_: Any
    ) -> np.ndarray:
        """Vectors of the texts in a loader of batches: float32 [texts, dimension], in order."""
        texts = [text for batch in inputs for text in batch["text"]]
        instruction = self.prompts.instruction(task_metadata, prompt_type.value if prompt_type else None, self.trained)
        return self.vectors(texts, instruction)

    def vectors(self, texts: Sequence[str | None], instruction: str | None = None) -> np.ndarray:
        """float32 [texts, dimension]; zeros for an empty text or None, also where all are."""
        full = nonempty(texts, "zeros")
        self.empty += len(texts) - len(full)
        options = {"instruction": instruction, "normalize": self.normalize, "batch_tokens": self.batch_tokens}
        chosen = [text for at in full if (text := texts[at])]
        out: np.ndarray | None = None
        # None: only on a terminal. sys.__stderr__: mteb's own bars are kept off sys.stderr.
        with tqdm(
            total=len(full), desc=self.name, unit="text", leave=False, file=sys.__stderr__,
            disable=None if self.show else True,
        ) as bar:  # fmt: skip
            for piece, vectors in self._encoded(chosen, by_length(chosen), options):
                if out is None:
                    out = np.zeros((len(texts), vectors.shape[1]), dtype=np.float32)
                out[[full[at] for at in piece]] = vectors
                bar.update(len(piece))
        assert out is not None  # by_length gives at least one piece, also of no text, which has the width
        return out

    def _encoded(
        self, texts: list[str], pieces: list[list[int]], options: dict[str, Any]
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        if self.processes > 1:
            self._pool = self._pool or EncoderPool(self.spec, self.processes)
            try:
                yield from self._pool.encode(texts, pieces, **options)
            except BaseException:  # results left in its queues would be returned by the next call
                self._pool.close()
                self._pool = None
                raise
            return
        self._encoder = self._encoder or self.spec.load()
        for piece in pieces:
            yield piece, self._encoder.encode([texts[at] for at in piece], **options)

    def close(self) -> None:
        """Free memory and end processes."""
        if self._pool:
            self._pool.close()
        self._encoder = self._pool = None


def model_meta(name: str, identity: Mapping[str, Any], **facts: Any) -> ModelMeta:
    """mteb's description of a model, its revision a hash of what determines its scores; results are cached under it."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]
    unknown = dict.fromkeys(
        ("loader", "release_date", "languages", "n_parameters", "memory_usage_mb", "max_tokens", "embed_dim", "license")
    )
    unknown |= dict.fromkeys(("open_weights", "public_training_code", "public_training_data", "training_datasets"))
    fixed = {"framework": ["PyTorch"], "similarity_fn_name": ScoringFunction.COSINE, "use_instructions": True}
    return ModelMeta(**(unknown | fixed | facts), name=name, revision=digest)
