"""Atomic file writes: a file is complete or absent. This module imports nothing else of l2v."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write to; it replaces `path` when the block ends without an error.

    A reader finds the old content or the new one, also after a kill or a power cut.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str) -> None:
    """Write a text file as a whole, as `replacing` does."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def reason(error: BaseException) -> str:
    """The short reason why a file could not be written; safetensors hides the system's error in its own text."""
    text = getattr(error, "strerror", None) or str(error)
    return "no space left on the disk" if "No space left" in text else text


def follow_umask(path: Path) -> None:
    """Give a file, or a folder and the files below it, the mode that new ones get here.

    safetensors and `tempfile` write for the owner alone, so a colleague could not read the model. The umask cannot be read
    without changing it for all threads, and a folder may have rules of its own (ACL), so a new file shows the mode.
    """
    inside = path if path.is_dir() else path.parent
    probe = inside / f".mode.{os.getpid()}.{threading.get_ident()}"
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_WRONLY, 0o666))
        mode = stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        file.chmod(mode)
    if path.is_dir():
        path.chmod(mode | (mode & 0o444) >> 2)  # whoever may read may enter
