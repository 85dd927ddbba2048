"""Vectors of many texts in a memory-mapped file that is filled block by block and found again by its content."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from l2v.encoder import Encoder
from l2v.errors import Notice
from l2v.files import replace_text
from l2v.mining.shards import writing

BLOCK = 1024


def vectors(
    encoder: Encoder, key: str, texts: Sequence[str], instructions: Sequence[str | None], folder: Path, what: str
) -> np.ndarray:
    """Normalised vectors of texts, each after its instruction: float32 [texts, E], memory-mapped from `folder`.

    Block boundaries are fixed, so a resumed run gives bitwise the same vectors as an uninterrupted one.

    Raises:
        UserError: if the folder cannot be written.
    """
    digest = hashlib.sha256(key.encode())
    for text, instruction in zip(texts, instructions, strict=True):
        digest.update(f"{len(text)} {text}{len(instruction or '')} {instruction or ''}".encode())
    path = folder / f"{what}-{digest.hexdigest()[:16]}.npy"
    mark = path.with_suffix(".done")
    shape = (len(texts), encoder.dimension)
    before = encoder.truncated
    with writing(path), warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)  # one for every block; counted below
        folder.mkdir(parents=True, exist_ok=True)
        done = int(mark.read_text()) if mark.is_file() and path.is_file() else 0
        out = np.lib.format.open_memmap(
            path, "r+" if done else "w+", None if done else np.float32, None if done else shape
        )
        with tqdm(
            total=len(texts), initial=done, desc=f"encode {what}", unit="text", disable=done == len(texts)
        ) as bar:
            for begin in range(done, len(texts), BLOCK):
                end = min(begin + BLOCK, len(texts))
                of_block = list(instructions[begin:end])
                for instruction in sorted(set(of_block), key=lambda i: i or ""):
                    at = [begin + i for i, own in enumerate(of_block) if own == instruction]
                    out[at] = encoder.encode([texts[i] for i in at], instruction, normalize=True)
                out.flush()
                replace_text(mark, str(end))
                bar.update(end - begin)
    if cut := encoder.truncated - before:
        warnings.warn(
            f"{cut:,} of {len(texts):,} {what} are longer than {encoder.max_length} tokens and were cut",
            Notice,
            stacklevel=2,
        )
    return np.load(path, mmap_mode="r", allow_pickle=False)
