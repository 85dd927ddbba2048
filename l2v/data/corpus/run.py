"""A build from start to end, resumed after a kill.

Every slow step writes its result atomically: a chunk of rows, the mark of a finished source, the fates of all rows, a shard.
The same command finds these files and continues with the rest. `report.json` is written last.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from l2v.data.corpus import duplicates, leaks, report, shards
from l2v.data.corpus.chunk import Chunk, chunk_name, read_tally, start, work_on
from l2v.data.corpus.config import Build
from l2v.data.corpus.progress import Bar
from l2v.data.corpus.readers import Reader, Record, find_files, resolve
from l2v.data.corpus.tally import LOST, Tally
from l2v.data.reading import HALF
from l2v.errors import UserError
from l2v.files import replace_text
from l2v.recipe.load import to_dict

VERSION = 1
"""Version of the files in the work folder; a build of another version starts from scratch."""


class Run:
    """A build into `out` by `workers` processes."""

    def __init__(self, config: Build, out: Path, workers: int, *, keep_going: bool = False) -> None:
        """keep_going: take what is left of a source that loses more than half of its records."""
        self.config, self.out, self.workers, self.keep_going = config, out, workers, keep_going
        self.notes: list[str] = []
        self.work = out / ".work"
        self.errors: dict[int, str] = {}

    def build(self, *, fresh: bool = False) -> dict[str, Any]:
        """Write the data set, its report and its card; returns the report as plain values.

        A source that cannot be read to the end is named in the report, and the others are built.

        Raises:
            UserError: if nothing could be built, or if `out` holds something else.
        """
        self._claim()
        with self._locked():
            if fresh:
                self._clear()
                self._unlink_results()
            if done := self._finished():
                return done
            (self.work / "chunks").mkdir(exist_ok=True)
            for left in [*self.work.rglob("*.tmp"), *self.work.rglob("*.partial"), *self.out.glob("*.partial")]:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            sets = leaks.prepare(self.config.decontaminate, self.work / "leaks", self.config.folder)
            with self._pool() as submit:
                chunks = self._read(submit)
                if not chunks:
                    looked = f"; relative paths begin in {self.config.folder or Path.cwd()} (folder=...)"
                    raise UserError(
                        "; ".join(self.errors.values()) + looked if self.errors else "the sources hold no record"
                    )
                paths = [self.work / "chunks" / name for name in chunks]
                self._check_lost(paths)
                with Bar("gathering", len(paths), "chunk") as bar:
                    rows = duplicates.gather(paths, self.config, self.work / "rows", bar.add)
                near = self.config.near
                steps = 1 + (duplicates.bands(near.threshold, near.permutations)[0] if near else 0)
                with Bar("duplicates", steps, "pass") as bar:
                    fate, examples = duplicates.find(rows, self.config, bar.add)
                names = self.config.split_names()
                kept = duplicates.kept_by_chunk(rows, fate, len(names))
                plan = shards.plan(kept, names, self.config.shard, self.out)
                if not plan:
                    raise UserError(f"{self.config.name}: no row is left; {self._why(paths)}")
                self._write(plan, paths, submit)
            found = report.Found(self.config, self.errors, sets, rows, fate, kept, paths, examples)
            done = report.make(found)
            report.write(done, self.config, self.out)
            if not self.errors:
                self._clear(but=("state.json",))
            return done

    # existing files

    def _claim(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        ours = (self.out / "report.json").is_file() or self.work.is_dir()
        if not ours and any(self.out.iterdir()):
            raise UserError(f"{self.out}: the folder is not empty and holds no build; give another --out")
        self.work.mkdir(exist_ok=True)

    def _clear(self, but: tuple[str, ...] = ()) -> None:
        """Empty the work folder except for the lock, which is held."""
        for path in self.work.iterdir():
            if path.name not in ("lock", *but):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _unlink_results(self) -> None:
        for pattern in ("*-?????-of-?????.parquet", "report.json", "report.md", "README.md"):
            for path in self.out.glob(pattern):
                path.unlink()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.work / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"{self.out}: another build is writing there; wait for it, or give another --out"
                ) from None
            yield

    def _finished(self) -> dict[str, Any] | None:
        """The report of a finished build of these sources and keys; else None, with the state of this build written."""
        path, last = self.work / "state.json", self.out / "report.json"
        old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        done = json.loads(last.read_text(encoding="utf-8")) if last.is_file() else None
        stamps = self._resolve(old)
        keys = to_dict(self.config)
        keys.pop("out")
        held = [_stamp(held.path, self.config.folder) for held in self.config.decontaminate.sources]
        state = json.loads(json.dumps({"version": VERSION, "config": keys, "stamps": stamps, "held": held}))
        if done is not None and old == state and not any(s["error"] for s in done["sources"]):
            self._clear(but=("state.json",))  # files that a kill after the last step left behind
            return done | {"already": True}
        if done is None and not any((self.work / "chunks").glob("*.parquet")):
            self._clear()  # a build that failed on a wrong path has nothing to keep
            old = None
        if (done is not None and old is None) or (old is not None and not _same(old, state)):
            raise UserError(
                f"{self.out}: holds a build with other keys or other sources; use --fresh to build from scratch, or another --out"
            )
        if old is not None and (done is not None or old["stamps"] != stamps):
            self._again()
        _write_json(path, state)
        return None

    def _again(self) -> None:
        """Remove the incomplete chunks of a source that could not be read to the end, and all later results."""
        self._unlink_results()
        shutil.rmtree(self.work / "rows", ignore_errors=True)
        for mark in self.work.glob("s*.done.json"):
            source = json.loads(mark.read_text(encoding="utf-8"))
            if source["error"]:
                number = int(mark.name[1:4])
                for path in (self.work / "chunks").glob(f"s{number:03d}-*.parquet"):
                    if int(path.stem.partition("-")[2]) >= source["records"] // self.config.chunk:
                        path.unlink()
                mark.unlink()

    def _resolve(self, old: dict[str, Any] | None) -> list[Any]:
        """Resolve every source; returns stamps that change with its files, None for a source that does not exist.

        A Hub data set that an earlier start resolved keeps its revision and needs no network.
        """
        stamps: list[Any] = []
        sources = []
        folder = self.config.folder
        for number, source in enumerate(self.config.sources):
            try:
                if old is not None and len(old["stamps"]) > number and source.path.startswith("hub:"):
                    source = replace(source, revision=source.revision or old["config"]["sources"][number]["revision"])
                source, notes = resolve(source, folder, self.config.kind)
                self.notes += notes
                files = [
                    Reader(source, folder).stamp(),
                    *(_stamp(p, folder) for p in (*source.packages, *source.english)),
                ]
                if None in files:
                    raise UserError(f"{source.path}: one of its `packages` or `english` files does not exist")
                stamps.append(files)
            except UserError as error:
                self.errors[number] = str(error)
                stamps.append(None)
            sources.append(source)
        self.config = replace(self.config, sources=sources)
        return stamps

    # reading

    @contextlib.contextmanager
    def _pool(self) -> Iterator[Callable[..., Future]]:
        if self.workers == 1:
            start(self.config, self.work)
            yield _here
            return
        pool = ProcessPoolExecutor(
            self.workers, get_context("spawn"), initializer=start, initargs=(self.config, self.work)
        )
        try:
            yield pool.submit
        except BrokenProcessPool:
            raise UserError(
                "a worker was killed, perhaps because memory ran out; run the same command again to resume, if needed with "
                "fewer --workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self, submit: Callable[..., Future]) -> list[str]:
        """Every chunk of every source, in order; existing chunks are kept."""
        names: list[str] = []
        with Bar("reading", None, "record") as bar:
            for number in range(len(self.config.sources)):
                names += self._read_source(number, submit, bar)
        return names

    def _read_source(self, number: int, submit: Callable[..., Future], bar: Bar) -> list[str]:
        mark = self.work / f"s{number:03d}.done.json"
        if mark.is_file():
            source = json.loads(mark.read_text(encoding="utf-8"))
            if source["error"]:
                self.errors[number] = source["error"]
            bar.skip(source["records"])
            return [chunk_name(number, i) for i in range(source["chunks"])]
        if number in self.errors:
            bar.log(f"skipped: {self.errors[number]}")
            return []
        waiting: set[Future] = set()
        records: list[Record] = []
        error: str | None = None
        size, count = self.config.chunk, 0

        def send() -> None:
            index = (count - 1) // size
            if not (self.work / "chunks" / chunk_name(number, index)).is_file():
                while len(waiting) >= 2 * self.workers:  # the reader stays at most a few chunks ahead
                    done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                    waiting.difference_update(done)
                    for future in done:
                        future.result()
                waiting.add(submit(work_on, Chunk(number, index, index * size + 1, records)))

        reader = Reader(self.config.sources[number], self.config.folder)
        try:
            for record in reader:
                records.append(record)
                count += 1
                if len(records) == size:
                    send()
                    bar.reading(len(records), (number, len(self.config.sources)), reader.progress())
                    records = []
        except UserError as broken:
            error = str(broken)
            self.errors[number] = error
            bar.log(error)
        if records:
            send()
            bar.reading(len(records), (number, len(self.config.sources)), 1.0)
        for future in waiting:
            future.result()
        chunks = -(-count // size)
        _write_json(mark, {"records": count, "chunks": chunks, "error": error})
        return [chunk_name(number, i) for i in range(chunks)]

    def _check_lost(self, paths: list[Path]) -> None:
        """Name each source of whose records more than half cannot be read: most often its format or encoding is another."""
        for number, source in enumerate(self.config.sources):
            tally = Tally()
            for path in paths:
                if int(path.name[1:4]) == number:
                    tally.add(read_tally(path))
            lost = sum(tally.dropped[reason] for reason in LOST)
            if not self.keep_going and number not in self.errors and lost > HALF * tally.records:
                first = next(iter(tally.examples.get("malformed") or tally.examples.get("encoding") or [["", ""]]))[-1]
                self.errors[number] = (
                    f"{source.path}: {lost:,} of {tally.records:,} records cannot be read; the first: {first} (fix the file or "
                    "the columns, or take the rest with --keep-going)"
                )

    def _write(self, plan: list[shards.Shard], paths: list[Path], submit: Callable[..., Future]) -> None:
        with Bar("writing", sum(s.count for s in plan), "row") as bar:
            futures = {}
            for shard in plan:
                if shard.path.is_file():
                    bar.add(shard.count)
                    continue
                own = paths[shard.begin : shard.end]
                futures[submit(shards.write, shard, self.config.kind, self.work / "rows", own)] = shard
                if self.workers == 1:
                    bar.add(shard.count)
            if self.workers > 1:
                for future in list(futures):
                    future.result()
                    bar.add(futures[future].count)

    def _why(self, paths: list[Path]) -> str:
        total = Tally()
        for path in paths:
            total.add(read_tally(path))
        reasons = [f"{n} {reason}" for reason, n in total.dropped.most_common(3)]
        return f"of {total.records} records: {', '.join(reasons) or 'none dropped'}"


def _here(function: Callable[..., Any], *arguments: Any) -> Future:
    future: Future = Future()
    future.set_result(function(*arguments))
    return future


def _stamp(path: str, folder: str | None) -> list[Any] | None:
    """Name, size and time of the files of a path; None if there are none, an empty list for hub and mteb names."""
    if path.startswith(("hub:", "mteb:")):
        return []
    try:
        return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in find_files(path, folder)]
    except UserError:
        return None


def _same(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether a restart may continue: nothing changed, except that a missing source may exist now."""
    if old["version"] != new["version"] or old["held"] != new["held"] or len(old["stamps"]) != len(new["stamps"]):
        return False
    for one, two in zip(old["stamps"], new["stamps"], strict=True):
        if one is not None and two is not None and one != two:
            return False
    strip = [json.loads(json.dumps(state["config"])) for state in (old, new)]
    for keys in strip:
        for source in keys["sources"]:
            source["format"] = source["revision"] = None  # resolved later
    return strip[0] == strip[1]


def _write_json(path: Path, value: Any) -> None:
    replace_text(path, json.dumps(value, ensure_ascii=False))
