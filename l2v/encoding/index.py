"""A file of `l2v encode` as a search index: exact over all its vectors, which stay on the disk, or FAISS's HNSW on request."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from l2v.encoder import Encoder
from l2v.encoding.identity import encoder_key, precision_of
from l2v.encoding.join import TENSOR, matrix, read_facts
from l2v.encoding.names import FORMATS, ids_file
from l2v.errors import UserError, first_line
from l2v.files import replacing

BLOCK = 16384  # vectors that are scored at a time
LINKS = 32  # of a vector in an HNSW graph (Malkov & Yashunin 2018, arXiv 1603.09320)


class Index:
    """Vectors of a file and their rows.

    facts: how they were computed. `len` is the number of vectors; `width` their dimensions.
    """

    def __init__(self, path: str) -> None:
        """Open a file.

        Raises:
            UserError: it does not exist, or `l2v encode` did not write it, or it is damaged.
        """
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise UserError(f"{path}: no such file")
        facts = read_facts(self.path) if self.path.suffix in FORMATS else None
        if facts is None:
            # A file of texts given by mistake is not what an index is written to.
            out = path if self.path.suffix in FORMATS else self.path.with_suffix(".parquet")
            raise UserError(f"{path}: no index; l2v encode MODEL FILE --out {out} writes one")
        self.facts, self.width = facts, int(facts["dimensions"])
        self._graph: Any = None
        self._lines: np.ndarray | None = None
        try:
            self._vectors_ME = None if self.path.suffix == ".parquet" else self._mapped()
            count = self._parquet().metadata.num_rows if self._vectors_ME is None else len(self._vectors_ME)
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise UserError(f"{path}: damaged: {first_line(error)}; remove it and encode again") from None
        if count != facts["rows"]:
            raise UserError(f"{path}: damaged: {count:,} vectors, and {facts['rows']:,} were written; encode again")

    def __len__(self) -> int:
        return int(self.facts["rows"])

    def check(self, encoder: Encoder) -> None:
        """Check that an encoder is the one whose vectors these are.

        Raises:
            UserError: it is another one, or has another precision or length.
        """
        if self.facts["encoder"] == encoder_key(encoder):
            return
        for what, own, now in (
            ("precision", self.facts["precision"], precision_of(encoder)),
            ("length", self.facts["length"], encoder.max_length),
        ):
            if own != now:
                raise UserError(
                    f"{self.path}: its vectors were computed with --{what} {own}, and '{encoder.name}' has {now} here; give "
                    f"--{what} {own}"
                )
        raise UserError(
            f"{self.path}: holds vectors of another model ('{self.facts['model']}', {self.facts['encoder']}), which cannot be "
            f"compared with those of '{encoder.name}' ({encoder_key(encoder)}); encode the texts again"
        )

    def search(self, query_E: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and cosines of the `top` nearest vectors, the nearest first; ties in the order of the file.

        query_E: float32 [width]. A vector of zeros has cosine 0.
        """
        query_E = query_E / max(float(np.linalg.norm(query_E)), np.finfo(np.float32).tiny)
        if self._graph is not None:
            scores, at = self._graph.search(query_E[None], min(top, len(self)))
            return at[0][at[0] >= 0], scores[0][at[0] >= 0]
        best_K, at_K = np.empty(0, np.float32), np.empty(0, np.int64)
        for begin, block_ME in self.blocks():
            scores_M = block_ME @ query_E
            best_K = np.concatenate([best_K, scores_M])
            at_K = np.concatenate([at_K, np.arange(begin, begin + len(scores_M))])
            keep = np.lexsort((at_K, -best_K))[:top]
            best_K, at_K = best_K[keep], at_K[keep]
        return at_K, best_K

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Unit vectors, `BLOCK` at a time, with the number of the first: float32 [rows, width]."""
        begin = 0
        for block_ME in self._raw_blocks():
            if not self.facts["normalized"]:
                lengths_M1 = np.linalg.norm(block_ME, axis=1, keepdims=True)
                block_ME = block_ME / np.maximum(lengths_M1, np.finfo(np.float32).tiny)
            yield begin, block_ME
            begin += len(block_ME)

    def row(self, at: int) -> dict[str, Any]:
        """The row of a vector: the kept fields of a Parquet file, else file, row and id."""
        if self._vectors_ME is None:
            file, before = self._parquet(), 0
            names = [name for name in file.schema_arrow.names if name != self.facts["vector_column"]]
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if at < before + rows:
                    return file.read_row_group(group, columns=names).slice(at - before, 1).to_pylist()[0]
                before += rows
            raise IndexError(at)
        with open(ids_file(self.path), "rb") as lines:
            if self._lines is None:
                self._lines = np.cumsum([0, *(len(line) for line in lines)], dtype=np.int64)
            lines.seek(int(self._lines[at]))
            return json.loads(lines.readline())

    def approximate(self) -> None:
        """Search with FAISS's HNSW graph from now on; it is built once and kept next to the file.

        Raises:
            UserError: FAISS is not installed, or the graph cannot be written.
        """
        try:
            import faiss
        except ImportError:
            raise UserError("--approximate-above needs the package faiss: pip install 'l2v[faiss]'") from None
        stat = self.path.stat()
        kept = self.path.with_name(f"{self.path.name}.{stat.st_size:x}-{stat.st_mtime_ns:x}.hnsw")
        if kept.is_file():
            try:
                self._graph = faiss.read_index(str(kept))
                return
            except RuntimeError:
                kept.unlink()
        graph = faiss.IndexHNSWFlat(self.width, LINKS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction, graph.hnsw.efSearch = 200, 128
        for _, block_ME in self.blocks():
            graph.add(np.ascontiguousarray(block_ME))
        try:
            for old in self.path.parent.glob(f"{self.path.name}.*.hnsw"):  # of an earlier file of this name
                old.unlink()
            with replacing(kept) as partial:
                faiss.write_index(graph, str(partial))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{kept}: cannot be written: {first_line(error)}") from None
        self._graph = graph

    def _mapped(self) -> np.ndarray:
        if self.path.suffix == ".npy":
            found = np.load(self.path, mmap_mode="r", allow_pickle=False)
        else:
            with open(self.path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                tensor = json.loads(file.read(size))[TENSOR]
            length = os.path.getsize(self.path) - 8 - size
            if length != tensor["data_offsets"][1]:
                raise ValueError(f"{length:,} bytes of vectors instead of {tensor['data_offsets'][1]:,}")
            found = np.memmap(self.path, "<f4", "r", offset=8 + size, shape=tuple(tensor["shape"]))
        if found.ndim != 2 or found.shape[1] != self.width or found.dtype != np.float32:
            raise ValueError(f"holds {found.dtype} {list(found.shape)}")
        return found

    def _parquet(self) -> Any:
        import pyarrow.parquet as pq

        return pq.ParquetFile(self.path, memory_map=True)

    def _raw_blocks(self) -> Iterator[np.ndarray]:
        if self._vectors_ME is not None:
            for begin in range(0, len(self), BLOCK):
                yield np.asarray(self._vectors_ME[begin : begin + BLOCK])
            return
        column = self.facts["vector_column"]
        for batch in self._parquet().iter_batches(BLOCK, columns=[column]):
            yield matrix(pa.chunked_array([batch.column(0)]))
