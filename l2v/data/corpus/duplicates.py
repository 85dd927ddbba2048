"""Duplicates among all rows, in constant memory: flat files, sorted a slice at a time.

Row numbers follow the order of the data. Of rows with equal words the first is kept. Rows that share a band of their MinHash
signatures are compared by their shingles, and a row with a similarity of `threshold` to an earlier, kept row is dropped.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from l2v.data.corpus.chunk import read_hashes
from l2v.data.corpus.config import Build, Near
from l2v.data.corpus.near import bands, jaccard
from l2v.files import replace_text

KEPT, EXACT, NEAR = 0, 1, 2
SLICE = 1 << 20
"""Rows read or sorted at a time."""
ROUNDS = 32
"""Number of rows of a bucket that the others in it are compared with."""
FATES = {EXACT: "duplicate", NEAR: "near-duplicate"}


@dataclass(frozen=True)
class Rows:
    """All candidate rows, by number: their flat files and where the rows of each chunk begin."""

    folder: Path
    starts: np.ndarray
    """int64 [chunks + 1]."""

    @property
    def count(self) -> int:
        return int(self.starts[-1])

    def read(self, name: str, dtype: type, first: int, count: int) -> np.ndarray:
        """A slice of a column."""
        size = np.dtype(dtype).itemsize
        return np.fromfile(self.folder / name, dtype, count, offset=first * size)

    def slices(self) -> Iterator[tuple[int, int]]:
        """(first, count) of slices that cover all rows."""
        for first in range(0, self.count, SLICE):
            yield first, min(SLICE, self.count - first)


def gather(chunks: Sequence[Path], config: Build, folder: Path, advance: Callable[[int], None]) -> Rows:
    """Write the hashes of all chunks as flat files, into a folder that is renamed when it is complete.

    advance: called with the number of chunks that were added.
    """
    count = bands(config.near.threshold, config.near.permutations)[0] if config.near else 0
    if not folder.is_dir():
        temporary = folder.with_suffix(".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        names = ["exact", "split", "shingles", "offsets", *(f"band-{i:03d}" for i in range(count))]
        starts, offset = [0], 0
        with contextlib.ExitStack() as stack:
            files = {name: stack.enter_context(open(temporary / name, "wb")) for name in names}
            np.zeros(1, np.int64).tofile(files["offsets"])
            for chunk in chunks:
                hashes = read_hashes(chunk, count)
                hashes.exact.tofile(files["exact"])
                hashes.split.tofile(files["split"])
                for i in range(count):
                    hashes.bands[:, i].tofile(files[f"band-{i:03d}"])
                ends = offset + np.cumsum([len(s) for s in hashes.shingles], dtype=np.int64)
                ends.tofile(files["offsets"])
                offset = int(ends[-1]) if len(ends) else offset
                files["shingles"].write(b"".join(hashes.shingles))
                starts.append(starts[-1] + len(hashes.exact))
                advance(1)
        np.save(temporary / "starts.npy", np.array(starts, np.int64))
        os.replace(temporary, folder)
    return Rows(folder, np.load(folder / "starts.npy", allow_pickle=False))


def find(rows: Rows, config: Build, advance: Callable[[int], None]) -> tuple[np.ndarray, list[list[int]]]:
    """The fate of every row (KEPT, EXACT, NEAR; a uint8 file in memory-mapped form) and examples [row, the earlier one].

    advance: called after each pass. A finished result is kept next to the rows; an interrupted one starts from scratch, since it
    takes seconds per million rows.
    """
    path, done = rows.folder / "fate", rows.folder / "examples.json"
    if not done.is_file():
        np.zeros(rows.count, np.uint8).tofile(path)
        fate = _map(path, rows.count)
        examples: list[list[int]] = []
        if config.exact:
            _exact(rows, fate, examples)
        advance(1)
        if config.near:
            for band in range(bands(config.near.threshold, config.near.permutations)[0]):
                _near(rows, fate, f"band-{band:03d}", config.near, examples)
                advance(1)
        if isinstance(fate, np.memmap):
            fate.flush()
        replace_text(done, json.dumps(examples))
    return _map(path, rows.count), json.loads(done.read_text(encoding="utf-8"))


def _map(path: Path, count: int) -> np.ndarray:
    return np.memmap(path, np.uint8, "r+", shape=(count,)) if count else np.zeros(0, np.uint8)


def _alike(rows: Rows, name: str, fate: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Kept rows that share a hash with another kept row: (run numbers, row numbers), both int64, by run and then by row."""
    parts = -(-rows.count // SLICE)
    for part in range(parts):
        hashes, numbers = [], []
        for first, count in rows.slices():
            values = rows.read(name, np.uint64, first, count)
            chosen = fate[first : first + count] == KEPT
            if parts > 1:
                chosen &= values % np.uint64(parts) == np.uint64(part)
            hashes.append(values[chosen])
            numbers.append(np.flatnonzero(chosen) + first)
        values, number = np.concatenate(hashes), np.concatenate(numbers)
        order = np.argsort(values, kind="stable")  # stable: within a run the order of the data
        values, number = values[order], number[order]
        same = np.zeros(len(values) + 1, bool)
        same[1:-1] = values[1:] == values[:-1]
        member = same[:-1] | same[1:]
        run = np.cumsum(~same[:-1])[member]
        yield run, number[member]


def _first(run: np.ndarray) -> np.ndarray:
    """For sorted run numbers, the index of the first member of each member's run."""
    begins = np.flatnonzero(np.r_[True, run[1:] != run[:-1]])
    return np.repeat(begins, np.diff(np.r_[begins, len(run)]))


def _exact(rows: Rows, fate: np.ndarray, examples: list[list[int]]) -> None:
    for run, number in _alike(rows, "exact", fate):
        if len(run):
            leader = number[_first(run)]
            later = number != leader
            _drop(fate, EXACT, number[later], leader[later], examples)


def _near(rows: Rows, fate: np.ndarray, name: str, near: Near, examples: list[list[int]]) -> None:
    for run, number in _alike(rows, name, fate):
        for _ in range(ROUNDS):
            if len(run) < 2:
                break
            leader = number[_first(run)]
            later = number != leader
            run, number, leader = run[later], number[later], leader[later]
            if not len(run):
                break
            alike = _similar(rows, number, leader, near.threshold)
            _drop(fate, NEAR, number[alike], leader[alike], examples)
            run, number = run[~alike], number[~alike]


def _similar(rows: Rows, one: np.ndarray, two: np.ndarray, threshold: float) -> np.ndarray:
    """Whether the rows of each pair share `threshold` of their shingles: bool [pairs]."""
    out = np.zeros(len(one), bool)
    with open(rows.folder / "shingles", "rb") as shingles, open(rows.folder / "offsets", "rb") as offsets:

        def of(row: int) -> np.ndarray:
            begin, end = np.frombuffer(os.pread(offsets.fileno(), 16, 8 * row), np.int64).tolist()
            return np.frombuffer(os.pread(shingles.fileno(), end - begin, begin), np.uint32)

        last, known = -1, np.empty(0, np.uint32)
        for i, (row, leader) in enumerate(zip(one.tolist(), two.tolist(), strict=True)):
            if leader != last:
                last, known = leader, of(leader)
            own = of(row)
            small, large = sorted((len(own), len(known)))
            out[i] = small >= threshold * large and jaccard(own, known) >= threshold
    return out


def _drop(fate: np.ndarray, why: int, gone: np.ndarray, stays: np.ndarray, examples: list[list[int]]) -> None:
    fate[gone] = why
    if len(examples) < 10_000:
        examples += np.stack([gone, stays], axis=1)[:200].tolist()


def kept_by_chunk(rows: Rows, fate: np.ndarray, splits: int) -> np.ndarray:
    """Number of kept rows of each split in each chunk: int64 [chunks, splits]."""
    out = np.zeros((len(rows.starts) - 1, splits), np.int64)
    for chunk, (first, end) in enumerate(zip(rows.starts[:-1], rows.starts[1:], strict=True)):
        split = rows.read("split", np.uint8, int(first), int(end - first))
        out[chunk] = np.bincount(split[fate[first:end] == KEPT], minlength=splits)
    return out


def fates(rows: Rows, fate: np.ndarray, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Fates and split numbers of a chunk's rows: uint8 [rows] each."""
    first, end = int(rows.starts[chunk]), int(rows.starts[chunk + 1])
    return np.asarray(fate[first:end]), rows.read("split", np.uint8, first, end - first)


def describe(near: Near | None) -> dict[str, Any] | None:
    """The settings of the near-duplicate search, for the report."""
    if near is None:
        return None
    count, width = bands(near.threshold, near.permutations)
    return {"threshold": near.threshold, "words": near.words, "permutations": near.permutations, "bands": count,
            "rows_per_band": width}  # fmt: skip
