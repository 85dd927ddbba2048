"""Sources that are files on this machine, read without a copy: for what looks at some of the rows and trains on none."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from l2v.data import raw
from l2v.data.columns import settle
from l2v.data.find import find_files
from l2v.data.reading import Reading
from l2v.data.rows import Kind
from l2v.recipe import Source


def is_local(source: Source) -> bool:
    """Whether a source is a file, a glob or a folder, and not on the Hub or in the shipped sample."""
    return ":" not in source.path.partition("/")[0]


def files_of(source: Source) -> list[Path]:
    """The files that training reads for a local source, in its order.

    Raises:
        UserError: if there is none, or one does not exist.
    """
    return find_files(source.path)


def rows_of(source: Source, kind: Kind, most: int) -> Iterator[tuple[Source, dict[str, Any]]]:
    """The first rows of a local source as they are written, each with the source whose columns are settled for its file.

    most: rows in total. A `limit` of the source holds too.

    Raises:
        UserError: if a file does not exist or cannot be read.
    """
    left = min(most, source.limit or most)
    for file in files_of(source):
        if left <= 0:
            return
        shown = str(file)
        names, _ = raw.columns(file, shown)
        settled = settle(replace(source, path=shown), names, kind).source
        for _, row in itertools.islice(
            raw.read_rows(file, shown, Reading(keep_going=source.skip_bad), whole=source.whole), left
        ):
            left -= 1
            yield settled, row
