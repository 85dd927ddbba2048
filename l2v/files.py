"""Atomic file writes: a file is complete or absent. This module imports nothing else of l2v."""

from __future__ import annotations

import contextlib
import os
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
