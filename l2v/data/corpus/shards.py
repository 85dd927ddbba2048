"""The kept rows as Parquet shards of a split, SPLIT-00000-of-00012.parquet; each is a pure function of the candidate rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from l2v.data.corpus.chunk import SCHEMAS
from l2v.data.corpus.duplicates import KEPT, Rows
from l2v.files import replacing

GROUP = 10_000
"""Rows in a Parquet row group."""


@dataclass(frozen=True)
class Shard:
    """Kept rows `first` up to `first + count` of a split, counted from chunk `begin`; they are in chunks `begin` up to `end`."""

    path: Path
    split: int
    first: int
    count: int
    begin: int
    end: int


def plan(kept: np.ndarray, names: Sequence[str], rows: int, out: Path) -> list[Shard]:
    """The shards of all splits; `kept` are the rows of each split in each chunk, int64 [chunks, splits]."""
    shards = []
    for split, name in enumerate(names):
        ends = np.cumsum(kept[:, split])
        total = int(ends[-1]) if len(ends) else 0
        of = -(-total // rows)
        for index in range(of):
            first, last = index * rows, min(total, (index + 1) * rows)
            begin = int(np.searchsorted(ends, first, side="right"))
            end = int(np.searchsorted(ends, last, side="left")) + 1
            before = int(ends[begin - 1]) if begin else 0
            path = out / f"{name}-{index:05d}-of-{of:05d}.parquet"
            shards.append(Shard(path, split, first - before, last - first, begin, end))
    return shards


def write(shard: Shard, kind: str, folder: Path, chunks: Sequence[Path]) -> int:
    """Write a shard's file atomically from its chunks; returns the number of its rows."""
    rows = Rows(folder, np.load(folder / "starts.npy", allow_pickle=False))
    schema = SCHEMAS[kind]
    skip, left = shard.first, shard.count
    with replacing(shard.path) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        buffer: list[pa.Table] = []
        for chunk in range(shard.begin, shard.end):
            first, count = int(rows.starts[chunk]), int(rows.starts[chunk + 1] - rows.starts[chunk])
            fate, split = (rows.read(name, np.uint8, first, count) for name in ("fate", "split"))
            chosen = np.flatnonzero((fate == KEPT) & (split == shard.split))[skip:][:left]
            skip = 0
            left -= len(chosen)
            table = pq.read_table(chunks[chunk - shard.begin], columns=schema.names, use_threads=False)
            buffer.append(table.take(pa.array(chosen)).replace_schema_metadata())
            if sum(map(len, buffer)) >= GROUP or chunk == shard.end - 1:
                writer.write_table(pa.concat_tables(buffer).combine_chunks())
                buffer = []
    return shard.count


def row_of(rows: Rows, chunks: Sequence[Path], kind: str, number: int) -> dict:
    """One candidate row by its number."""
    chunk = int(np.searchsorted(rows.starts, number, side="right")) - 1
    table = pq.read_table(chunks[chunk], columns=SCHEMAS[kind].names, use_threads=False)
    return table.slice(number - int(rows.starts[chunk]), 1).to_pylist()[0]
