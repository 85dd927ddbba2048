"""Where rows come from: files (one, a glob, a folder), Hub data sets, the shipped sample.

Everything becomes a memory-mapped `datasets.Dataset` of one of three kinds: documents and sentences (`text`), or pairs
(`query`, `positive`, `negatives`, `instruction`, `document_instruction`). Where a source names a column of groups, rows
carry `group` as well: a 63-bit key of its value, -1 for none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from l2v.data import sample
from l2v.data.find import find_files
from l2v.data.reading import Reading
from l2v.data.rows import Choices, Kind, Rules, Table, normalise, note_columns, read_source, rows_of
from l2v.errors import UserError, first_line
from l2v.recipe import Source

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
READER = 2  # part of the cache's key; a number higher once the same file gives other rows
READING_FILE = "l2v-reading.json"  # next to cached rows: what reading them met
_MET: list[Reading] = []  # of the generator that ran last; a cached data set runs none
_HUB: dict[str, datasets.Dataset] = {}  # by fingerprint: a data set cannot be part of the cache's key


def open_rows(sources: list[Source], kind: Kind, notes: list[str] | None = None) -> datasets.Dataset:
    """All rows of all sources, in order, validated; memory-mapped, so their size does not matter.

    `notes` receives a sentence for what a user should know: guessed columns, unread ones, rows that were skipped.
    """
    return together(open_parts(sources, kind, notes), sources)


def open_parts(sources: list[Source], kind: Kind, notes: list[str] | None = None) -> list[datasets.Dataset]:
    """The rows of each source, all with the same columns; `notes` as for `open_rows`.

    Raises:
        UserError: for what cannot be found or read.
    """
    notes = [] if notes is None else notes
    features = PAIRS if kind == "pairs" else TEXTS
    if kind != "documents" and any(source.group for source in sources):
        features = datasets.Features({**features, "group": datasets.Value("int64")})
    return [_open(source, kind, features, notes) for source in sources]


def together(parts: list[datasets.Dataset], sources: list[Source]) -> datasets.Dataset:
    """The rows of `open_parts`, one source after another.

    Raises:
        UserError: if there is none.
    """
    rows = datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    if len(rows) == 0:
        raise UserError(f"{', '.join(s.path for s in sources)}: the data set is empty; it needs at least one row")
    return rows


def _open(source: Source, kind: Kind, features: datasets.Features, notes: list[str]) -> datasets.Dataset:
    if source.path.startswith("sample:"):
        rules = Rules.of_sample(source, grouped="group" in features)
        read = (normalise(row, rules, kind, source.path) for row in sample.rows(source.path, kind))
        rows = datasets.Dataset.from_list([row for several in read for row in several], features=features)
        return rows.select(range(min(source.limit, len(rows)))) if source.limit else rows
    if source.path.startswith("hub:"):
        found = _hub(source)
        stamps: list[Any] = [found._fingerprint]
        _HUB[found._fingerprint] = found
    else:
        files = find_files(source.path)
        stats = [(file, file.stat()) for file in files]
        # Size and time are part of the arguments, so that the cache detects an edited file.
        stamps = [[str(file.resolve()), stat.st_size, stat.st_mtime_ns] for file, stat in stats]
    rows, reading = _generated(source, kind, features, stamps)
    reading.check(source.path)
    notes += reading.sentences(source.path)
    return rows


def _generated(
    source: Source, kind: Kind, features: datasets.Features, stamps: list[Any]
) -> tuple[datasets.Dataset, Reading]:
    arguments = {
        "source": vars(source), "kind": kind, "stamps": json.dumps(stamps), "grouped": "group" in features,
        "reader": READER,
    }  # fmt: skip
    _MET.clear()
    try:
        rows = datasets.Dataset.from_generator(_generate, features=features, gen_kwargs=arguments)
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        if isinstance(cause, UserError):
            raise cause from None
        raise UserError(f"{source.path}: cannot be read: {first_line(cause)}") from None
    except ValueError as error:
        if "no data" not in str(error):
            raise
        rows = datasets.Dataset.from_dict({key: [] for key in features}, features=features)
        return rows, _MET.pop() if _MET else Reading()  # without rows nothing is kept
    return rows, _reading_of(rows)


def _reading_of(rows: datasets.Dataset) -> Reading:
    """What reading these rows met: from the generator that has just run, else from the file next to the cached rows."""
    file = Path(rows.cache_files[0]["filename"]).parent / READING_FILE if rows.cache_files else None
    if _MET:
        reading = _MET.pop()
        if file:
            file.write_text(json.dumps(reading.facts()), encoding="utf-8")
        return reading
    try:
        return Reading.of(json.loads(file.read_text(encoding="utf-8"))) if file else Reading()
    except (OSError, ValueError):
        return Reading()  # another process has not written it yet; it logs what it met


def _generate(source: dict[str, Any], kind: Kind, stamps: str, grouped: bool, reader: int) -> Iterator[dict[str, Any]]:
    found = Source(**source)
    reading = Reading(keep_going=found.skip_bad)
    _MET.append(reading)
    if found.path.startswith("hub:"):
        rows: Iterator[Any] = _hub_rows(found, kind, reading, _HUB[json.loads(stamps)[0]], grouped)
    else:
        rows = read_source(found, kind, reading, grouped=grouped)
    made = 0
    for _, several in rows:
        for row in several:
            yield row
            made += 1
            if made == found.limit:
                return


def _hub_rows(
    source: Source, kind: Kind, reading: Reading, found: datasets.Dataset, grouped: bool
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    choices: Choices = {}
    rows = ((f"{source.path}, row {number}", row) for number, row in enumerate(found, start=1))
    try:
        table = Table(source.path, found.column_names, complete=True)
        yield from rows_of(source, kind, reading, table, rows, choices, grouped=grouped)
    finally:
        note_columns(source, kind, reading, choices)


def _hub(source: Source) -> datasets.Dataset:
    name = source.path.removeprefix("hub:")
    try:
        return datasets.load_dataset(name, source.name, split=source.split, revision=source.revision)
    except Exception as error:
        raise UserError(f"{source.path}: the Hub data set cannot be loaded: {first_line(error)}") from None
