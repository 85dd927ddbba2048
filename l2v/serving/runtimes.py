"""The engines of the further files of an export: ONNX Runtime and llama.cpp, with the tokenizers that their users have."""

from __future__ import annotations

import importlib.util
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from l2v.errors import UserError
from l2v.formats import gguf_engine, onnx_engine
from l2v.formats.facts import Export
from l2v.formats.gguf_vocab import composes, header_as_bos
from l2v.serving.engines import BATCH, Encode, Engine, Facts, prompt_length


def engines_in(folder: Path) -> list[Engine]:
    """One for each file that `l2v export --onnx` or `--gguf` wrote into an export."""
    graphs: list[Engine] = [
        OnnxRuntime(precision) for precision, name in onnx_engine.FILES.items() if (folder / "onnx" / name).is_file()
    ]
    return graphs + [
        LlamaCpp(precision) for precision in gguf_engine.PRECISIONS if gguf_engine.file_of(folder, precision).is_file()
    ]


def _missing(module: str, extra: str) -> str | None:
    return None if importlib.util.find_spec(module) else f"not installed: pip install 'l2v[{extra}]'"


@dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime on the CPU: tokenizer.json as AutoTokenizer reads it, padded batches, and what the graph pools."""

    precision: str

    @property
    def name(self) -> str:
        """With the precision, as there may be several files."""
        return f"onnxruntime {self.precision}"

    def missing(self) -> str | None:
        """Whether the package is installed."""
        return _missing("onnxruntime", "onnx")

    def open(self, folder: Path) -> Encode:
        """A session of the graph."""
        from transformers import AutoTokenizer

        facts = Facts.read(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        session = onnx_engine.open_session(folder, self.precision)

        def encode(texts: list[str], instruction: str | None) -> np.ndarray:
            prompt, out = facts.prompt(instruction), []
            start = prompt_length(tokenizer, prompt) if prompt and not facts.include_prompt else 0
            for at in range(0, len(texts), BATCH):
                batch = tokenizer(
                    [prompt + text for text in texts[at : at + BATCH]], padding=True, truncation=True,
                    max_length=facts.length, return_tensors="np",
                )  # fmt: skip
                feed = {name: batch[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
                feed["pool_start"] = np.array([start], dtype=np.int64)
                out.append(session.run(["sentence_embedding"], feed)[0])
            return np.concatenate(out)

        return encode


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp on the CPU: direction, pooling and tokenizer as the GGUF file states them, one text a call.

    What `l2v.formats.gguf_export` leaves to a caller is done here: the header, Unicode's form NFC, no white space at the ends,
    and texts that are too long cut in front of EOS.
    """

    precision: str

    @property
    def name(self) -> str:
        """With the precision, as there may be several files."""
        return f"llama.cpp {self.precision}"

    def missing(self) -> str | None:
        """Whether the package is installed."""
        return _missing("llama_cpp", "gguf")

    def open(self, folder: Path) -> Encode:
        """The file is opened for each call, and closed after it."""
        export, facts = Export.read(folder), Facts.read(folder)
        bare = bool(header_as_bos(export))  # which the file adds as BOS

        def sent(text: str, instruction: str | None) -> bytes:
            prompt = facts.prompt(instruction)
            text = (prompt.removeprefix(facts.template.prefix) if bare else prompt) + text.strip()
            return (unicodedata.normalize("NFC", text) if composes(export) else text).encode()

        def encode(texts: list[str], instruction: str | None) -> np.ndarray:
            with gguf_engine.open_model(folder, self.precision, longest=facts.length) as model:
                out = []
                for text in texts:
                    ids = _cut(model, sent(text, instruction), facts.length)
                    out.append(gguf_engine.vector(model, ids))
            return np.stack(out)

        return encode


def _cut(model: Any, text: bytes, length: int) -> list[int]:
    """llama.cpp's own ids of a text, at most `length`, with what the file puts behind every text."""
    ids = model.tokenize(text, add_bos=True, special=True)
    if not ids:
        raise UserError("no tokens")
    behind = 1 if model.metadata.get("tokenizer.ggml.add_eos_token") == "true" else 0
    return ids if len(ids) <= length else ids[: length - behind] + ids[len(ids) - behind :]
