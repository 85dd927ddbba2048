"""Files that are whole or not there. A leaf of the import tree."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write a file so that whoever reads it, after a kill or a power cut too, finds the old content or the new one."""
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
    """Why a file could not be written, in few words; safetensors hides the system's error in a text of its own."""
    text = getattr(error, "strerror", None) or str(error)
    return "no space left on the disk" if "No space left" in text else text
