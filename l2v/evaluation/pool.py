"""One encoder in each of several processes, one GPU per process; texts are divided into pieces of similar length."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import multiprocessing

from l2v.encoder import Encoder
from l2v.errors import UserError, first_line

PIECE = 512  # texts: small enough that processes finish together, large enough to fill several packs


def by_length(texts: Sequence[str]) -> list[list[int]]:
    """Indices of the texts, longest first, in pieces; one empty piece if there are no texts."""
    order = sorted(range(len(texts)), key=lambda at: -len(texts[at]))
    return [order[at : at + PIECE] for at in range(0, len(order), PIECE)] or [[]]


class Loader(Protocol):
    """Can be pickled to another process, where it loads an encoder."""

    def load(self) -> Encoder: ...


class EncoderPool:
    """`encode` as an Encoder has it, over `processes` processes.

    A vector does not depend on the other texts of its pack, so the number of processes changes no result.

    Raises:
        UserError: if encoding fails in a process, with the first line of its error, or if a process dies.
    """

    def __init__(self, spec: Loader, processes: int) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA cannot be used in a forked process
        self.jobs, self.results = context.Queue(), context.Queue()
        self.processes = [
            context.Process(target=_work, args=(spec, rank, self.jobs, self.results), daemon=True)
            for rank in range(processes)
        ]
        for process in self.processes:
            process.start()

    def encode(
        self, texts: Sequence[str], pieces: Sequence[list[int]], **options: Any
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Each piece (indices into `texts`) with its vectors, float32 [piece, dimension], in the order they are done.

        options: those of `Encoder.encode`.
        """
        for number, piece in enumerate(pieces):
            self.jobs.put((number, [texts[at] for at in piece], options))
        for _ in pieces:
            number, vectors = self._next()
            yield pieces[number], vectors

    def _next(self) -> tuple[int, np.ndarray]:
        while True:
            try:
                number, vectors, failure = self.results.get(timeout=5)
            except queue.Empty:
                if all(process.is_alive() for process in self.processes):
                    continue
                code = next(process.exitcode for process in self.processes if not process.is_alive())
                self.close()
                raise UserError(f"an encoding process died with exit code {code}; try fewer --processes") from None
            if failure:
                self.close()
                raise UserError(f"an encoding process failed: {failure}")
            return number, vectors

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.terminate()
            process.join()


def _work(spec: Loader, rank: int, jobs: Any, results: Any) -> None:
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(rank % torch.cuda.device_count())
        else:
            torch.set_num_threads(1)
        encoder = spec.load()
    except BaseException as error:
        results.put((0, None, first_line(error)))
        return
    while True:
        number, texts, options = jobs.get()
        try:
            results.put((number, encoder.encode(texts, **options), None))
        except BaseException as error:
            results.put((number, None, first_line(error)))
