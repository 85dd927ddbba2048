"""Hashes of word n-grams: the same in every process and on every machine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import xxhash

GRAM_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it modulo 2**64 loses nothing


@lru_cache(maxsize=1 << 16)
def _word(word: str) -> int:
    return xxhash.xxh3_64_intdigest(word.encode())


def text_hash(text: str) -> int:
    """A 64-bit hash of a text; with a billion different texts, the chance of one colliding pair is about 2.7%."""
    return xxhash.xxh3_64_intdigest(text.encode())


def word_hashes(words: Sequence[str]) -> np.ndarray:
    """Hashes of words: uint64 [words]."""
    return np.fromiter(map(_word, words), np.uint64, len(words))


def gram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """Hashes of all runs of `n` words: uint64 [words - n + 1], none for a shorter text."""
    count = len(hashes) - n + 1
    if count < 1:
        return np.empty(0, np.uint64)
    out = hashes[:count].copy()
    for i in range(1, n):
        out *= GRAM_MULTIPLIER
        out += hashes[i : i + count]
    return mix(out)


def mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of MurmurHash3: every bit of a sum reaches every bit of the hash. uint64 -> uint64."""
    values ^= values >> np.uint64(33)
    values *= np.uint64(0xFF51AFD7ED558CCD)
    values ^= values >> np.uint64(33)
    values *= np.uint64(0xC4CEB9FE1A85EC53)
    values ^= values >> np.uint64(33)
    return values
