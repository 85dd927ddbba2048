"""The HTTP side: OpenAI's /v1/embeddings and /v1/models, and /health."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from l2v.encoder import Encoder
from l2v.serving.asked import Asked, Limits, Refused, read, tokenized
from l2v.serving.batcher import Batcher, Closed, Full

JSON = "application/json"
HUNG_UP = 499  # a client that nobody answers any more; the status is never sent
SIDES: tuple[Any, ...] = ("query", "document")


def make_app(
    encoder: Encoder, batcher: Batcher, *, name: str, limits: Limits, side: Any = None, truncate: bool = False,
    report: Callable[[str], None] = lambda sentence: None,
) -> FastAPI:  # fmt: skip
    """The application. name: of the model, as requests have to name it. side, truncate: for requests that do not say.

    report: receives a sentence, never with a text in it, on errors of this side.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    aside = ThreadPoolExecutor(1, "l2v tokens")
    instructions = {key: None if encoder.instructions.unclear(key) else encoder.instructions.one(key) for key in SIDES}

    def prepared(body: bytes) -> tuple[Asked, tuple[list[list[int]], list[int]]]:
        asked = read(body, name=name, width=encoder.dimension, limits=limits, side=side, truncate=truncate)
        if asked.side and (why := encoder.instructions.unclear(asked.side)):
            raise Refused(400, f"no instruction for input_type {asked.side}, because {why}", "input_type")
        return asked, tokenized(asked, encoder.tokenizer, instructions[asked.side] if asked.side else None, limits)

    async def answer(request: Request) -> Response:
        body = await _body(request, limits.body)
        # All in one thread: a tokenizer is not to be shared, and the loop stays free for other connections.
        asked, (ids, starts) = await asyncio.get_running_loop().run_in_executor(aside, prepared, body)
        try:
            queued = batcher.submit(ids, starts)
        except Full:
            raise Refused(429, "too many texts are waiting; try again in a second", code="queue_full") from None
        except Closed:
            raise Refused(503, "the server is shutting down", code="shutting_down") from None
        vectors_SE = await _result(request, batcher, queued)
        if vectors_SE is None:
            return Response(status_code=HUNG_UP)
        return Response(_answer(vectors_SE, asked, name, sum(map(len, ids)), encoder.normalize), media_type=JSON)

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        try:
            return await answer(request)
        except ClientDisconnect:
            return Response(status_code=HUNG_UP)
        except Refused as error:
            if error.status == 500:
                report(f"a request failed: {error.message}")
            raise
        except Exception as error:  # reported by its kind: uvicorn would print the message, which may hold a text
            report(f"a request failed: {type(error).__name__}")
            raise Refused(500, "an error of the server; its log has the kind") from None

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "l2v"}]}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {
            "status": "ok", "model": name, "dimensions": encoder.dimension, "max_length": encoder.max_length,
            "waiting_tokens": batcher.tokens,
        }  # fmt: skip

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        headers = {"retry-after": "1"} if error.status in (429, 503) else None
        return Response(error.body(), error.status, headers, JSON)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        paths = "POST /v1/embeddings, GET /v1/models and GET /health"
        message = f"{request.method} {request.url.path[:200]} does not exist; this server has {paths}"
        return Response(Refused(error.status_code, message).body(), error.status_code, error.headers, JSON)

    return app


async def _body(request: Request, most: int) -> bytes:
    """The body, never more of it in memory than allowed."""
    parts, size = [], 0
    stated = request.headers.get("content-length", "0")
    if stated.isdecimal() and int(stated) > most:
        raise Refused(413, f"the body has {int(stated):,} bytes; at most {most:,} are taken", code="body_too_large")
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise Refused(413, f"the body has more than {most:,} bytes", code="body_too_large")
        parts.append(part)
    return b"".join(parts)


async def _result(request: Request, batcher: Batcher, queued: Any) -> np.ndarray | None:
    """The vectors of a queued request; None if its client hangs up first, and then what waits of it is dropped."""
    done = asyncio.wrap_future(queued.done)
    gone = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            batcher.drop(queued)
            return None
        if error := done.exception():
            raise Refused(500, f"the model failed ({type(error).__name__}); try again, with fewer or shorter texts")
        return done.result()
    finally:
        gone.cancel()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _answer(vectors_SE: np.ndarray, asked: Asked, name: str, tokens: int, normalize: bool) -> bytes:
    vectors_SE = vectors_SE[:, : asked.dimensions]
    if normalize:
        lengths_S1 = np.linalg.norm(vectors_SE, axis=1, keepdims=True)
        vectors_SE = vectors_SE / np.maximum(lengths_S1, 1e-12)
    if not np.isfinite(vectors_SE).all():
        raise Refused(500, "a vector has NaN or Inf; the model may need --precision fp32")
    rows = vectors_SE.astype("<f4", copy=False)
    each = [base64.b64encode(row.tobytes()).decode() for row in rows] if asked.base64 else rows.tolist()
    data = [{"object": "embedding", "index": at, "embedding": value} for at, value in enumerate(each)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return json.dumps({"object": "list", "data": data, "model": name, "usage": usage}).encode()
