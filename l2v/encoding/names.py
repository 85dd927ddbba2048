"""The files that `l2v encode` writes, by name. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

from l2v.errors import UserError

FORMATS = (".npy", ".safetensors", ".parquet")


def check_out(out: str) -> Path:
    """The path of a file that `l2v encode` can write.

    Raises:
        UserError: the ending is another one, or it is a folder.
    """
    path = Path(out).expanduser()
    if path.suffix not in FORMATS:
        raise UserError(f"{out}: write to a file that ends in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    if path.is_dir():
        raise UserError(f"{out}: is a folder; give the name of a file")
    return path


def ids_file(out: Path) -> Path:
    """Next to .npy and .safetensors: file, row and id of each vector, a JSON object a line."""
    return out.with_suffix(".ids.jsonl")


def facts_file(out: Path) -> Path:
    """Next to .npy, which holds numbers alone: how the vectors were computed."""
    return out.with_name(f"{out.name}.json")
