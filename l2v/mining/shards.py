"""Work in numbered shards, each written atomically: a run resumes after a kill with the finished shards."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from l2v.errors import UserError
from l2v.files import reason, replacing


class Shards:
    """Finished parts of a file, kept next to it in `FILE.work` until all of them exist.

    facts: everything that determines the rows. Shards of other facts are kept: other options start from scratch, and
    returning to the first options finds their shards again.
    """

    def __init__(self, out: Path, facts: dict[str, Any]) -> None:
        key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.out, self.work = out, out.with_name(f"{out.name}.work")
        self.folder = self.work / key
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def has(self, number: int) -> bool:
        """Whether the shard is finished."""
        return self._path(number).is_file()

    def write(self, number: int, rows: Iterable[dict[str, Any]]) -> None:
        """Write a shard."""
        write_lines(self._path(number), rows)

    def read(self, count: int) -> Iterator[dict[str, Any]]:
        """The rows of shards 0 to count - 1, in order."""
        for number in range(count):
            with self._path(number).open(encoding="utf-8") as lines:
                yield from map(json.loads, lines)

    def clear(self) -> None:
        """Remove the work folder; the finished file is kept."""
        shutil.rmtree(self.work, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:06d}.jsonl"


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    with writing(path), replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write the finished file atomically, as JSONL or (by its suffix) Parquet."""
    if path.suffix != ".parquet":
        write_lines(path, rows)
        return
    import datasets

    lines = path.with_name(f"{path.name}.jsonl")
    write_lines(lines, rows)
    with writing(path):
        # Memory-mapped in between, so that its size does not matter.
        with replacing(path) as partial, contextlib.closing(_Temporary(path.with_name(f"{path.name}.cache"))) as cache:
            made = datasets.load_dataset("json", data_files=str(lines), split="train", cache_dir=str(cache.folder))
            made.to_parquet(str(partial))
        lines.unlink()


def check_out(out: str) -> Path:
    """The path of a file that may be written.

    Raises:
        UserError: if the suffix is another one, or the file exists.
    """
    path = Path(out).expanduser()
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"{out}: write to a .jsonl or .parquet file")
    if path.exists():
        raise UserError(f"{out}: the file exists; remove it or choose another --out")
    return path


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a UserError that names `path`.

    Raises:
        UserError: if the block raises an OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {reason(error)}; finished work is kept") from None


class _Temporary:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
