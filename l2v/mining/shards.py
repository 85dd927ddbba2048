"""Work in numbered shards, each written whole or not at all: what a killed run had finished is not done again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from l2v.errors import UserError
from l2v.files import reason, sync


class Shards:
    """Rows on their way to one file, kept beside it in `FILE.work` until all of them are there.

    facts: all that decides what the rows are. Shards of other facts are left alone: other options start anew, and going
    back to the first ones finds their shards again.
    """

    def __init__(self, out: Path, facts: dict[str, Any]) -> None:
        key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.out, self.work = out, out.with_name(f"{out.name}.work")
        self.folder = self.work / key
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def has(self, number: int) -> bool:
        """Whether that shard is finished."""
        return self._path(number).is_file()

    def write(self, number: int, rows: Iterable[dict[str, Any]]) -> None:
        """Finish a shard."""
        write_lines(self._path(number), rows)

    def read(self, count: int) -> Iterator[dict[str, Any]]:
        """The rows of shards 0 to count - 1, in order."""
        for number in range(count):
            with self._path(number).open(encoding="utf-8") as lines:
                yield from map(json.loads, lines)

    def clear(self) -> None:
        """Remove the work folder; the file that it led to stands."""
        shutil.rmtree(self.work, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:06d}.jsonl"


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line, all of them or nothing."""
    half = path.with_name(f"{path.name}.half")
    with writing(path):
        with half.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        half.replace(path)
        sync(path.parent)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """The finished file, JSONL or, by its suffix, Parquet; all of it or nothing."""
    if path.suffix != ".parquet":
        write_lines(path, rows)
        return
    import datasets

    lines = path.with_name(f"{path.name}.jsonl")
    write_lines(lines, rows)
    half = path.with_name(f"{path.name}.half")
    with writing(path):
        # Memory-mapped on its way, so that its size does not matter.
        with contextlib.closing(_Temporary(path.with_name(f"{path.name}.cache"))) as cache:
            made = datasets.load_dataset("json", data_files=str(lines), split="train", cache_dir=str(cache.folder))
            made.to_parquet(str(half))
        half.replace(path)
        lines.unlink()


def check_out(out: str) -> Path:
    """The path of a file that may be written. Errors: UserError for another suffix, and where a file stands already."""
    path = Path(out).expanduser()
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"{out}: write to a .jsonl or .parquet file")
    if path.exists():
        raise UserError(f"{out}: the file exists already; remove it or choose another --out")
    return path


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors: UserError naming `path` where the file system refuses."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {reason(error)}; what was finished is kept") from None


class _Temporary:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
