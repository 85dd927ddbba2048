"""The process: a socket that is bound before the model loads, uvicorn, and an end that loses nothing it has accepted."""

from __future__ import annotations

import os
import signal
import socket
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
import uvicorn

from l2v.encoder import Encoder
from l2v.errors import UserError
from l2v.serving.app import make_app
from l2v.serving.asked import Limits
from l2v.serving.batcher import Batcher

BACKLOG = 2048


@dataclass(frozen=True)
class Settings:
    """name: of the model in requests. max_wait_ms: of a lone text. side, truncate: for requests that do not say.

    threads: of the model on a CPU; None for all cores but one, which HTTP has.
    """

    name: str
    batch_tokens: int = 16384
    max_wait_ms: float = 5.0
    max_queue_tokens: int = 1 << 20
    limits: Limits = field(default_factory=Limits)
    side: Any = None
    truncate: bool = False
    threads: int | None = None


def bound(host: str, port: int) -> socket.socket:
    """A listening socket. port 0: any that is free.

    Raises:
        UserError: the port is taken or not allowed, or the host is none of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"--host {host} --port {port}: {why}; choose another --port, or 0 for any that is free"
        ) from None
    return found


def serve(encoder: Encoder, listening: socket.socket, settings: Settings) -> None:
    """Answer requests until SIGTERM or SIGINT; those that were accepted are answered before it returns."""
    if not torch.cuda.is_available():
        torch.set_num_threads(settings.threads or max(1, len(os.sched_getaffinity(0)) - 1))
    batcher = Batcher(
        encoder, batch_tokens=settings.batch_tokens, max_wait=settings.max_wait_ms / 1000,
        max_queue_tokens=settings.max_queue_tokens, report=_report,
    )  # fmt: skip
    app = make_app(
        encoder, batcher, name=settings.name, limits=settings.limits, side=settings.side, truncate=settings.truncate,
        report=_report,
    )  # fmt: skip
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", server_header=False)
    server = uvicorn.Server(config)

    def stop(*_: Any) -> None:
        server.should_exit = True

    # uvicorn sends the signal that ended it once more, to the handler that it found: this one lets the process end by itself.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    host, port = listening.getsockname()[:2]
    print(f"'{settings.name}' at http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
    try:
        server.run(sockets=[listening])
    finally:
        batcher.close()
    _report("stopped; every accepted request was answered")


def _report(sentence: str) -> None:
    print(f"l2v: {sentence}", file=sys.stderr, flush=True)
