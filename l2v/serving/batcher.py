"""One thread that owns the model: texts of all requests, packed together to a token budget, first come first served."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass

import numpy as np
import torch

from l2v.batch import Segment, pack
from l2v.data.tokens import as_ids
from l2v.encoder import Encoder


class Full(Exception):
    """The queue has no room; a later try may succeed."""


class Closed(Exception):
    """The server is shutting down and takes no more texts."""


@dataclass(eq=False)
class Request:
    """The texts of one request. ids, starts: token ids and where pooling starts, of each text.

    vectors_SE: float32 [texts, E], not normalised, filled batch by batch; `done` has it once all are there.
    """

    ids: Sequence[Sequence[int]]
    starts: Sequence[int]
    vectors_SE: np.ndarray
    done: Future[np.ndarray]
    begun: int = 0
    finished: int = 0

    @property
    def waiting(self) -> int:
        """Tokens of the texts that no forward has taken yet."""
        return sum(len(ids) for ids in self.ids[self.begun :])


class Batcher:
    """The queue and its thread.

    batch_tokens: of one forward (a longer text runs alone). max_wait: seconds that a lone text may wait for company.
    max_queue_tokens: of the texts that wait; beyond them `submit` raises `Full`.
    """

    def __init__(
        self, encoder: Encoder, *, batch_tokens: int, max_wait: float, max_queue_tokens: int,
        report: Callable[[str], None] = lambda sentence: None,
    ) -> None:  # fmt: skip
        self.encoder, self.batch_tokens, self.max_wait = encoder, batch_tokens, max_wait
        self.max_queue_tokens, self.report = max_queue_tokens, report
        self.tokens = 0  # that wait
        self.batches = 0
        self._queue: deque[tuple[float, Request]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="l2v model", daemon=True)
        self._thread.start()

    def submit(self, ids: Sequence[Sequence[int]], starts: Sequence[int]) -> Request:
        """Queue texts; the result's `done` gives their vectors, or the error of the forward.

        Raises:
            Full: there is no room. A request that alone is larger than the queue is taken while nothing waits.
            Closed: the server is shutting down.
        """
        vectors_SE = np.empty((len(ids), self.encoder.dimension), np.float32)
        request = Request(ids, starts, vectors_SE, Future())
        with self._changed:
            if self._closing:
                raise Closed
            if self.tokens and self.tokens + request.waiting > self.max_queue_tokens:
                raise Full
            self.tokens += request.waiting
            self._queue.append((time.monotonic(), request))
            self._changed.notify()
        return request

    def drop(self, request: Request) -> None:
        """Forget the texts of a request that no forward has taken yet: nobody waits for them any more."""
        with self._changed:
            for entry in self._queue:
                if entry[1] is request:
                    self.tokens -= request.waiting
                    self._queue.remove(entry)
                    break
        request.done.cancel()

    def close(self) -> None:
        """Take no more texts, finish those that wait, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while taken := self._take():
            try:
                self._forward(taken)
            except Exception as error:  # the texts of this forward have no vectors; the server lives on
                self.report(f"a forward failed: {type(error).__name__}")  # its message may hold a text
                for request, _ in taken:
                    _fail(request, error)
                with self._changed:  # what waits of these requests has nobody to go to
                    failed = {id(request) for request, _ in taken}
                    self.tokens -= sum(r.waiting for _, r in self._queue if id(r) in failed)
                    self._queue = deque(entry for entry in self._queue if id(entry[1]) not in failed)

    def _take(self) -> list[tuple[Request, int]]:
        """The texts of the next forward, as (request, number of its text); none once the queue is closed and empty."""
        with self._changed:
            while True:
                if self._queue:
                    left = self._queue[0][0] + self.max_wait - time.monotonic()
                    if self.tokens >= self.batch_tokens or self._closing or left <= 0:
                        break
                    self._changed.wait(left)
                elif self._closing:
                    return []
                else:
                    self._changed.wait()
            taken: list[tuple[Request, int]] = []
            room = self.batch_tokens
            while self._queue:
                request = self._queue[0][1]
                while request.begun < len(request.ids):
                    tokens = len(request.ids[request.begun])
                    if taken and tokens > room:
                        return taken
                    taken.append((request, request.begun))
                    request.begun, room, self.tokens = request.begun + 1, room - tokens, self.tokens - tokens
                self._queue.popleft()
            return taken

    @torch.inference_mode()
    def _forward(self, taken: list[tuple[Request, int]]) -> None:
        segments = [Segment(as_ids(r.ids[at]), r.starts[at], text_key=0) for r, at in taken]
        batch = pack(segments).to(next(self.encoder.model.parameters()).device)
        vectors_SE = self.encoder.embed(batch).float().cpu().numpy()
        self.batches += 1
        for row_E, (request, at) in zip(vectors_SE, taken, strict=True):
            request.vectors_SE[at] = row_E
            request.finished += 1
            if request.finished == len(request.ids):
                with contextlib.suppress(InvalidStateError):  # its client has hung up
                    request.done.set_result(request.vectors_SE)


def _fail(request: Request, error: Exception) -> None:
    with contextlib.suppress(InvalidStateError):  # failed with another text, or its client has hung up
        request.done.set_exception(error)
