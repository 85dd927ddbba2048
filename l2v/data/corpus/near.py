"""Bands of MinHash signatures, by datasketch (Broder 1997; bands: Leskovec, Rajaraman and Ullman 2014, section 3.4)."""

from __future__ import annotations

from functools import cache

import numpy as np

from l2v.data.corpus.config import Near
from l2v.data.corpus.grams import GRAM_MULTIPLIER, gram_hashes, mix
from l2v.errors import UserError

RECALL = 0.99
"""Weight of a missed pair against a needless comparison in the choice of bands; candidates are compared exactly anyway."""


def _datasketch():
    try:
        import datasketch
    except ImportError:
        raise UserError("near-duplicates need datasketch: pip install 'l2v[data]', or set near: null") from None
    return datasketch


class Signer:
    """Computes what the near-duplicate search needs: bands of a MinHash signature, and shingles to compare candidates."""

    def __init__(self, settings: Near) -> None:
        self.words = settings.words
        self.count, self.width = bands(settings.threshold, settings.permutations)
        self.minhash = _datasketch().MinHash(num_perm=settings.permutations, seed=1, hashfunc=int, scheme="affine32")

    def __call__(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Word hashes uint64 [words] -> band hashes uint64 [bands], and shingles uint32 [shingles], ascending.

        A shingle is a run of `words` words; a shorter text is one shingle.
        """
        hashes = gram_hashes(words, min(self.words, max(1, len(words))))
        shingles = np.unique((hashes >> np.uint64(32)).astype(np.uint32))
        self.minhash.clear()
        if len(shingles):
            self.minhash.update_batch(shingles.tolist())
        values = self.minhash.hashvalues[: self.count * self.width].astype(np.uint64).reshape(self.count, self.width)
        out = np.zeros(self.count, np.uint64)
        for column in values.T:
            out *= GRAM_MULTIPLIER
            out += column + np.uint64(1)
        return mix(out), shingles


def jaccard(one: np.ndarray, two: np.ndarray) -> float:
    """Jaccard similarity: shared shingles as a share of all. Both arrays are ascending, without repeats."""
    if not len(one) or not len(two):
        return float(len(one) == len(two))
    shared = len(np.intersect1d(one, two, assume_unique=True))
    return shared / (len(one) + len(two) - shared)


@cache
def bands(threshold: float, permutations: int) -> tuple[int, int]:
    """Bands and rows per band for a threshold: datasketch's optimum with missed pairs weighted by `RECALL`."""
    lsh = _datasketch().MinHashLSH(threshold=threshold, num_perm=permutations, weights=(1 - RECALL, RECALL))
    return lsh.b, lsh.r


def found_share(similarity: float, settings: Near) -> float:
    """The share of pairs of that Jaccard similarity that share at least one band: 1 - (1 - s^r)^b."""
    count, width = bands(settings.threshold, settings.permutations)
    return 1 - (1 - similarity**width) ** count
