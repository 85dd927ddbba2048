"""The files of a path: a file, a glob or a folder; and what kind of file each is, by its ending."""

from __future__ import annotations

import difflib
import glob
from pathlib import Path
from typing import Literal

from l2v.data.decoding import plain_name
from l2v.data.reading import listed
from l2v.errors import UserError

FileKind = Literal["table", "lines", "json", "parquet", "workbook", "text"]
KINDS: dict[str, FileKind] = {
    ".csv": "table", ".tsv": "table", ".tab": "table", ".jsonl": "lines", ".ndjson": "lines", ".json": "json",
    ".parquet": "parquet", ".xlsx": "workbook", ".xlsm": "workbook", ".txt": "text",
}  # fmt: skip
READABLE = ".csv, .tsv, .jsonl, .json, .parquet, .xlsx or .txt (also as .gz, .bz2, .xz or .zst)"
HINTS = {
    ".xls": "save it as .xlsx", ".ods": "save it as .xlsx", ".doc": "save it as .txt", ".docx": "save it as .txt",
    ".pdf": "save its text as .txt", ".html": "save its text as .txt", ".md": "give it the ending .txt",
    ".zip": "unpack it", ".arrow": "save it as .parquet", ".feather": "save it as .parquet",
}  # fmt: skip
LOCKS = "~$"
"""How names of the files begin that spreadsheet programs leave next to an open workbook."""
# Files about data, which data sets of the Hub and of `l2v data build` hold next to it.
ABOUT = ("report.json", "dataset_info.json", "dataset_infos.json", "state.json", "readme.txt", "license.txt")


def kind_of(path: str | Path) -> FileKind:
    """The kind of a file.

    Raises:
        UserError: the ending is not known; the message says what to do.
    """
    name = plain_name(path)
    suffix = Path(name).suffix
    if suffix in KINDS:
        return KINDS[suffix]
    hint = HINTS.get(suffix)
    raise UserError(f"{path}: unknown file type '{suffix}'; " + (hint or f"use {READABLE}"))


def is_readable(path: str | Path) -> bool:
    """Whether the ending of a file is known."""
    return Path(plain_name(path)).suffix in KINDS


def find_files(path: str, folder: str | None = None) -> list[Path]:
    """The files of a path, sorted: a file, the readable files of a folder, or those that a glob matches.

    folder: where a relative path begins; default the working directory.

    Raises:
        UserError: there is none, or a file that is named has an unknown ending.
    """
    full = Path(folder or "").expanduser() / Path(path).expanduser()
    if full.is_file():
        kind_of(path)
        return [full]
    if full.is_dir():
        return _of_folder(full, path)
    if not any(c in path for c in "*?["):
        hint = _nearby(full) or ("" if folder else "; give a file, a folder, hub:NAME or sample:da/train")
        raise UserError(f"{path}: file not found{hint}")
    found = sorted(Path(p) for p in glob.glob(str(full), recursive=True) if Path(p).is_file())
    readable = [file for file in found if is_readable(file) and not file.name.startswith(LOCKS)]
    if not readable:
        others = f"; it matches only files of other types: {listed([f.name for f in found], 3)}" if found else ""
        raise UserError(f"{path}: no readable file matches{others}; use {READABLE}")
    return readable


def left_out(path: str) -> str | None:
    """A sentence on the files of a folder that `find_files` leaves out because their ending is not known; else None."""
    full = Path(path).expanduser()
    if not full.is_dir():
        return None
    names = (f.name for f in full.iterdir() if f.is_file() and not is_readable(f))
    others = sorted(name for name in names if not name.startswith((".", LOCKS)))
    if not others:
        return None
    hints = sorted(
        {f"{Path(name).suffix}: {HINTS[Path(name).suffix]}" for name in others if Path(name).suffix in HINTS}
    )
    return f"{path}: files of other types are not read: {listed(others, 5)}" + (
        f" ({', '.join(hints)})" if hints else ""
    )


def _of_folder(folder: Path, shown: str) -> list[Path]:
    found = sorted(file for file in folder.iterdir() if file.is_file() and _is_data(file))
    if found:
        return found
    below = sorted(f.name for f in folder.iterdir() if f.is_dir() and any(_is_data(file) for file in f.iterdir()))
    hint = f"; folders below it do: {listed(below, 5)}" if below else ""
    raise UserError(f"{shown}: the folder holds no file that can be read{hint} (read are {READABLE})")


def _is_data(file: Path) -> bool:
    return is_readable(file) and not file.name.startswith((".", LOCKS)) and file.name.lower() not in ABOUT


def _nearby(path: Path) -> str:
    """What a missing file may have been meant to be: the nearest name in its folder."""
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist"
    names = [f.name for f in path.parent.iterdir() if not f.name.startswith(".")]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
