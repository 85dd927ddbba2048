"""Finished chunks on the disk: one Arrow file a chunk, written atomically, so that a kill loses the current chunk alone."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from l2v.encoding.names import facts_file, ids_file
from l2v.encoding.rows import Chunk
from l2v.errors import UserError
from l2v.files import reason, replace_text, replacing

AS_JSON = {b"l2v": b"json"}
"""Metadata of a column whose values have no common Arrow type and stand as JSON."""
PLACES = pa.schema([("file", pa.string()), ("row", pa.int64()), ("id", pa.string())])


class Shards:
    """The folder `OUT.work`: a manifest of all that decides the vectors, and an Arrow file for each finished chunk.

    Shards of another model, other data or other options lie in another folder below it, so they are never mixed.
    """

    def __init__(self, out: Path, key: str) -> None:
        self.out, self.work = out, out.with_name(f"{out.name}.work")
        self.folder = self.work / key
        self._lock: Any = None

    def create(self, manifest: dict[str, Any]) -> None:
        """Create the folder and hold it for this process; a shard of an earlier run stays.

        Raises:
            UserError: it cannot be written, or another process holds it.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.work / "lock", "w")  # noqa: SIM115 - held until the process ends
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.out}: another l2v encode is writing it now") from None
            except OSError:
                pass  # a file system without locks
            self.error_file.unlink(missing_ok=True)
            for partial in self.folder.glob(".*.partial"):  # of a killed process
                partial.unlink(missing_ok=True)
            for made in (self.out, ids_file(self.out), facts_file(self.out)):
                for partial in self.out.parent.glob(f".{glob.escape(made.name)}.*.partial"):
                    partial.unlink(missing_ok=True)
            replace_text(self.folder / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False))

    @property
    def error_file(self) -> Path:
        """Exists once a process has failed, so that the others stop at their next chunk."""
        return self.folder / "failed"

    def path(self, number: int) -> Path:
        """The file of a chunk."""
        return self.folder / f"shard-{number:07d}.arrow"

    def write(self, chunk: Chunk, vectors_ME: np.ndarray, *, column: str, kept: bool, truncated: int) -> None:
        """Write a finished chunk. kept: with the rows' fields, else with their places. truncated: texts that were cut.

        Raises:
            UserError: it cannot be written; for example the disk is full.
        """
        fields = fields_of(chunk) if kept else pa.Table.from_pylist(chunk.places, schema=PLACES)
        width = vectors_ME.shape[1]
        flat = pa.array(np.ascontiguousarray(vectors_ME, dtype=np.float32).ravel())
        table = fields.append_column(column, pa.FixedSizeListArray.from_arrays(flat, width))
        table = table.replace_schema_metadata({"truncated": str(truncated)}).combine_chunks()
        with writing(self.path(chunk.number)), replacing(self.path(chunk.number)) as partial:
            with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)

    def read(self, number: int) -> pa.Table:
        """A finished chunk, memory-mapped.

        Raises:
            UserError: it is missing or damaged.
        """
        try:
            with pa.memory_map(str(self.path(number))) as source:
                return pa.ipc.open_file(source).read_all()
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{self.path(number)}: damaged or missing ({reason(error)}); remove the file and run the command again"
            ) from None

    def clear(self) -> None:
        """Remove the work folder; the finished file is kept."""
        shutil.rmtree(self.work, ignore_errors=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a UserError that names `path`.

    Raises:
        UserError: if the block raises an OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {reason(error)}; finished work is kept, and the same command resumes"
        ) from None


def fields_of(chunk: Chunk) -> pa.Table:
    """The kept fields of a chunk, with the types of their file, else those of their values (or JSON; see `AS_JSON`)."""
    if chunk.types is not None:
        return pa.Table.from_pylist(chunk.rows, schema=chunk.types)
    names = list(dict.fromkeys(name for row in chunk.rows for name in row))
    arrays, fields = [], []
    for name in names:
        values = [row.get(name) for row in chunk.rows]
        try:
            array = pa.array(values)
            plain = not _has_empty_struct(array.type)
        except (pa.ArrowException, OverflowError, TypeError):
            plain = False
        arrays.append(array if plain else pa.array(map(as_json, values), pa.string()))
        fields.append(pa.field(name, arrays[-1].type, metadata=None if plain else AS_JSON))
    return pa.table(arrays, schema=pa.schema(fields))


def as_json(value: Any) -> str | None:
    """A value as JSON; None stays None."""
    return None if value is None else json.dumps(value, ensure_ascii=False, default=str)


def _has_empty_struct(kind: pa.DataType) -> bool:
    """Whether a type holds a struct without fields, which Parquet has no form for."""
    if pa.types.is_struct(kind):
        return kind.num_fields == 0 or any(_has_empty_struct(kind.field(at).type) for at in range(kind.num_fields))
    return pa.types.is_list(kind) and _has_empty_struct(kind.value_type)
