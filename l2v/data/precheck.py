"""Checks of a recipe's files, columns and disk space in well under a second, before torch or `datasets` is loaded.

Only names and the first rows are read; training reads the rest with the same rules. A mistake in any stage is reported before
the first stage trains.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from l2v.data import raw
from l2v.data.columns import absent, numbered, settle
from l2v.data.find import find_files
from l2v.data.rows import OPTIONAL, Kind
from l2v.errors import UserError
from l2v.recipe.load import where_of
from l2v.recipe.schema import Recipe, Stage
from l2v.recipe.source import Source

KINDS: dict[str, Kind] = {"mntp": "documents", "simcse": "sentences", "supervised": "pairs"}
MIB, GIB = 1 << 20, 1 << 30


def check_data(name: str, overrides: Sequence[str], stage: str | None, recipe: Recipe, names: Sequence[str]) -> None:
    """Check that the files and columns of the stages `names` exist.

    name, overrides, stage: as `load_recipe` took them, to name the line or the override that is wrong.

    Raises:
        UserError: a file or a column is missing. The message begins with the recipe's line or the override.
    """
    for each in names:
        for key in ("data", "eval_data"):
            sources: list[Source] = getattr(recipe.stages[each], key)
            for at, source in enumerate(sources):
                try:
                    _check_source(source, KINDS[recipe.stages[each].objective])
                except _Wrong as wrong:
                    where = where_of(name, overrides, stage, ["stages", each, key, at, wrong.key])
                    raise UserError(f"{where}: stage '{each}': {key}: {wrong}") from None


class _Wrong(Exception):
    """What is wrong with a source, and with which of its keys."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def _check_source(source: Source, kind: Kind) -> None:
    """Raises _Wrong for a missing file or column. Sets of the Hub and the sample are checked when they are opened."""
    if ":" in source.path.partition("/")[0]:
        return
    try:
        files = find_files(source.path)
    except UserError as error:
        raise _Wrong("path", str(error)) from None
    wrong: list[_Wrong] = []
    for path in files:
        try:
            _check_file(source, kind, path, source.path if len(files) == 1 else str(path))
        except (UserError, OSError) as error:
            why = str(error) if isinstance(error, UserError) else f"{path}: cannot be read: {error.strerror}"
            wrong.append(_Wrong("path", why))
        except _Wrong as error:
            wrong.append(error)
    if wrong and (len(wrong) == len(files) or not source.skip_bad):
        raise wrong[0]


def _check_file(source: Source, kind: Kind, path: Path, shown: str) -> None:
    names, complete = raw.columns(path, shown)
    if not names:  # an empty file, which is reported when it is read
        return
    for key, column in _needed(settle(source, names, kind).source, kind, complete=complete):
        if not any(name in names for name in numbered(column, names)):
            where, row = (shown, names) if complete else next(raw.read_rows(path, shown))
            raise _Wrong(key, absent(where, column, row))


def _needed(source: Source, kind: Kind, *, complete: bool) -> Iterator[tuple[str, str]]:
    """(key, column) of every column that must exist.

    complete: whether all columns of the file are known. The columns that a row may lack are only then missed.
    """
    for key in ("query", "positive") if kind == "pairs" else ("text",):
        yield key, getattr(source, key)
    if source.group and kind != "documents":
        yield "group", source.group
    if kind == "pairs" and complete:
        for key in OPTIONAL:
            # Mining and building write a column with the key's own name only if there is anything to write.
            if (column := getattr(source, key)) not in (None, "", key):
                yield key, column


def check_disk(recipe: Recipe, names: Sequence[str]) -> None:
    """Check that the run's folder can be written and that its file system has room for the checkpoints of the stages `names`.

    Raises:
        UserError: it cannot be written, or there is too little space.
    """
    stages = [recipe.stages[name] for name in names]
    run = Path(recipe.out or f"runs/{recipe.name}")
    folder = next((each for each in (run, *run.absolute().parents) if each.exists()), Path("/"))
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{run}: {folder} cannot be written; choose another folder with out=...")
    shape = _shape(recipe)
    # Of each trained weight a checkpoint holds itself and two moments in fp32; one more exists while it is written.
    needed = sum(_trained(stage, shape) * (12 * (stage.keep + 1) + 4) for stage in stages) if shape else 0
    free = shutil.disk_usage(folder).free
    if free < max(needed, MIB) and not run.exists():  # of a run that exists, part is written already
        size = f"{needed / GIB:.1f} GiB" if needed >= GIB else f"{max(needed, MIB) / MIB:.0f} MiB"
        what = "weights" if any(stage.lora is None for stage in stages) else "adapters"
        raise UserError(
            f"{run}: its {what} and checkpoints need about {size}, and {free / MIB:,.0f} MiB are free there; free some space, "
            "lower keep, or choose another folder with out=..."
        )


def _shape(recipe: Recipe) -> dict[str, int] | None:
    """The sizes of the base's layers, if they can be read here without a download."""
    config = recipe.base.config
    if config is None:
        try:
            config = json.loads((Path(recipe.base.model).expanduser() / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
    config = config | recipe.base.overrides
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if not all(isinstance(config.get(key), int) for key in keys):
        return None
    shape = {key: config[key] for key in keys}
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    shape["vocab_size"] = config["vocab_size"] if isinstance(config.get("vocab_size"), int) else 0
    shape["queries"] = width * config["num_attention_heads"]
    shape["keys"] = width * (config.get("num_key_value_heads") or config["num_attention_heads"])
    return shape


def _trained(stage: Stage, shape: dict[str, int]) -> int:
    """Weights that a stage trains in Llama-like layers: of its adapter on their linears (targets of other names count as
    none), or, without LoRA, those of the linears and the embedding.
    """
    hidden, ffn, queries, keys = (shape[key] for key in ("hidden_size", "intermediate_size", "queries", "keys"))
    sides = {
        "q_proj": (hidden, queries), "k_proj": (hidden, keys), "v_proj": (hidden, keys), "o_proj": (queries, hidden),
        "gate_proj": (hidden, ffn), "up_proj": (hidden, ffn), "down_proj": (ffn, hidden),
    }  # fmt: skip
    layers = shape["num_hidden_layers"]
    if stage.lora is None:
        return layers * sum(a * b for a, b in sides.values()) + shape["vocab_size"] * hidden
    return stage.lora.r * layers * sum(sum(sides[name]) for name in stage.lora.linears if name in sides)
