"""`l2v encode`: the texts of files to one file of vectors, a chunk at a time, over the processes of a launcher."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from l2v import __version__
from l2v.encoder import Encoder
from l2v.encoding.identity import encoder_key, precision_of
from l2v.encoding.join import join, read_facts
from l2v.encoding.names import check_out, ids_file
from l2v.encoding.ranks import Ranks
from l2v.encoding.rows import CHUNK_LETTERS, CHUNK_ROWS, Chunk, Input, Scan, chunks, scan, stamps
from l2v.encoding.shards import Shards, writing
from l2v.errors import Notice, UserError
from l2v.files import replace_text
from l2v.recipe.instructions import Side
from l2v.recipe.tasks import find_task

SEEN_WITHIN = 60.0  # seconds in which what one node wrote has to appear on another


OPEN = ("l2v", "model", "path", "side", "truncated")
"""Facts that decide no vector: a model or a file that was moved is the same."""


@dataclass(frozen=True)
class Job:
    """One call of `l2v encode`. options: of `Encoder.from_pretrained`.

    instruction: None for that of `task`, or else of the training, on this `side`. vector_column: of a Parquet file.
    """

    model: str
    given: Input
    out: str
    side: Side = "document"
    task: str | None = None
    instruction: str | None = None
    dimensions: int | None = None
    batch_tokens: int = 16384
    vector_column: str = "embedding"
    adapters: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """rows: vectors in the file. already: it was finished before. notes: sentences for the user."""

    rows: int
    dimensions: int
    instruction: str | None
    already: bool
    notes: list[str]


def encode_file(job: Job, ranks: Ranks, *, progress: bool = True) -> Outcome:
    """Encode all texts of a job. Killed at any instant and called again, it continues, and the file has every row once.

    Each rank encodes every world-th chunk into a shard; rank 0 joins them. progress: bars on rank 0.

    Raises:
        UserError: something cannot be read, loaded or written; finished shards are kept.
    """
    out = check_out(job.out)
    show = progress and ranks.rank == 0
    found = ranks.first(lambda: _scan(job.given, show))
    encoder = ranks.every(lambda: Encoder.from_pretrained(job.model, job.adapters, **job.options))
    facts = ranks.every(lambda: _facts(job, encoder, found))
    key = hashlib.sha256(json.dumps(_decisive(facts), sort_keys=True).encode()).hexdigest()[:16]
    ranks.agree(_decisive(facts))
    shards = Shards(out, key)
    if ranks.first(lambda: _finished(out, shards, facts)):
        return Outcome(found.rows, facts["dimensions"], facts["instruction"], True, list(found.notes))
    ranks.first(lambda: _begin(shards, facts, found))
    ranks.every(lambda: _seen(shards.folder))
    ranks.every(lambda: _work(job, encoder, facts, shards, found, ranks, show))
    notes = ranks.first(lambda: _end(shards, found, facts, job))
    return Outcome(found.rows, facts["dimensions"], facts["instruction"], False, [*found.notes, *notes])


def instruction_of(job: Job, encoder: Encoder) -> str | None:
    """The instruction before every text of a job; None for none.

    Raises:
        UserError: the training had several on this side, and the job names none; or its task does not exist.
    """
    if job.instruction is not None:
        return job.instruction or None
    if job.task is not None:
        task = find_task(job.task)
        return task.query if job.side == "query" or task.symmetric else task.document
    if why := encoder.instructions.unclear(job.side):
        raise UserError(f"{why}; choose one with --instruction TEXT or --task NAME, '' for none")
    return encoder.instructions.one(job.side)


def _scan(given: Input, show: bool) -> Scan:
    with tqdm(desc="read", unit="text", leave=False, delay=1, disable=not show) as bar:
        return scan(given, bar.update)


def _facts(job: Job, encoder: Encoder, found: Scan) -> dict[str, Any]:
    """All that decides the vectors and their order, and what a reader of the file needs."""
    width = encoder.dimension if job.dimensions is None else job.dimensions
    if not 1 <= width <= encoder.dimension:
        raise UserError(f"--dimensions is {width}; the vectors of {job.model} have {encoder.dimension}")
    return {
        "l2v": __version__,
        "model": job.model,
        "encoder": encoder_key(encoder),
        "precision": precision_of(encoder),
        "length": encoder.max_length,
        "instruction": instruction_of(job, encoder),
        "side": job.side,
        "dimensions": width,
        "normalized": encoder.normalize,
        "rows": found.rows,
        "files": [list(file) for file in found.files],
        "path": str(Path(job.given.file).expanduser().absolute()),
        "input": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(job.given).items() if k != "file"},
        "vector_column": job.vector_column,
        "chunk": [CHUNK_ROWS, CHUNK_LETTERS],
    }


def _decisive(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts that decide which vectors the file holds."""
    return {key: value for key, value in facts.items() if key not in OPEN}


def _finished(out: Path, shards: Shards, facts: dict[str, Any]) -> bool:
    """Whether the file exists and holds what would be computed now.

    Raises:
        UserError: a file of that name exists with other content.
    """
    if not out.exists():
        return False
    before = read_facts(out)
    if before is None or _decisive(before) != json.loads(json.dumps(_decisive(facts))):
        changed = [] if before is None else [key for key, value in _decisive(facts).items() if before.get(key) != value]
        why = f" with another {', '.join(changed)}" if changed else ""
        raise UserError(f"{out}: the file exists{why}; remove it or choose another --out")
    shards.clear()  # a process that was killed between the file and its clearing
    return True


def _begin(shards: Shards, facts: dict[str, Any], found: Scan) -> None:
    with writing(shards.out):
        shards.out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(shards.out.parent).free
    left = sum(not shards.path(number).exists() for number in range(found.chunks)) / found.chunks
    needed = 4 * found.rows * facts["dimensions"] * (1 + left)  # shards, and the file that is joined from them
    if needed > free:
        raise UserError(
            f"{shards.out}: the vectors need {needed / 1e9:.1f} GB while they are written, and {free / 1e9:.1f} GB are free"
        )
    shards.create(facts)


def _seen(folder: Path) -> None:
    """Wait until what rank 0 wrote appears here.

    Raises:
        UserError: it does not.
    """
    if not _appears(lambda: (folder / "manifest.json").is_file()):
        raise UserError(f"{folder}: not seen on every node; --out has to be in a folder that all nodes share")


def _appears(exists: Callable[[], bool]) -> bool:
    """Whether something exists, now or soon: a network file system shows another node's files late."""
    until = time.monotonic() + SEEN_WITHIN
    while not (found := exists()) and time.monotonic() < until:
        time.sleep(0.5)
    return found


def _work(
    job: Job, encoder: Encoder, facts: dict[str, Any], shards: Shards, found: Scan, ranks: Ranks, show: bool
) -> None:
    """Encode this rank's chunks that have no shard yet."""
    try:
        bar, leading = None, 0
        for chunk in chunks(job.given):
            mine, exists = chunk.number % ranks.world == ranks.rank, shards.path(chunk.number).exists()
            if bar is None and exists:
                leading += len(chunk.texts)  # of an earlier run: no part of the rate
                continue
            bar = bar or tqdm(desc="encode", unit="text", total=found.rows, initial=leading, disable=not show)
            if mine and not exists:
                if shards.error_file.exists():
                    raise UserError(shards.error_file.read_text(encoding="utf-8"))
                _encode(job, encoder, facts, shards, chunk)
            bar.update(len(chunk.texts))
        if bar is not None:
            bar.close()
    except UserError as error:
        if ranks.world > 1:
            with contextlib.suppress(OSError):  # the others learn of it at the end
                replace_text(shards.error_file, str(error))
        raise


def _encode(job: Job, encoder: Encoder, facts: dict[str, Any], shards: Shards, chunk: Chunk) -> None:
    before = encoder.truncated
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)  # one for each chunk; counted in the shard
        vectors_ME = encoder.encode(
            [text or "" for text in chunk.texts], facts["instruction"], batch_tokens=job.batch_tokens,
            dimensions=facts["dimensions"], empty="zeros",
        )  # fmt: skip
    if not np.isfinite(vectors_ME).all():
        at = int(np.flatnonzero(~np.isfinite(vectors_ME).all(axis=1))[0])
        place = chunk.places[at]
        raise UserError(
            f"{place['file']}, row {place['row']}: its vector has NaN or Inf; use --precision fp32, or check the model"
        )
    shards.write(chunk, vectors_ME, column=job.vector_column, kept=_keeps(job), truncated=encoder.truncated - before)


def _keeps(job: Job) -> bool:
    return job.out.endswith(".parquet")


def _end(shards: Shards, found: Scan, facts: dict[str, Any], job: Job) -> list[str]:
    """Join the shards, check that every row is there once, and remove them."""
    if not _appears(lambda: all(shards.path(number).exists() for number in range(found.chunks))):
        raise UserError(f"{shards.folder}: a process ended before its part was finished; the same command resumes")
    rows = truncated = 0
    for number in range(found.chunks):
        table = shards.read(number)
        rows, truncated = rows + len(table), truncated + int(table.schema.metadata[b"truncated"])
    if rows != found.rows or stamps(job.given.file) != found.stamps:
        raise UserError(f"{job.given.file}: changed while it was encoded; run the command again, from scratch")
    notes = join(shards, found.chunks, job.vector_column, facts | {"truncated": truncated})
    shards.clear()
    if truncated:
        notes.append(
            f"{truncated:,} of {rows:,} texts are longer than {facts['length']} tokens and were cut; --length sets the limit"
        )
    if not _keeps(job):
        notes.append(f"{ids_file(shards.out)}: file, row and id of each vector")
    return notes
