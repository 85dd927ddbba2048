"""From finished shards to one file: .npy, .safetensors or .parquet, a shard at a time, so that memory stays flat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from l2v.encoding.names import facts_file, ids_file
from l2v.encoding.shards import AS_JSON, Shards, as_json, writing
from l2v.files import replace_text, replacing

TENSOR = "vectors"  # its name in a .safetensors file
FACTS = "l2v"  # the key of the facts in the metadata of .safetensors and .parquet


def join(shards: Shards, count: int, column: str, facts: dict[str, Any]) -> list[str]:
    """Write the shards 0 to count - 1, in order, as one file, atomically; returns sentences for the user.

    column: that of the vectors, in the shards and in Parquet. facts: go with the file.

    Raises:
        UserError: the file cannot be written, or a shard is damaged.
    """
    out = shards.out
    text = json.dumps(facts, ensure_ascii=False)
    with writing(out):
        if out.suffix == ".parquet":
            return _parquet(shards, count, text)
        with replacing(ids_file(out)) as partial, partial.open("w", encoding="utf-8") as lines:
            for number in range(count):
                for place in shards.read(number).drop_columns([column]).to_pylist():
                    lines.write(json.dumps(place, ensure_ascii=False) + "\n")
        if out.suffix == ".npy":
            replace_text(facts_file(out), json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        shape = (facts["rows"], facts["dimensions"])
        # Last: whoever finds the vectors finds what belongs to them.
        with replacing(out) as partial, partial.open("wb") as file:
            if out.suffix == ".npy":
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            else:
                file.write(_safetensors_header(shape, text))
            for number in range(count):
                file.write(matrix(shards.read(number).column(column)).astype("<f4", copy=False).tobytes())
    return []


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    """The vectors of a column of lists of one length: float32 [rows, E]."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # of no rows
        array = array.chunk(0)
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), array.type.list_size)


def read_facts(out: Path) -> dict[str, Any] | None:
    """The facts that `join` wrote with a file; None if it did not write the file."""
    try:
        if out.suffix == ".parquet":
            import pyarrow.parquet as pq

            text = (pq.read_metadata(out).metadata or {}).get(FACTS.encode())
        elif out.suffix == ".npy":
            text = facts_file(out).read_bytes()
        else:
            with open(out, "rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            text = header["__metadata__"][FACTS]
        found = json.loads(text) if text else None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError, pa.ArrowException):
        return None
    return found if isinstance(found, dict) and "encoder" in found else None


def _safetensors_header(shape: tuple[int, int], facts: str) -> bytes:
    """The length and the JSON header of a .safetensors file with one float32 tensor; padded, so that its data is aligned."""
    tensor = {"dtype": "F32", "shape": list(shape), "data_offsets": [0, 4 * shape[0] * shape[1]]}
    header = json.dumps({"__metadata__": {FACTS: facts}, TENSOR: tensor}, ensure_ascii=False).encode()
    header += b" " * (-(len(header) + 8) % 64)
    return len(header).to_bytes(8, "little") + header


def _parquet(shards: Shards, count: int, facts: str) -> list[str]:
    import pyarrow.parquet as pq

    schema, mixed = _schema(shards, count)
    schema = schema.with_metadata({FACTS: facts})
    vectors = schema.names[-1]
    others = [name for name in schema.names if name != vectors]
    with replacing(shards.out) as partial:
        # Vectors do not compress; a dictionary would only be tried and given up.
        writer = pq.ParquetWriter(
            partial, schema, use_dictionary=others, compression=dict.fromkeys(others, "zstd") | {vectors: "none"},
        )  # fmt: skip
        with writer:
            for number in range(count):
                writer.write_table(_fitted(shards.read(number), schema))
    if not mixed:
        return []
    return [f"columns whose values have no common type are stored as JSON texts: {', '.join(mixed)}"]


def _schema(shards: Shards, count: int) -> tuple[pa.Schema, list[str]]:
    """One schema for all shards (the vectors last), and the names of the columns that become JSON."""
    found: dict[str, dict[pa.DataType, list[int]]] = {}
    as_text: dict[str, None] = {}
    fields: dict[str, pa.Field] = {}
    for number in range(count):
        for field in shards.read(number).schema:
            fields.setdefault(field.name, field)
            found.setdefault(field.name, {}).setdefault(field.type, []).append(number)
            if field.metadata == AS_JSON:
                as_text[field.name] = None
    vectors = shards.read(0).schema.names[-1]
    kinds: dict[str, pa.DataType] = {}
    for name, types in found.items():
        common = None if name in as_text else _common(shards, name, types)
        if common is None:
            as_text[name] = None
        kinds[name] = common or pa.string()
    order = [*(name for name in found if name != vectors), vectors]
    # The first file's own field keeps what else it says, such as that nulls are absent.
    out = [
        pa.field(n, kinds[n], metadata=AS_JSON) if n in as_text else _field(fields[n], found[n], kinds[n])
        for n in order
    ]
    return pa.schema(out), list(as_text)


def _field(first: pa.Field, types: dict[pa.DataType, list[int]], kind: pa.DataType) -> pa.Field:
    return first if len(types) == 1 and first.nullable else pa.field(first.name, kind)


def _common(shards: Shards, name: str, types: dict[pa.DataType, list[int]]) -> pa.DataType | None:
    """The type that every shard's column can have without losing a digit; None if there is none."""
    kinds = [kind for kind in types if not pa.types.is_null(kind)] or list(types)
    if len(kinds) == 1:
        return kinds[0]
    try:
        schemas = [pa.schema([(name, kind)]) for kind in kinds]
        common = pa.unify_schemas(schemas, promote_options="permissive").field(name).type
        for number in (number for kind in kinds if kind != common for number in types[kind]):
            shards.read(number).column(name).cast(common)  # raises where an integer is too long for a float
    except (pa.ArrowException, TypeError):
        return None
    return common


def _fitted(table: pa.Table, schema: pa.Schema) -> pa.Table:
    return pa.table([_column(table, field) for field in schema], schema=schema)


def _column(table: pa.Table, field: pa.Field) -> pa.ChunkedArray:
    if field.name not in table.schema.names:
        return pa.nulls(len(table), field.type)
    column = table.column(field.name)
    if field.metadata == AS_JSON and table.schema.field(field.name).metadata != AS_JSON:
        return pa.array(map(as_json, column.to_pylist()), pa.string())
    return column if column.type == field.type else column.cast(field.type)
