"""Pairs of question and answer in every form of file that l2v reads."""

import bz2
import gzip
import json
import lzma

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq

ROWS = [
    {"spørgsmål": "Hvornår åbner I?", "svar": "Klokken ti; på lørdage først\nklokken elleve."},
    {"spørgsmål": 'Hvad er "grød"?', "svar": "Æblegrød, rødgrød og så videre – det hele."},
    {"spørgsmål": "Må man få øl?", "svar": "Ja, på værtshuset."},
]
FORMS = (
    "a.csv", "b.tsv", "c.jsonl", "d.ndjson", "e.json", "f.parquet", "g.xlsx", "h.csv.gz", "i.jsonl.zst", "j.csv.xz",
    "k.jsonl.bz2",
)  # fmt: skip


def table(delimiter=";") -> str:
    def quoted(text):
        return '"' + text.replace('"', '""') + '"'

    lines = [list(ROWS[0]), *(list(row.values()) for row in ROWS)]
    return "".join(delimiter.join(map(quoted, line)) + "\r\n" for line in lines)


def put(folder, name):
    """ROWS in the form that the name says."""
    path = folder / name
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    plain = name.removesuffix(".gz").removesuffix(".zst").removesuffix(".xz").removesuffix(".bz2")
    if plain.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif plain.endswith(".xlsx"):
        book = openpyxl.Workbook()
        for line in (list(ROWS[0]), *(list(row.values()) for row in ROWS)):
            book.active.append(line)
        book.create_sheet("Ark2").append(["andet"])
        book.save(path)
    else:
        text = {".csv": table(), ".tsv": table("\t"), ".json": json.dumps(ROWS)}.get(plain[plain.index(".") :], lines)
        packed = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstd}
        path.write_bytes(packed.get(path.suffix, bytes)(text.encode()))
    return path


def zstd(data: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
    return out.getvalue().to_pybytes()
