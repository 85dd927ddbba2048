"""Where rows come from: CSV, JSONL, Parquet, text (a file, a glob, a folder of Parquet), Hub data sets, the shipped sample.

Everything becomes a memory-mapped `datasets.Dataset` of one of three kinds: documents and sentences (`text`), or pairs
(`query`, `positive`, `negatives`, `instruction`, `document_instruction`). Where a source names a column of groups, rows
carry `group` as well: a 63-bit key of its value, -1 for none.
"""

from __future__ import annotations

import glob
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import datasets

from l2v.data import raw, sample
from l2v.data.columns import absent, numbered, settle
from l2v.data.text import sentences
from l2v.data.tokens import text_key
from l2v.errors import UserError, first_line
from l2v.recipe import Source

Kind = Literal["documents", "sentences", "pairs"]

PAIRS = datasets.Features(
    {
        "query": datasets.Value("string"),
        "positive": datasets.Value("string"),
        "negatives": datasets.List(datasets.Value("string")),
        "instruction": datasets.Value("string"),
        "document_instruction": datasets.Value("string"),
    }
)
TEXTS = datasets.Features({"text": datasets.Value("string")})
NAMES = {key: key for key in ("text", *PAIRS)}


def open_rows(sources: list[Source], kind: Kind, notes: list[str] | None = None) -> datasets.Dataset:
    """All rows of all sources, in order, validated; memory-mapped, so their size does not matter.

    `notes` receives a sentence for each source whose columns were guessed by their names.
    """
    return together(open_parts(sources, kind, notes), sources)


def open_parts(sources: list[Source], kind: Kind, notes: list[str] | None = None) -> list[datasets.Dataset]:
    """The rows of each source, all with the same columns; `notes` as for `open_rows`."""
    notes = [] if notes is None else notes
    features = PAIRS if kind == "pairs" else TEXTS
    if kind != "documents" and any(source.group for source in sources):
        features = datasets.Features({**features, "group": datasets.Value("int64")})
    return [_joined([_open(part, kind, features, notes) for part in _expand(source)]) for source in sources]


def together(parts: list[datasets.Dataset], sources: list[Source]) -> datasets.Dataset:
    """The rows of `open_parts`, one source after another.

    Raises:
        UserError: if there is none.
    """
    rows = _joined(parts)
    if len(rows) == 0:
        raise UserError(f"{', '.join(s.path for s in sources)}: the data set is empty; it needs at least one row")
    return rows


def scan(source: Source, kind: Kind) -> Iterator[list[dict[str, Any]]]:
    """What each row of one file becomes, streamed in order: an empty list for a row with an empty text."""
    rules = _columns(replace(source, skip_empty=True), PAIRS if kind == "pairs" else TEXTS)
    for where, row in raw.read_rows(Path(source.path).expanduser(), source.path):
        yield normalise(row, rules, kind, where)


def _joined(parts: list[datasets.Dataset]) -> datasets.Dataset:
    return datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def _expand(source: Source) -> list[Source]:
    """A source for each file of a glob, or of a folder of Parquet files; any other as it is."""
    if ":" in source.path.partition("/")[0]:
        return [source]
    path = Path(source.path).expanduser()
    if path.is_dir():
        found = sorted(path.glob("*.parquet"))
        if not found:
            raise UserError(f"{source.path}: the folder holds no .parquet file")
    elif path.is_file() or not any(c in source.path for c in "*?["):
        return [source]
    else:
        found = sorted(Path(p) for p in glob.glob(str(path)))
        if not found:
            raise UserError(f"{source.path}: no file matches")
    if source.limit and len(found) > 1:
        raise UserError(f"{source.path}: limit applies to a single file, and this matches {len(found)} files")
    return [replace(source, path=str(file)) for file in found]


def _open(source: Source, kind: Kind, features: datasets.Features, notes: list[str]) -> datasets.Dataset:
    if source.path.startswith("sample:"):
        columns = _columns(source, features) | NAMES | {"skip_empty": False, "sentences": False}
        read = (normalise(row, columns, kind, source.path) for row in sample.rows(source.path, kind))
        rows = datasets.Dataset.from_list([row for several in read for row in several], features=features)
    elif source.path.startswith("hub:"):
        found = _hub(source)
        rows = _convert(found, _settled(source, found.column_names, kind, notes), kind, features)
    else:
        path = Path(source.path).expanduser()
        if not path.is_file():
            raise UserError(f"{source.path}: file not found; give a file, hub:NAME or sample:da/train")
        names, complete = raw.columns(path, source.path)
        settled = _settled(source, names, kind, notes, complete=complete)
        if raw.is_streamed(path):
            stat = path.stat()
            # size and time are part of the arguments, so that the cache detects an edited file
            stamp = f"{stat.st_size}-{stat.st_mtime_ns}"
            rows = _from_lines(path, settled, kind, features, stamp)
        else:
            rows = _convert(_parquet(path), settled, kind, features)
    return rows.select(range(min(source.limit, len(rows)))) if source.limit else rows


def _settled(source: Source, names: Sequence[str], kind: Kind, notes: list[str], *, complete: bool = True) -> Source:
    """The source with its columns resolved; each guess is noted. complete: `names` are all columns that a row may have."""
    choice = settle(source, names, kind)
    if note := choice.note():
        notes.append(note)
    if complete and (missing := _unmet(_optional(vars(choice.source), kind), names)):
        raise UserError(absent(source.path, missing[0], names))
    return choice.source


def _optional(source: dict[str, Any], kind: Kind) -> list[str]:
    """Columns that a recipe names and a row may lack; a column that no row has is an error.

    A column with the key's own name may be missing: mining and building write `negatives` or
    `document_instruction` only if there are any.
    """
    keys = ("negatives", "instruction", "document_instruction") if kind == "pairs" else ()
    return [source[key] for key in keys if source[key] not in (None, "", key)]


def _unmet(wanted: list[str], names: Collection[str]) -> list[str]:
    return [column for column in wanted if not any(name in names for name in numbered(column, names))]


def _from_lines(path: Path, source: Source, kind: Kind, features: datasets.Features, stamp: str) -> datasets.Dataset:
    arguments = {
        "path": str(path.resolve()),
        "shown": source.path,
        "source": _columns(source, features),
        "kind": kind,
        "stamp": stamp,
    }
    try:
        return datasets.Dataset.from_generator(_read_lines, features=features, gen_kwargs=arguments)
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        if isinstance(cause, UserError):
            raise cause from None
        raise UserError(f"{source.path}: cannot be read: {first_line(cause)}") from None
    except ValueError as error:
        if "no data" not in str(error):
            raise
        return datasets.Dataset.from_dict({key: [] for key in features}, features=features)


def _columns(source: Source, features: datasets.Features) -> dict[str, Any]:
    """Everything in a source that changes what a row becomes, as plain values for the cache key."""
    prompts = source.prompts()
    columns = {name: getattr(source, name) for name in (*NAMES, "group", "path", "skip_empty", "sentences")}
    columns |= {"query_prompt": prompts.query, "document_prompt": prompts.document, "symmetric": prompts.symmetric}
    return columns | {"grouped": "group" in features}


def _read_lines(path: str, shown: str, source: dict[str, Any], kind: Kind, stamp: str) -> Iterator[dict[str, Any]]:
    wanted = _optional(source, kind)
    seen: dict[str, None] = {}
    for where, row in raw.read_rows(Path(path), shown):
        if wanted:
            seen |= dict.fromkeys(row)
            wanted = _unmet(wanted, row)
        yield from normalise(row, source, kind, where)
    if wanted and seen:
        raise UserError(absent(shown, wanted[0], seen))


def normalise(row: dict[str, Any], source: dict[str, Any], kind: Kind, where: str) -> list[dict[str, Any]]:
    """The row under l2v's column names: none if an empty text is skipped, several if the row is split into sentences."""

    def text(key: str) -> str:
        column = source[key]
        if column not in row:
            raise UserError(absent(where, column, row))
        value = row[column]
        if not isinstance(value, str):
            raise UserError(f"{where}: the field '{column}' is text; found {type(value).__name__}")
        return value.strip()

    wanted = ("query", "positive") if kind == "pairs" else ("text",)
    out: dict[str, Any] = {key: text(key) for key in wanted}
    for key, value in out.items():
        if not value:
            if source["skip_empty"]:
                return []
            raise UserError(f"{where}: '{source[key]}' is empty; remove the row or set skip_empty: true on its source")
    if kind == "pairs":
        out["negatives"] = _negatives(row, source["negatives"], where)
        for key, prompt in (("instruction", "query_prompt"), ("document_instruction", "document_prompt")):
            out[key] = (row.get(source[key]) if source[key] else None) or source[prompt] or None
        if source["symmetric"]:
            out["document_instruction"] = out["instruction"]
    if source["grouped"]:
        out["group"] = _group(row, source, where)
    if kind != "pairs" and source["sentences"]:
        return [out | {"text": part} for part in sentences(out["text"])]
    return [out]


def _negatives(row: dict[str, Any], pattern: str, where: str) -> list[str]:
    out: list[str] = []
    for column in numbered(pattern, row):
        found = row.get(column) or []
        found = [found] if isinstance(found, str) else found
        if not isinstance(found, list) or not all(isinstance(n, str) for n in found):
            raise UserError(f"{where}: the field '{column}' is a text or a list of texts")
        out += [n.strip() for n in found if n.strip()]  # an empty negative counts as absent
    return out


def _group(row: dict[str, Any], source: dict[str, Any], where: str) -> int:
    column = source["group"]
    if column is None:
        return -1
    if column not in row:
        raise UserError(absent(where, column, row))
    value = row[column]
    if not isinstance(value, str | int | None) or isinstance(value, bool):
        raise UserError(f"{where}: the field '{column}' is text or a whole number; found {type(value).__name__}")
    # The key includes the source: numbers restart in every data set, so a group never spans two sources.
    return -1 if value in (None, "") else text_key(f"{source['path']}\n{value}")


def _convert(rows: datasets.Dataset, source: Source, kind: Kind, features: datasets.Features) -> datasets.Dataset:
    columns = _columns(source, features)

    def batch(values: dict[str, list], index: list[int]) -> dict[str, list]:
        out: dict[str, list] = {key: [] for key in features}
        for at, i in enumerate(index):
            row = {key: value[at] for key, value in values.items()}
            for done in normalise(row, columns, kind, f"{source.path}, row {i + 1}"):
                for key in features:
                    out[key].append(done[key])
        return out

    return rows.map(batch, with_indices=True, batched=True, remove_columns=rows.column_names, features=features)


def _hub(source: Source) -> datasets.Dataset:
    name = source.path.removeprefix("hub:")
    try:
        return datasets.load_dataset(name, source.name, split=source.split, revision=source.revision)
    except Exception as error:
        raise UserError(f"{source.path}: the Hub data set cannot be loaded: {first_line(error)}") from None


def _parquet(path: Path) -> datasets.Dataset:
    try:
        return datasets.load_dataset("parquet", data_files=str(path), split="train")
    except Exception as error:
        cause = error.__cause__ or error
        raise UserError(f"{path}: not a readable Parquet file: {first_line(cause)}") from None
