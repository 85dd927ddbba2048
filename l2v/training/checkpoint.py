"""Checkpoints: everything needed to resume bit for bit, in safetensors and JSON. A checkpoint is complete or absent."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from l2v.errors import UserError
from l2v.files import follow_umask, reason, sync
from l2v.model.lora import sha256

STATE, TENSORS = "state.json", "state.safetensors"


@dataclass
class Checkpoint:
    """A training state at the end of a step."""

    step: int
    tensors: Mapping[str, torch.Tensor]
    facts: dict[str, Any]


class StoredTensors(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint on disk, each read when it is asked for: every rank of a node needs them, one at a time.

    Raises:
        SafetensorError: the file is no safetensors file.
    """

    def __init__(self, file: Path) -> None:
        self._file = safe_open(file, framework="pt")
        self._names = set(self._file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


def save(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write step-NNNNNN below `folder` and remove the oldest beyond `keep`.

    The folder is written under a temporary name, synced and renamed, so a folder called step-NNNNNN is always complete.

    Raises:
        UserError: the checkpoint cannot be written.
    """
    final = folder / f"step-{checkpoint.step:06d}"
    partial = folder / f".{final.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        new = not folder.exists()
        partial.mkdir(parents=True)
        if new:
            sync(folder.parent)
        save_file(dict(checkpoint.tensors), partial / TENSORS)
        follow_umask(partial / TENSORS)
        facts = checkpoint.facts | {"step": checkpoint.step, "sha256": sha256(partial / TENSORS)}
        facts |= {"seal": _seal(facts)}
        (partial / STATE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{final}: the checkpoint cannot be written ({reason(error)}); earlier checkpoints are complete: free some space "
            "and run the same command again"
        ) from None
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def newest(folder: Path, *, log: Callable[[str], None] | None = print) -> Checkpoint | None:
    """The newest undamaged checkpoint below `folder`, or None; damaged ones are reported through `log`."""
    for path in reversed(_all(folder)):
        try:
            facts = json.loads((path / STATE).read_text(encoding="utf-8"))
            if facts.pop("seal") != _seal(facts) or facts["sha256"] != sha256(path / TENSORS):
                raise ValueError("its checksum does not match")
            return Checkpoint(facts["step"], StoredTensors(path / TENSORS), facts)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            if log:
                log(f"warning: {path} is damaged and skipped: {error}")
    return None


def _seal(facts: dict[str, Any]) -> str:
    """A checksum of the facts: a flipped digit in the step number is as bad as one in a weight."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def remove_all(folder: Path) -> None:
    """Delete every checkpoint below `folder`."""
    shutil.rmtree(folder, ignore_errors=True)


def _all(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if p.is_dir()) if folder.is_dir() else []
