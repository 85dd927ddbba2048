"""Vectors of an export through ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from l2v.errors import UserError
from l2v.formats.facts import Export, need

FILES = {"fp32": "model.onnx", "fp16": "model_fp16.onnx", "int8": "model_int8.onnx"}
"""The files of the precisions in the folder `onnx` of an export, named as sentence-transformers and transformers.js look for
them."""
WRITING = ("onnx", "onnxscript", "onnxruntime")
"""Packages that write the files."""
BATCH_TOKENS = 4096


def encode(
    folder: str | Path,
    texts: Sequence[str],
    instruction: str | None = None,
    *,
    precision: str = "fp32",
    threads: int = 0,
) -> np.ndarray:
    """Vectors of texts, float32 [N, E]: the tokens of `Encoder`, everything behind them in the graph.

    int8 rounds activations by the largest of a batch, so there a vector depends a little on the texts it is encoded with.

    Raises:
        UserError: the folder is no export, has no such file, or onnxruntime is not installed.
    """
    session, export = open_session(Path(folder), precision, threads), Export.read(folder)
    ids, starts, _ = export.tokenizer.embedded(texts, instruction)
    width = session.get_outputs()[1].shape[-1]
    out = np.zeros((len(texts), width), dtype=np.float32)
    order = sorted(range(len(ids)), key=lambda i: (starts[i], len(ids[i])))
    for rows in _batches(order, ids, starts):
        feed = padded([ids[i] for i in rows]) | {"pool_start": np.array([starts[rows[0]]], dtype=np.int64)}
        out[rows] = session.run(["sentence_embedding"], feed)[0]
    return out


def open_session(folder: Path, precision: str = "fp32", threads: int = 0) -> Any:
    """The session of one of `FILES`. threads: 0 for all cores. Raises UserError as `encode`."""
    need("onnx", "onnxruntime")
    import onnxruntime

    file = folder / "onnx" / FILES[precision]
    if not file.is_file():
        raise UserError(f"{file}: not found; write it with 'l2v export MODEL {folder} --onnx {precision}'")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def check_precisions(names: Sequence[str]) -> None:
    """Raises UserError for a name that is not in `FILES`."""
    for name in names:
        if name not in FILES:
            raise UserError(f"no ONNX precision '{name}'; choose from {', '.join(FILES)}")


def padded(ids: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """input_ids and attention_mask, int64 [B, T], padded on the right."""
    longest = max(map(len, ids))
    input_ids, mask = (np.zeros((len(ids), longest), dtype=np.int64) for _ in range(2))
    for row, each in enumerate(ids):
        input_ids[row, : len(each)], mask[row, : len(each)] = each, 1
    return {"input_ids": input_ids, "attention_mask": mask}


def _batches(order: list[int], ids: list[list[int]], starts: list[int]) -> list[list[int]]:
    """Texts with one `pool_start`, of similar lengths, of `BATCH_TOKENS` with padding; a longer text alone."""
    out: list[list[int]] = []
    for i in order:
        last = out[-1] if out else None
        if last is None or starts[last[0]] != starts[i] or (len(last) + 1) * len(ids[i]) > BATCH_TOKENS:
            out.append([i])
        else:
            last.append(i)
    return out
