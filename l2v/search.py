"""Nearest texts to a query; vectors of a corpus are kept next to the run for the next search."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from l2v.data import sample
from l2v.data.sources import open_rows
from l2v.encoder import Encoder
from l2v.recipe import Source


def read_corpus(file: str | None, column: str, notes: list[str] | None = None) -> list[str]:
    """The texts of a file (`column`: the field that holds the text), or the passages of the Danish sample.

    Empty texts are skipped. `notes` receives a sentence if the column was guessed by its name, or the sample is searched.
    """
    if file is None:
        texts = [passage.text for passage in sample.passages().values()]
        if notes is not None:
            notes.append(f"searching the {len(texts)} passages of the Danish sample; --texts FILE searches your own")
        return texts
    return list(open_rows([Source(path=file, text=column, skip_empty=True)], "documents", notes)["text"])


def nearest(run: str, query: str, texts: list[str], *, instruction: str | None, top: int) -> list[tuple[float, str]]:
    """The `top` texts nearest to a query, best first: (cosine similarity, text).

    run: what `Encoder.from_pretrained` takes. instruction: text before the query.
    """
    encoder = Encoder.from_pretrained(run)
    texts_ME = corpus_vectors(encoder, texts, Path(run))
    scores_M = texts_ME @ encoder.encode(query, instruction=instruction)
    return [(float(scores_M[at]), texts[at]) for at in np.argsort(-scores_M)[:top]]


def corpus_vectors(encoder: Encoder, texts: list[str], run: Path) -> np.ndarray:
    """Unit vectors of the texts, float32 [M, E], cached by encoder and texts."""
    from l2v.batch import mix
    from l2v.data.tokens import text_key

    model_key = text_key(
        str(encoder.lineage) + encoder.tokenizer.fingerprint() + str(next(encoder.model.parameters()).dtype)
    )
    key = mix(model_key, *(text_key(text) for text in texts))
    folder = run if run.is_dir() else None
    cache = folder / ".search" / f"{key:016x}.npy" if folder else None
    if cache and cache.is_file():
        return np.load(cache, allow_pickle=False)
    vectors_ME = encoder.encode(texts, show_progress=True)
    if cache:
        try:
            cache.parent.mkdir(exist_ok=True)
            with open(cache, "wb") as file:
                np.save(file, vectors_ME, allow_pickle=False)
        except OSError:
            cache.unlink(missing_ok=True)  # the cache only affects the speed of the next search
    return vectors_ME
