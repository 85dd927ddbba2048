"""Convert an embedded base: join its parts, check their hash, dequantise once, and write the folder as a whole."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from l2v.errors import UserError
from l2v.files import follow_umask, reason
from l2v.model.embedded import (
    FORMAT,
    MARKER,
    EmbeddedBase,
    checked_parts,
    converted_folder,
    is_converted,
)
from l2v.model.licence import CARD, write_papers

BLOCK = 1 << 20
FULL = "no space left on the disk"  # as l2v.files words it
ROOM = 1.05  # of what the files take, so that the last block is not what fails


def _log(line: str) -> None:
    print(f"l2v: {line}", file=sys.stderr, flush=True)


def convert(base: EmbeddedBase, *, again: bool = False, log: Callable[[str], None] = _log) -> Path:
    """The base as a transformers folder (safetensors, configuration, tokenizer, papers), complete or absent.

    A second process waits for the first. again: replace a folder that exists, whatever it holds.

    Raises:
        UserError: its packages are missing or damaged, or the disk is full or cannot be written.
    """
    folder = converted_folder(base.name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder, log):
            if again:
                shutil.rmtree(folder, ignore_errors=True)
            elif is_converted(base):
                return folder
            _sweep(folder)
            parts = checked_parts(base)
            _check_room(base, folder.parent)
            log(f"converting {base.name}, once, to {folder}; this takes a minute or two")
            _convert(base, parts, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(_unwritable(base, folder, error)) from None
    return folder


@contextlib.contextmanager
def _alone(folder: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock of a folder; the system drops it if the process dies."""
    with (folder.parent / f".{folder.name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                yield  # a file system without locks: the rename below still keeps the folder whole
                return
            log(f"another process converts {folder.name}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sweep(folder: Path) -> None:
    """Remove what a killed conversion left; the lock is held, so no other process writes there."""
    for left in folder.parent.glob(f".{folder.name}.*.partial"):
        shutil.rmtree(left, ignore_errors=True)


def _check_room(base: EmbeddedBase, where: Path) -> None:
    quantised = sum(part.size for part in base.parts)
    joined = quantised if len(base.parts) > 1 else 0
    needed = ROOM * (joined + quantised * (8 if base.dtype == "float32" else 4))  # about 4.5 bits a weight before
    free = shutil.disk_usage(where).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")


def _convert(base: EmbeddedBase, parts: list[Path], folder: Path) -> None:
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        file = parts[0] if len(parts) == 1 else partial / "joined.gguf"
        _join(base, parts, None if len(parts) == 1 else file)
        made = partial / "made"
        dequantise(file, made, base.dtype)
        _add_papers(base, made)
        follow_umask(made)
        sizes = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
        facts = {"format": FORMAT, "base": base.name, "sha256": base.sha256, "files": sizes}
        (made / MARKER).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        follow_umask(made / MARKER)
        made.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _join(base: EmbeddedBase, parts: list[Path], target: Path | None) -> None:
    """Hash the parts in order, and write them into `target` if there is one.

    Raises:
        UserError: the hash is not that of the base.
    """
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(target.open("wb")) if target else None
        for part in parts:
            source = stack.enter_context(part.open("rb"))
            while block := source.read(BLOCK):
                digest.update(block)
                if out is not None:
                    out.write(block)
    if digest.hexdigest() != base.sha256:
        raise UserError(
            f"the weights of {base.name} are not those that l2v was tested with: their sha256 is {digest.hexdigest()} instead "
            f"of {base.sha256}; '{base.again}' installs the packages again{base.otherwise}"
        )


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """Let every reader of a GGUF file be the first one's: gguf parses Gemma's 262,144 tokens in 20 s, and transformers asks
    three times. Where it takes its reader from elsewhere, it is only slower.
    """
    import gguf

    reader = gguf.GGUFReader
    vars(gguf)["GGUFReader"] = functools.cache(reader)
    try:
        yield
    finally:
        vars(gguf)["GGUFReader"] = reader


def dequantise(file: Path, folder: Path, dtype: str) -> None:
    """A GGUF file as a plain transformers folder with its tokenizer. dtype: of the weights, as torch names it."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from l2v.model.settings import quiet_transformers

    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()), _parsed_once():  # a progress bar of its own
        # By default a GGUF load keeps a quantization config that cannot be saved; dequantize=True gives a plain model.
        config = transformers.GgufConfig(gguf_file=file.name, dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, quantization_config=config, dtype=getattr(torch, dtype)
        )
        model.save_pretrained(folder)
        special = {kind: getattr(model.config, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad", "unk")}
        del model
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        # transformers 5.17 takes other tokens than those of the file's own ids, and no pad token; the configuration is right.
        for kind, at in special.items():
            tokenizer.init_kwargs.pop(f"{kind}_token_id", None)
            if isinstance(at, int):
                setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(at))
        tokenizer.save_pretrained(folder)


def _add_papers(base: EmbeddedBase, folder: Path) -> None:
    """A card that names source and licence, the notice that the licence requires, and a copy of its terms."""
    card = f"---\nlicense: {base.licence}\nbase_model: {base.hub}\n---\n\n{base.notice}\n"
    (folder / CARD).write_text(f"{card}\nConverted by l2v from {base.requirements[0]}.\n", encoding="utf-8")
    write_papers(base.licence, folder, changed="Its weights were quantised to 4 bits by others and dequantised by l2v.")


def _unwritable(base: EmbeddedBase, folder: Path, error: OSError | SafetensorError) -> str:
    why = reason(error)
    if getattr(error, "errno", None) == errno.ENOSPC or why == FULL:
        return (
            f"{base.name} was not converted: {folder.parent}: {why}; free some space or set L2V_CACHE to a folder elsewhere, "
            f"then run '{base.fetch}'"
        )
    return f"{base.name} was not converted: {folder.parent}: {why}; set L2V_CACHE to a folder that can be written"
