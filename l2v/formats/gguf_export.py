"""An export as GGUF for llama.cpp: float16 and q8_0, each compared with the Encoder before it is kept."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModel

from l2v.encoder import Encoder
from l2v.errors import UserError, first_line
from l2v.files import follow_umask
from l2v.formats import gguf_engine
from l2v.formats.facts import Export, differences, need
from l2v.formats.gguf_engine import check_precisions
from l2v.formats.gguf_vocab import choose_rule, composes, header_as_bos, write_vocabulary
from l2v.formats.onnx_graph import Band, bands_of
from l2v.model.settings import quiet_transformers

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA, "mistral": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3, "gemma3_text": gguf.MODEL_ARCH.GEMMA_EMBEDDING,
}  # fmt: skip
"""llama.cpp's architecture for each model_type. gemma-embedding is Gemma 3 in both directions."""
POOLINGS = {"mean": gguf.PoolingType.MEAN, "last": gguf.PoolingType.LAST, "first": gguf.PoolingType.CLS}
COSINE = {"f16": 1e-3, "q8_0": 1e-2}
"""1 - cosine to the Encoder in float32."""


@dataclass(frozen=True)
class Written:
    """One file. cosine: its largest 1 - cosine to the Encoder in float32, on `Export.texts`. note: what a caller has to do."""

    precision: str
    file: Path
    cosine: float
    note: str = ""


def write_gguf(folder: str | Path, precisions: Sequence[str] = ("f16",)) -> list[Written]:
    """Write `gguf/` into an export: one file each, all or none; earlier ones are replaced.

    Direction and pooling are in the metadata: `llama-server --embeddings -m FILE` needs no other flags. A header or an
    instruction has to come with the text.

    Raises:
        UserError: the extra is not installed, or llama.cpp cannot represent the encoder; what it is, is named.
    """
    check_precisions(precisions)
    need("gguf", "llama_cpp")
    export = Export.read(folder)
    _check_pooling(export)
    with quiet_transformers():
        model = AutoModel.from_pretrained(export.folder, dtype=torch.float32, trust_remote_code=False).eval()
    source = _Source(export, model)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{export.folder.name}.", dir=export.folder.parent) as name:
            partial = Path(name) / "gguf"
            partial.mkdir()
            rule = choose_rule(export, source.write_vocabulary, Path(name))
            for precision in precisions:
                source.write(gguf_engine.file_of(Path(name), precision), precision, rule)
            for file in export.folder.iterdir():  # the check reads an export, whose other files are these
                if file.name != "gguf":
                    (Path(name) / file.name).symlink_to(file.resolve())
            written = [_checked(export, Path(name), precision) for precision in precisions]
            follow_umask(partial)
            shutil.rmtree(export.folder / "gguf", ignore_errors=True)
            partial.rename(export.folder / "gguf")
    except OSError as error:
        raise UserError(f"{export.folder}: cannot be written: {error.strerror or error}") from None
    return written


def _check_pooling(export: Export) -> None:
    """Raises UserError if llama.cpp has no such pooling."""
    how = export.found.base.pooling
    if how not in POOLINGS:
        raise UserError(f"{export.folder}: cannot be written as GGUF: llama.cpp has no pooling '{how}'")
    _, starts, _ = export.tokenizer.embedded(["a"])
    if how != "last" and starts[0]:
        raise UserError(
            f"{export.folder}: cannot be written as GGUF: llama.cpp pools every token, and here {starts[0]} before each text "
            "are not pooled; train with pooling: last, or with a template and tokenizer that put nothing before a text"
        )


class _Source:
    """A model of transformers, in the names and the layout of llama.cpp."""

    def __init__(self, export: Export, model: Any) -> None:
        self.export, self.model, self.config = export, model, model.config.get_text_config()
        kind = self.config.model_type
        if kind not in ARCHITECTURES:
            raise self.refused(f"llama.cpp's code for '{kind}' is not known here (known: {', '.join(ARCHITECTURES)})")
        self.arch = ARCHITECTURES[kind]
        self.names = gguf.get_tensor_name_map(self.arch, self.config.num_hidden_layers)
        self.bands = list(bands_of(model, export.tokenizer.length).values())

    def refused(self, why: str) -> UserError:
        return UserError(f"{self.export.folder}: cannot be written as GGUF: {why}")

    def write_vocabulary(self, file: Path, rule: str) -> None:
        """A file without weights, which is enough to split texts."""
        self._write(file, rule, [])

    def write(self, file: Path, precision: str, rule: str) -> None:
        """The whole file."""
        self._write(file, rule, self.tensors(precision))

    def _write(self, file: Path, rule: str, tensors: Any) -> None:
        writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[self.arch])
        writer.add_name(self.export.folder.name)
        self._settings(writer)
        write_vocabulary(writer, self.export, self.model.get_input_embeddings().weight.shape[0], rule)
        for name, array, dtype in tensors:
            writer.add_tensor(name, array, raw_dtype=dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def _settings(self, writer: gguf.GGUFWriter) -> None:
        config = self.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head)
        writer.add_value_length(head)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(head)
        writer.add_vocab_size(config.vocab_size)
        writer.add_pooling_type(POOLINGS[self.export.found.base.pooling])
        causal = self.export.found.base.attention == "causal"
        writer.add_causal_attention(causal)
        self._windows(writer, causal)

    def _windows(self, writer: gguf.GGUFWriter, causal: bool) -> None:
        """Windows and rotary bases; raises UserError for windows that the architecture does not have."""
        plain = Band(None, 0 if causal else None)
        if self.arch != gguf.MODEL_ARCH.GEMMA_EMBEDDING:
            if set(self.bands) != {plain}:
                raise self.refused(
                    f"its window is shorter than its texts of {self.export.tokenizer.length} tokens, and llama.cpp has none in "
                    "this architecture; export with a smaller --length"
                )
            writer.add_rope_freq_base(_base(self.config, None))
            return
        narrow = {band for band in self.bands if band != plain}
        if causal or len(narrow) > 1 or any(band.left != band.right for band in narrow):
            raise self.refused(
                "llama.cpp's gemma-embedding has attention in both directions, and one window on both sides"
            )
        kinds = self.config.layer_types
        # It halves the window. Where texts are shorter than the window, any longer one will do.
        width = (next(iter(narrow)).left if narrow else None) or self.export.tokenizer.length
        writer.add_sliding_window(2 * width)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in kinds])
        writer.add_rope_freq_base(_base(self.config, "full_attention"))
        writer.add_rope_freq_base_swa(_base(self.config, "sliding_attention"))

    def tensors(self, precision: str) -> Iterator[tuple[str, np.ndarray, gguf.GGMLQuantizationType]]:
        """Names, data and types. Vectors stay in float32, as llama.cpp expects."""
        yield from self._rotary_factors()
        for name, weight in self.model.state_dict().items():
            target = self.names.get_name("model." + name, try_suffixes=(".weight", ".bias"))
            if target is None:
                raise self.refused(f"llama.cpp has no place for its weight {name}")
            array = self._laid_out(name, weight.float()).numpy()
            kind = gguf.GGMLQuantizationType.F32
            if array.ndim > 1:
                kind = gguf.GGMLQuantizationType[precision.upper()]
                if precision == "q8_0" and array.shape[-1] % 32:
                    kind = gguf.GGMLQuantizationType.F16
                if kind is gguf.GGMLQuantizationType.F16 and np.abs(array).max() > np.finfo(np.float16).max:
                    raise self.refused(f"its weight {name} is too large for float16")
                array = gguf.quantize(array, kind)
            yield target, array, kind

    def _laid_out(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        if self.config.model_type == "gemma3_text" and name.endswith("norm.weight"):
            return weight + 1  # transformers adds it as it runs
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        layer = name.split(".")[-2]
        if self.arch is gguf.MODEL_ARCH.LLAMA and layer in heads:
            # Rotary pairs are neighbours there, and half a head apart in transformers.
            halves = weight.reshape(heads[layer], 2, -1, *weight.shape[1:])
            return halves.transpose(1, 2).reshape(weight.shape).contiguous()
        return weight

    def _rotary_factors(self) -> Iterator[tuple[str, np.ndarray, gguf.GGMLQuantizationType]]:
        """How much longer each rotary wave is than its base says (Llama 3.1 and others): read off the model's own."""
        rotary = self.model.rotary_emb
        for kind in [None] if hasattr(rotary, "inv_freq") else sorted(set(self.config.layer_types)):
            prefix = f"{kind}_" if kind else ""
            found = getattr(rotary, f"{prefix}inv_freq").double()
            plain = _base(self.config, kind) ** -(torch.arange(len(found), dtype=torch.float64) / len(found))
            factors = plain / found
            scaling = getattr(rotary, f"{prefix}attention_scaling", 1.0)
            if torch.allclose(factors, torch.ones_like(factors), rtol=1e-4) and scaling == 1:
                continue
            if kind or self.arch is not gguf.MODEL_ARCH.LLAMA or scaling != 1:
                raise self.refused("its rotary embedding is scaled, which llama.cpp does for Llama's alone")
            yield "rope_freqs.weight", factors.float().numpy(), gguf.GGMLQuantizationType.F32


def _base(config: Any, kind: str | None) -> float:
    """rope_theta, of one kind of layer if they differ."""
    rope = config.rope_parameters
    return float((rope[kind] if kind else rope)["rope_theta"])


def _checked(export: Export, partial: Path, precision: str) -> Written:
    """What a file is worth, measured.

    Raises:
        UserError: llama.cpp does not load it, or gives other vectors than the Encoder.
    """
    texts = export.texts()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a text is cut, which one is on purpose
        want = Encoder.from_pretrained(export.folder, precision="fp32").encode(texts)
    try:
        _, cosine = differences(gguf_engine.encode(partial, texts, precision=precision), want)
    except ValueError as error:
        raise UserError(
            f"{export.folder}: cannot be written as GGUF: llama.cpp does not load it ({first_line(error)})"
        ) from None
    if cosine > COSINE[precision]:
        raise UserError(
            f"{export.folder}: cannot be written as GGUF in {precision}: 1 - cosine would be {cosine:.1g}, above "
            f"{COSINE[precision]:g}"
        )
    return Written(precision, gguf_engine.file_of(export.folder, precision), cosine, _note(export))


def _note(export: Export) -> str:
    header = export.tokenizer.header(None)
    notes = [f"put {header!r} before each text"] if header and not header_as_bos(export) else []
    if composes(export):
        notes.append("give texts in Unicode's form NFC")
    return " and ".join(notes)
