"""An export as ONNX: float32, float16 and int8, each compared with the Encoder before it is kept."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from l2v.encoder import Encoder
from l2v.errors import UserError, first_line
from l2v.files import follow_umask
from l2v.formats import onnx_engine
from l2v.formats.facts import Export, differences, need
from l2v.formats.onnx_engine import FILES, WRITING, check_precisions
from l2v.formats.onnx_graph import Graph
from l2v.formats.onnx_int8 import quantize, sensitive_layers

OPSET = 20
ENTRY = 1e-5
"""Of a unit vector's entry, in float32."""
COSINE = 1e-3
"""1 - cosine, in float16."""
ONE_FILE = 1 << 30
"""Bytes of weights above which they go into a file of their own: one ONNX file ends at 2 GiB."""


@dataclass(frozen=True)
class Written:
    """One file. entry, cosine: its largest differences from the Encoder in float32, on `Export.texts`. floats: layers that int8
    leaves in float32."""

    precision: str
    file: Path
    entry: float
    cosine: float
    floats: list[str] = field(default_factory=list)


def write_onnx(folder: str | Path, precisions: Sequence[str] = ("fp32",)) -> list[Written]:
    """Write `onnx/` into an export: the graphs of these `FILES`, all or none; earlier ones are replaced.

    Inputs: input_ids and attention_mask, int64 [batch, tokens]; pool_start, int64 [1], the tokens at the start of each text that
    are not pooled, which may be omitted where texts have no instruction. Outputs: last_hidden_state, and sentence_embedding.

    Raises:
        UserError: the extra is not installed, a precision is unknown, or a graph does not give the Encoder's vectors.
    """
    need("onnx", *WRITING)
    check_precisions(precisions)
    export = Export.read(folder)
    chosen = [precision for precision in FILES if precision in precisions]
    with _beside(export.folder) as partial:
        (partial / "onnx").mkdir()
        for name in os.listdir(export.folder):  # the check reads an export, whose other files are these
            if name not in ("onnx", partial.name):
                (partial / name).symlink_to((export.folder / name).resolve())
        floats = _write(export, partial / "onnx", chosen)
        if "int8" in chosen and "fp32" not in chosen:  # made from it
            _checked(export, partial, "fp32", floats)
        written = [_checked(export, partial, precision, floats) for precision in chosen]
        if "fp32" not in chosen:
            for file in (partial / "onnx").glob(FILES["fp32"] + "*"):
                file.unlink()
        follow_umask(partial / "onnx")
        shutil.rmtree(export.folder / "onnx", ignore_errors=True)
        (partial / "onnx").rename(export.folder / "onnx")
    return written


@contextlib.contextmanager
def _beside(folder: Path) -> Any:
    try:
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
    try:
        yield partial
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(export: Export, folder: Path, chosen: Sequence[str]) -> list[str]:
    """Write the graphs; returns the layers that int8 leaves in float32."""
    floats: list[str] = []
    if "fp32" in chosen or "int8" in chosen:
        graph = Graph(export)
        _trace(export, graph, folder / FILES["fp32"])
        if "int8" in chosen:
            ids, starts, _ = export.tokenizer.embedded(export.texts())
            floats = sensitive_layers(graph, ids, starts)
            quantize(folder / FILES["fp32"], folder / FILES["int8"], floats)
    if "fp16" in chosen:
        _trace(export, Graph(export, half=True), folder / FILES["fp16"])
    return floats


def _trace(export: Export, graph: Graph, file: Path) -> None:
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    ids = torch.arange(22).reshape(2, 11) % 11
    example = (ids, torch.ones_like(ids), torch.zeros(1, dtype=torch.long))
    kind = export.config.get("model_type")
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                graph, example, dynamo=True, opset_version=OPSET, verbose=False,
                input_names=["input_ids", "attention_mask", "pool_start"],
                output_names=["last_hidden_state", "sentence_embedding"],
                dynamic_shapes=({0: batch, 1: tokens}, {0: batch, 1: tokens}, None),
            )  # fmt: skip
    except Exception as error:
        raise UserError(
            f"{export.folder}: this model ({kind}) cannot be written as ONNX: torch.onnx.export fails ({first_line(error)})"
        ) from None
    assert program is not None
    _describe(export, program.model)
    weights = sum(p.numel() * p.element_size() for p in graph.parameters())
    program.save(str(file), external_data=weights > ONE_FILE)


def _describe(export: Export, model: Any) -> None:
    """Layers get their names, pool_start its default, and the graph says what it is; paths of this machine are removed."""
    import onnx_ir as ir

    for node in model.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        classes = node.metadata_props.get("pkg.torch.onnx.class_hierarchy", "")
        if node.op_type == "MatMul" and "linear.Linear'" in classes:
            node.name = scopes.strip("[]").replace("'", "").split(", ")[-2]
        node.metadata_props.clear()
        node.doc_string = None
    _, starts, _ = export.tokenizer.embedded(["a"])
    start = next(value for value in model.graph.inputs if value.name == "pool_start")
    start.const_value = ir.tensor([starts[0]], dtype=ir.DataType.INT64, name="pool_start")
    model.graph.initializers["pool_start"] = start
    base = export.found.base
    facts = {
        "attention": base.attention, "pooling": base.pooling, "normalize": export.found.normalize,
        "length": export.tokenizer.length, "header": export.tokenizer.header(None),
    }  # fmt: skip
    model.metadata_props.clear()
    model.metadata_props["l2v"] = json.dumps(facts, ensure_ascii=False)
    model.producer_name = "l2v"


@contextlib.contextmanager
def _quiet() -> Any:
    """Without what the exporter tells its own developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def _checked(export: Export, partial: Path, precision: str, floats: list[str]) -> Written:
    """What a graph is worth, measured.

    Raises:
        UserError: a float graph gives other vectors than the Encoder.
    """
    texts = export.texts()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a text is cut, which one is on purpose
        want = Encoder.from_pretrained(export.folder, precision="fp32").encode(texts)
    entry, cosine = differences(onnx_engine.encode(partial, texts, precision=precision), want)
    kind = export.config.get("model_type")
    if precision == "fp32" and entry > ENTRY:
        raise UserError(
            f"{export.folder}: this model ({kind}) cannot be written as ONNX: an entry of its vectors would differ by {entry:.1g}"
        )
    if precision == "fp16" and cosine > COSINE:
        raise UserError(
            f"{export.folder}: this model ({kind}) cannot be written as ONNX in float16: 1 - cosine would be {cosine:.1g}, above "
            f"{COSINE:g}; use fp32 or int8"
        )
    return Written(
        precision, export.folder / "onnx" / FILES[precision], entry, cosine, floats if precision == "int8" else []
    )
