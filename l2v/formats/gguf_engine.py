"""Vectors of an export through llama.cpp."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from l2v.errors import UserError
from l2v.formats.facts import Export, need

PRECISIONS = ("f16", "q8_0")


def file_of(folder: Path, precision: str) -> Path:
    """The GGUF file of an export in one of `PRECISIONS`."""
    return folder / "gguf" / f"model-{precision}.gguf"


def encode(
    folder: str | Path, texts: Sequence[str], instruction: str | None = None, *, precision: str = "f16",
    threads: int | None = None,
) -> np.ndarray:  # fmt: skip
    """Vectors of texts, float32 [N, E], of length 1 if the export's are: the tokens of `Encoder`, direction and pooling as the
    file states them.

    Raises:
        UserError: the folder is no export, has no such file, or llama-cpp-python is not installed.
    """
    export = Export.read(folder)
    ids, _, _ = export.tokenizer.embedded(texts, instruction)
    with open_model(Path(folder), precision, longest=max(map(len, ids), default=1), threads=threads) as model:
        out = np.stack([vector(model, each) for each in ids])
    if export.found.normalize:
        out /= np.maximum(np.linalg.norm(out, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return out


def check_precisions(names: Sequence[str]) -> None:
    """Raises UserError for a name that is not in `PRECISIONS`."""
    for name in names:
        if name not in PRECISIONS:
            raise UserError(f"no GGUF precision '{name}'; choose from {', '.join(PRECISIONS)}")


@contextlib.contextmanager
def open_model(
    folder: Path, precision: str = "f16", *, longest: int = 512, threads: int | None = None, **options: Any
) -> Iterator[Any]:
    """`llama_cpp.Llama` for texts of up to `longest` tokens. Raises UserError as `encode`."""
    need("gguf", "llama_cpp")
    from llama_cpp import Llama

    file = file_of(folder, precision)
    if not file.is_file():
        raise UserError(f"{file}: not found; write it with 'l2v export MODEL {folder} --gguf {precision}'")
    room = max(32, longest)  # without a direction of time a text has to be one piece
    model = Llama(
        str(file), embedding=True, n_ctx=room, n_batch=room, n_ubatch=room, n_threads=threads, n_threads_batch=threads,
        n_gpu_layers=0, verbose=False, **options,
    )  # fmt: skip
    try:
        yield model
    finally:
        model.close()


def vector(model: Any, ids: Sequence[int]) -> np.ndarray:
    """The pooled vector [E] of one text; the states [T, E] where the model was opened without pooling."""
    import llama_cpp

    context, width = model.ctx, model.n_embd()
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    try:
        batch.n_tokens = len(ids)
        for at, token in enumerate(ids):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, at, 1
            batch.seq_id[at][0], batch.logits[at] = 0, True
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        if llama_cpp.llama_decode(context, batch):
            raise UserError(f"llama.cpp fails on a text of {len(ids)} tokens")
        if model.pooling_type() == llama_cpp.LLAMA_POOLING_TYPE_NONE:
            states = llama_cpp.llama_get_embeddings(context)
            return np.array(states[: len(ids) * width], dtype=np.float32).reshape(len(ids), width)
        return np.array(llama_cpp.llama_get_embeddings_seq(context, 0)[:width], dtype=np.float32)
    finally:
        llama_cpp.llama_batch_free(batch)
