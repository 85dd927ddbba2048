"""Atomic file writes: a file is complete or absent. This module imports nothing else of l2v."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write a file atomically: a reader finds the old or the new content, even after a kill or a power cut."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def reason(error: BaseException) -> str:
    """Why a file could not be written, in a few words; safetensors wraps the system's error in its own text."""
    text = getattr(error, "strerror", None) or str(error)
    return "no space left on the disk" if "No space left" in text else text
