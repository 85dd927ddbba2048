"""MinHash signatures of rows, by datasketch (Broder 1997; bands: Leskovec, Rajaraman and Ullman 2014, section 3.4)."""

from __future__ import annotations

from functools import cache

import numpy as np

from l2v.data.build.config import Near
from l2v.data.build.grams import gram_hashes, mix, word_hashes
from l2v.errors import UserError

RECALL = 0.99
"""How much a missed pair weighs against a needless comparison when bands are chosen: candidates are compared anyway."""


def _datasketch():
    try:
        import datasketch
    except ImportError:
        raise UserError("near-duplicates need datasketch: pip install 'l2v[data]', or set near: null") from None
    return datasketch


class Signer:
    """The signature of a list of words."""

    def __init__(self, settings: Near) -> None:
        self.words = settings.words
        self.minhash = _datasketch().MinHash(num_perm=settings.permutations, seed=1, hashfunc=int, scheme="affine32")

    def __call__(self, words: list[str]) -> np.ndarray:
        """MinHash of the words' n-grams (of the whole text, if it is shorter): uint32 [permutations]."""
        hashes = gram_hashes(word_hashes(words), min(self.words, max(1, len(words))))
        self.minhash.clear()
        if len(hashes):
            self.minhash.update_batch((hashes >> np.uint64(32)).astype(np.uint32).tolist())
        return self.minhash.hashvalues.astype(np.uint32)


@cache
def bands(threshold: float, permutations: int) -> tuple[int, int]:
    """Bands and rows a band that suit a threshold: datasketch's optimum with missed pairs weighing `RECALL`."""
    lsh = _datasketch().MinHashLSH(threshold=threshold, num_perm=permutations, weights=(1 - RECALL, RECALL))
    return lsh.b, lsh.r


def band_hashes(signatures: np.ndarray, settings: Near) -> np.ndarray:
    """One hash a band: uint32 [rows, permutations] -> uint64 [bands, rows]."""
    count, width = bands(settings.threshold, settings.permutations)
    step = np.uint64(0x9E3779B97F4A7C15)
    out = np.zeros((count, len(signatures)), np.uint64)
    for band in range(count):
        for i in range(width):
            out[band] = out[band] * step + signatures[:, band * width + i].astype(np.uint64) + np.uint64(1)
        out[band] = mix(out[band])
    return out


def found_share(similarity: float, settings: Near) -> float:
    """The share of pairs of that Jaccard similarity that meet in at least one band: 1 - (1 - s^r)^b."""
    count, width = bands(settings.threshold, settings.permutations)
    return 1 - (1 - similarity**width) ** count
