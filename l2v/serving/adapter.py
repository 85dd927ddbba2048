"""`l2v export --adapter-only`: the stages of an encoder as one unmerged PEFT adapter, proved against the merged encoder."""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from l2v.encoder import Encoder
from l2v.errors import UserError
from l2v.model.export import ENCODER_FILE, check_free, encoder_facts, whole_export
from l2v.model.load import device, dtype_of, inner_model, load_model
from l2v.model.merge import Around
from l2v.model.packed import PackedDecoder
from l2v.model.settings import quiet_transformers
from l2v.model.summed_adapter import sum_adapters
from l2v.recipe import Base
from l2v.runs.source import find
from l2v.serving.texts import SAMPLE

EXACT = 1e-5
"""fp32: the largest difference in an entry of a vector of length 1."""


@dataclass(frozen=True)
class Written:
    """rank: of the adapter. stages: how many adapters it sums. precision: of the comparison. entry: the largest difference to
    the merged encoder in an entry of a vector of length 1; cosine: the largest 1 - cosine.
    """

    rank: int
    stages: int
    precision: str
    entry: float
    cosine: float


def export_adapter(
    name: str, folder: Path, adapters: Sequence[str] = (), *, length: int | None = None, precision: str | None = None,
    trust_remote_code: bool = False,
) -> Written:  # fmt: skip
    """Write the adapters of an encoder as one, for plain PEFT and vLLM, completely or not at all.

    adapters: further ones, after the run's own. The vectors of sample texts through plain PEFT, with the adapter unmerged, are
    compared with those of the merged encoder.

    Raises:
        UserError: there are no adapters, one is no plain LoRA, the folder holds something else, or in fp32 the vectors are not
            those of the merged encoder.
    """
    check_free(folder)  # before a model is loaded
    found = find(name)
    chosen = [*found.adapters, *adapters]
    if not chosen:
        raise UserError(
            f"{name}: it has no adapter to export; give a run, a stage of it, or a base with --adapter NAME"
        )
    if (Path(name) / ENCODER_FILE).is_file() and not adapters:
        raise UserError(f"{name}: it is an export already; give the run that it was made from")
    options: dict[str, Any] = {"length": length, "precision": precision, "trust_remote_code": trust_remote_code}
    encoder = Encoder.from_pretrained(name, adapters, **options)
    expected = _sample(encoder)
    facts = encoder_facts(
        encoder.model, encoder.tokenizer, encoder.tokenizer.template, encoder.lineage, encoder.instructions,
        normalize=encoder.normalize, matryoshka=encoder.matryoshka,
    )  # fmt: skip
    facts |= {"precision": precision or found.base.precision, "base": asdict(found.base) | {"template": None}}
    texts, instructions = encoder.tokenizer, encoder.instructions
    del encoder
    gc.collect()
    if precision is not None:
        found.base.precision = precision  # type: ignore[assignment]  # Encoder has checked it
    with whole_export(folder) as partial:
        rank, model = _write(found.base, chosen, partial, facts, trust_remote_code)
        unmerged = Encoder(model, texts, name=name, lineage={}, instructions=instructions)
        written = _compare(
            expected, _sample(unmerged), rank, len(chosen), str(model.decoder.dtype).removeprefix("torch.")
        )
        if written.precision == "float32" and not written.entry <= EXACT:
            raise UserError(
                f"{name}: unmerged, its vectors are {written.entry:.1g} off those of the merged encoder; export it merged"
            )
    return written


def _sample(encoder: Encoder) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that some are cut
        return encoder.encode(SAMPLE)


def _write(
    base: Base, adapters: Sequence[str], folder: Path, facts: dict[str, Any], trust_remote_code: bool
) -> tuple[int, PackedDecoder]:
    """Write the folder, and load it again with plain PEFT: the rank, and the decoder with the unmerged adapter."""
    dtype = dtype_of(base.precision, encoding=True)
    inner = inner_model(load_model(base, head=False, dtype=dtype, trust_remote_code=trust_remote_code))
    summed = sum_adapters(adapters, inner)
    summed.save(folder, base.model)
    (folder / ENCODER_FILE).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    with quiet_transformers(), torch.no_grad():
        PeftModel.from_pretrained(Around(inner, inner.base_model_prefix), folder, autocast_adapter_dtype=False)
    model = PackedDecoder(
        inner, causal=base.attention == "causal", backend=base.backend, pooling=base.pooling, layers="plain"
    )
    return summed.rank, model.to(device())


def _compare(expected: np.ndarray, seen: np.ndarray, rank: int, stages: int, precision: str) -> Written:
    entry = float(np.abs(expected - seen).max())
    cosine = 1 - float((Encoder.similarity(expected, seen).diagonal()).min())
    return Written(rank, stages, precision, entry, cosine)
