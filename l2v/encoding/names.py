"""The files that `l2v encode` writes, by name. Imports nothing heavy."""

from __future__ import annotations

import fnmatch
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


def check_apart(out: Path, source: str) -> None:
    """Check that a folder or glob of texts does not take in what is written, which would be read as data by the next run.

    Raises:
        UserError: it does.
    """
    pattern = Path(source).expanduser().absolute()
    # The work folder holds a file of JSON too, one folder further down.
    below = out.with_name(f"{out.name}.work") / "key" / "manifest.json"
    written = [path.absolute() for path in (out, ids_file(out), facts_file(out), below)]
    if pattern.is_dir():
        taken = written[0].parent == pattern or written[0].parent.resolve() == pattern.resolve()
    else:
        taken = any(fnmatch.fnmatchcase(str(path), str(pattern)) for path in written)
    if taken:
        raise UserError(
            f"{out}: lies among the texts of {source}, and would be read as one of them; write it elsewhere"
        )


def ids_file(out: Path) -> Path:
    """Next to .npy and .safetensors: file, row and id of each vector, a JSON object a line."""
    return out.with_name(f"{out.name}.ids.jsonl")


def facts_file(out: Path) -> Path:
    """Next to .npy, which holds numbers alone: how the vectors were computed."""
    return out.with_name(f"{out.name}.json")
