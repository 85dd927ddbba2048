"""A watchdog in every rank: it reports which rank died or hangs, and where, and ends the job.

Without it, a rank that dies or hangs leaves the others waiting in a collective until its timeout, with no message about the
cause. So every rank publishes where it is in a small store (torch's TCPStore, next to that of the process group), and a
thread on each rank checks its peers. If a peer is gone or stuck for too long, the reason is printed once and every rank ends
with `EXIT_FAULT`, after which `l2v train --restarts` and schedulers start the job again.

Peers on the same machine are looked up in the process table, which shows a death within a second or two; others are checked
by their heartbeat. Rank 0 checks the heartbeats of all ranks, and all others check that of rank 0, so the store serves
O(ranks) requests per interval. A rank's position (`at`) counts against the timeout only within the training loop, because
reading data may take hours.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

EXIT_FAULT = 75  # EX_TEMPFAIL of sysexits.h: try again
BEAT_SECONDS = 1.0  # between two checks
SILENT_SECONDS = 30.0  # without a heartbeat, after which a rank counts as gone
GRACE_SECONDS = 3.0  # after a rank ended, in which all others may turn out to have ended with it
SAVE_SECONDS = 10.0  # for a pending checkpoint to reach the disk before the process ends


@dataclass
class Beat:
    """A rank's published state. `age`: seconds since its last call of `at`, by its own clock; None outside the loop."""

    rank: int
    host: str
    pid: int
    count: int = 0
    where: str = "starting"
    age: float | None = None
    waits: bool = False
    stack: str = ""
    state: str = "runs"
    why: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The rank as messages name it."""
        return f"rank {self.rank} on {self.host} (process {self.pid})"


class Watchdog:
    """All ranks start it together (`start`), report progress (`at`) and end it together (`leave`).

    timeout: seconds that the training loop may stay at one position. silent: seconds without a heartbeat after which a rank
    counts as gone. on_fault: called in the watchdog's thread with the facts of the rank that failed, before this rank ends;
    last_words are called after that, each with the seconds that it may take.
    """

    def __init__(self, timeout: float, *, silent: float = SILENT_SECONDS) -> None:
        self.timeout, self.silent = timeout, silent
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.me = Beat(self.rank, socket.gethostname(), os.getpid())
        self.on_fault: list[Callable[[dict[str, Any]], None]] = []
        self.last_words: list[Callable[[float], None]] = []
        self._marked: float | None = None
        self._main = threading.main_thread().ident or 0
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._store: dist.TCPStore | None = None
        self._lock, self._answered = threading.Lock(), time.monotonic()
        self._peers: list[Beat] = []

    def start(self) -> Watchdog:
        """A collective call: opens the store and starts the thread."""
        if self.world > 1:
            where: list[Any] = [None]
            if self.rank == 0:
                store = dist.TCPStore(
                    os.environ.get("MASTER_ADDR", "127.0.0.1"), 0, is_master=True, wait_for_workers=False
                )
                where = [store.port]
            dist.broadcast_object_list(where, src=0)
            if self.rank:
                store = dist.TCPStore(
                    os.environ["MASTER_ADDR"], where[0], is_master=False, timeout=timedelta(seconds=60)
                )
            store.set_timeout(timedelta(seconds=max(5.0, self.silent / 3)))
            self._store = store
            self._publish()
            peers: list[Any] = [None] * self.world
            dist.all_gather_object(peers, (self.me.host, self.me.pid))
            self._peers = [Beat(rank, host, pid) for rank, (host, pid) in enumerate(peers)]
        self._thread = threading.Thread(target=self._watch, name="l2v-watchdog", daemon=True)
        self._thread.start()
        if self.rank:
            threading.Thread(target=self._watch_store, name="l2v-watchdog-store", daemon=True).start()
        return self

    def at(self, where: str | None) -> None:
        """Record where this rank is and start its timeout; None means no timeout for what follows."""
        self.me.where, self._marked = where or "between steps", None if where is None else time.monotonic()

    def pause(self) -> None:
        """Stop the timeout, but keep the position."""
        self._marked = None

    def failed(self, why: str, **facts: Any) -> None:
        """Publish that this rank has failed and why, for the others to report; this process ends by itself."""
        with self._lock:
            self.me.state, self.me.why, self.me.facts = "failed", why, facts
            self._publish()

    def verdict(self, seconds: float) -> None:
        """Wait for the watchdog to end this process; for a rank whose collective failed because of another rank."""
        if self._thread is not None and self.world > 1:
            self._thread.join(seconds)

    def crashed(self, error: Exception) -> int:
        """Handle an unexpected exception: print which rank raised it; returns the exit code.

        A failed collective is most often caused by another rank's death, and then the watchdog reports which.
        """
        frames = traceback.extract_tb(error.__traceback__)[-4:]
        if self.me.state == "runs" and any(_collective(frame.filename) for frame in frames):
            self.verdict(self.silent + 3 * GRACE_SECONDS)
        traceback.print_exception(error)
        if self.me.state == "runs":
            self.failed(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        print(f"l2v: {self.me.name} failed at {self.me.where}: {self.me.why}", file=sys.stderr, flush=True)
        time.sleep(3 * BEAT_SECONDS)  # the others still have to read why, and the store may live in this process
        return EXIT_FAULT

    def leave(self) -> None:
        """Stop watching, and publish that this rank ends as planned."""
        if self._thread is None or self._stopped.is_set():
            return
        with self._lock:
            self._stopped.set()
            if self.me.state == "runs":
                self.me.state = "left"
            self._publish()
        self._thread.join(timeout=5)

    def _publish(self) -> bool:
        """Write this rank's beat to the store; False if the store cannot be reached."""
        if self._store is None:
            return True
        self.me.count += 1
        self.me.age = None if self._marked is None else time.monotonic() - self._marked
        self.me.waits, self.me.stack = self._position() if (self.me.age or 0) > self.timeout / 2 else (False, "")
        try:
            self._store.set(f"beat/{self.rank}", json.dumps(vars(self.me)))
        except (RuntimeError, OSError):
            return False
        return True

    def _position(self) -> tuple[bool, str]:
        """Whether the main thread waits for other ranks, and its innermost line of this package."""
        frame = sys._current_frames().get(self._main)
        stack = traceback.extract_stack(frame) if frame else []
        waits = any(_collective(f.filename) for f in stack[-8:])
        own = [f for f in stack if "l2v" in f.filename.replace("\\", "/").split("/")]
        last = own[-1] if own else (stack[-1] if stack else None)
        return waits, f"{'/'.join(last.filename.split('/')[-3:])}:{last.lineno} in {last.name}" if last else ""

    def _watch(self) -> None:
        heard = {beat.rank: (beat.count, time.monotonic()) for beat in self._peers}
        dead_since: dict[int, float] = {}
        while not self._stopped.wait(BEAT_SECONDS):
            with self._lock:
                if self._stopped.is_set():
                    return
                reachable = self._publish()
            why, facts = self._check(reachable, heard, dead_since)
            self._answered = time.monotonic()
            if why and not self._stopped.is_set():
                self._end(why, facts, reachable)

    def _watch_store(self) -> None:
        """Detect a stopped rank 0, which holds the store: a request to it may block the other thread for ever."""
        while not self._stopped.wait(BEAT_SECONDS):
            quiet = time.monotonic() - self._answered
            if quiet > self.silent:
                gone = f"{self._peers[0].name} sent no heartbeat for {quiet:.0f} s"
                self._end(f"{gone}: its process is stopped or its machine is gone", {}, reachable=False)

    def _check(self, reachable: bool, heard: dict, dead_since: dict) -> tuple[str | None, dict[str, Any]]:
        """Why the job has to end, or None, and the facts of the rank that failed."""
        now = time.monotonic()
        if self.world == 1:
            age = None if self._marked is None else now - self._marked
            if age is not None and age > self.timeout:
                stack = self._position()[1]
                return f"no progress on rank 0 for {age:.0f} s at {self.me.where}, {stack}", {}
            return None, {}
        if reachable and self._store is not None:
            try:
                if self._store.check(["verdict"]):
                    return self._store.get("verdict").decode(), json.loads(self._store.get("facts").decode())
            except (RuntimeError, OSError):
                reachable = False
        beats = self._read(range(self.world) if self.rank == 0 else [0]) if reachable else []
        for beat in beats:
            self._peers[beat.rank] = beat
            if heard[beat.rank][0] != beat.count:
                heard[beat.rank] = (beat.count, now)
            if beat.state == "failed" and beat.rank != self.rank:
                return f"{beat.name} failed at {beat.where}: {beat.why}", beat.facts
        for peer in self._peers:
            if peer.rank == self.rank or peer.host != self.me.host or _alive(peer.pid):
                continue
            state = peer
            if reachable and (found := self._read([peer.rank])):
                (state,) = found
            if state.state == "failed":
                return f"{state.name} failed at {state.where}: {state.why}", state.facts
            if state.state == "left":
                continue
            if now - dead_since.setdefault(peer.rank, now) > GRACE_SECONDS:
                return (
                    f"{state.name} ended without a message at {state.where}: killed from outside, or out of host memory "
                    "(see dmesg)"
                ), {}
        watched = self._peers if self.rank == 0 else self._peers[:1]
        for peer in watched:
            quiet = now - heard[peer.rank][1]
            if peer.rank != self.rank and peer.state == "runs" and quiet > self.silent:
                return (
                    f"{peer.name} sent no heartbeat for {quiet:.0f} s, last at {peer.where}: its process is stopped or "
                    "its machine is gone"
                ), {}
        if self.rank == 0:
            return self._stuck(beats), {}
        return None, {}

    def _stuck(self, beats: list[Beat]) -> str | None:
        """A message about the ranks that made no progress for too long, without those that only wait for them; or None."""
        old = [b for b in beats if b.state == "runs" and b.age is not None and b.age > self.timeout]
        if not old:
            return None
        guilty = [b for b in old if not b.waits]
        if not guilty:
            running = [b for b in beats if b.state == "runs" and b.age is not None]
            if len(old) < len(running) and max(b.age or 0.0 for b in old) < 2 * self.timeout:
                return None  # the waiting ranks time out first; the rank they wait for follows soon
            guilty = old
        names = "; ".join(f"{b.name} at {b.where}, {b.stack}" for b in guilty[:4])
        more = f" and {len(guilty) - 4} more" if len(guilty) > 4 else ""
        age = max(b.age or 0.0 for b in old)
        return (
            f"no progress for {age:.0f} s (timeout {self.timeout:.0f} s), {len(old) - len(guilty)} of {self.world} ranks wait "
            f"for {names}{more}"
        )

    def _read(self, ranks) -> list[Beat]:
        if self._store is None:
            return []
        try:
            raw = self._store.multi_get([f"beat/{rank}" for rank in ranks])
        except (RuntimeError, OSError):
            return []
        return [Beat(**json.loads(value.decode())) for value in raw]

    def _end(self, why: str, facts: dict[str, Any], reachable: bool) -> None:
        """Print the reason once per job, finish pending writes, and end this process."""
        # If the store cannot be reached, rank 0 is gone or stopped.
        here = [p for p in self._peers if p.host == self.me.host and _alive(p.pid) and (reachable or p.rank)]
        speaks = self.rank == min((p.rank for p in here), default=self.rank)
        if reachable and self._store is not None:
            try:
                if not self._store.check(["verdict"]):
                    self._store.set("facts", json.dumps(facts))
                # The same value for all ranks: the first one that is written counts.
                speaks = self._store.compare_set("speaker", "", str(self.rank)).decode() == str(self.rank)
                self._store.compare_set("verdict", "", why)
            except (RuntimeError, OSError):
                pass
        if speaks:
            print(f"\nl2v: {why}; the job ends; the same command resumes from the newest checkpoint", file=sys.stderr)
            sys.stderr.flush()
        for call in self.on_fault:
            call(facts)
        for finish in self.last_words:
            finish(SAVE_SECONDS)
        if self.rank == 0 and self._store is not None:
            time.sleep(2 * BEAT_SECONDS)  # the store lives here, and the others still have to read why
        os._exit(EXIT_FAULT)


def _collective(file: str) -> bool:
    return "torch/distributed" in file or "deepspeed/comm" in file


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
