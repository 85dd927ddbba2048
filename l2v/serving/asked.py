"""The body of a request to /v1/embeddings, checked; and errors in the form that OpenAI's clients read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from l2v.data.tokens import TextTokenizer
from l2v.errors import UserError

KINDS = {400: "invalid_request_error", 404: "invalid_request_error", 413: "invalid_request_error",
         429: "rate_limit_error", 500: "server_error", 503: "server_error"}  # fmt: skip
KEYS = {"input", "model", "encoding_format", "dimensions", "user", "input_type", "truncate"}


class Refused(Exception):
    """A request that is not answered. status: of HTTP; param: the key that is wrong; code: a word for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> bytes:
        """The error as OpenAI writes it."""
        kind = KINDS.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()  # escaped: what was sent may be half of a surrogate pair


@dataclass(frozen=True)
class Limits:
    """inputs, tokens: of one request. body: bytes. dimensions: that may be asked for, besides all of them."""

    inputs: int = 2048
    tokens: int = 300_000
    body: int = 16 << 20
    dimensions: tuple[int, ...] = ()


@dataclass(frozen=True)
class Asked:
    """What a request asks for. inputs: texts, or token ids of texts. side: whose instruction; None for none."""

    inputs: Sequence[str | list[int]]
    base64: bool
    dimensions: int | None
    side: Literal["query", "document"] | None
    truncate: bool


def read(body: bytes, *, name: str, width: int, limits: Limits, side: Any = None, truncate: bool = False) -> Asked:
    """A request's body. name: of the model. width: of its vectors. side, truncate: where the request does not say.

    Raises:
        Refused: it is no valid request; the message says what would be.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not valid JSON") from None
    if not isinstance(asked, dict):
        raise Refused(400, "the body has to be a JSON object with input and model")
    if unknown := sorted(set(asked) - KEYS):
        raise Refused(400, f"unknown key '{unknown[0]}'; known: {', '.join(sorted(KEYS))}", unknown[0], "unknown_key")
    model = asked.get("model")
    if not isinstance(model, str):
        raise Refused(400, f"model is missing or no text; this server has '{name}'", "model")
    if model != name:
        raise Refused(
            404, f"the model '{model[:100]}' does not exist; this server has '{name}'", "model", "model_not_found"
        )
    form = asked.get("encoding_format") or "float"
    if form not in ("float", "base64"):
        raise Refused(400, "encoding_format is float or base64", "encoding_format")
    if (given := asked.get("input_type")) is not None:
        if given not in ("query", "document"):
            raise Refused(400, "input_type is query or document", "input_type")
        side = given
    if (cut := asked.get("truncate")) is not None:
        if not isinstance(cut, bool):
            raise Refused(400, "truncate is true or false", "truncate")
        truncate = cut
    return Asked(
        _inputs(asked, limits), form == "base64", _dimensions(asked.get("dimensions"), width, limits), side, truncate
    )


def _dimensions(value: Any, width: int, limits: Limits) -> int | None:
    if value is None or (value == width and not isinstance(value, bool)):
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value not in limits.dimensions:
        known = ", ".join(map(str, sorted({*limits.dimensions, width})))
        raise Refused(400, f"this model was trained for vectors of these dimensions: {known}", "dimensions")
    return value


def _inputs(asked: dict[str, Any], limits: Limits) -> list[str | list[int]]:
    value = asked.get("input")
    if isinstance(value, str) or (isinstance(value, list) and value and all(type(item) is int for item in value)):
        value = [value]
    if not isinstance(value, list) or not value:
        raise Refused(400, "input is a text, a list of texts, token ids or a list of these, and not empty", "input")
    if len(value) > limits.inputs:
        raise Refused(413, f"{len(value):,} inputs in one request; at most {limits.inputs:,} are taken", "input")
    kind = type(value[0])
    for at, item in enumerate(value):
        if kind not in (str, list) or type(item) is not kind:
            raise Refused(400, f"input {at} is neither a text nor token ids, or inputs are mixed", "input")
        if isinstance(item, str):
            _check_text(item, at)
        elif not item or not all(type(token) is int for token in item):
            raise Refused(400, f"input {at} is an empty list, or its token ids are not whole numbers", "input")
    return value


def _check_text(text: str, at: int) -> None:
    if not text.strip():
        raise Refused(400, f"input {at} is empty; an empty text has no embedding", "input")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refused(400, f"input {at} holds half of a surrogate pair, which is no text", "input") from None


def tokenized(
    asked: Asked, tokenizer: TextTokenizer, instruction: str | None, limits: Limits
) -> tuple[list[list[int]], list[int]]:
    """Token ids of the inputs in the model's template, and where each is pooled from.

    Raises:
        Refused: a text is too long, all together are, or token ids are not those of a text.
    """
    texts = [text if isinstance(text, str) else _text(text, tokenizer, at) for at, text in enumerate(asked.inputs)]
    try:
        ids, starts, cut = tokenizer.embedded(texts, instruction)
    except UserError as error:
        raise Refused(400, str(error), "input") from None
    if cut and not asked.truncate:
        message = f"{cut} of {len(texts)} inputs are longer than {tokenizer.length} tokens; shorten them, or set truncate: true"
        raise Refused(413, message, "input", "context_length_exceeded")
    if (tokens := sum(map(len, ids))) > limits.tokens:
        message = f"{tokens:,} tokens in one request; at most {limits.tokens:,} are taken"
        raise Refused(413, message, "input", "too_many_tokens")
    return ids, starts


def _text(ids: Sequence[Any], tokenizer: TextTokenizer, at: int) -> str:
    """The text whose token ids these are: the template goes around a text, and another model's ids would mean another one."""
    inner = tokenizer.tokenizer
    try:
        text = inner.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        same = min(ids) >= 0 and max(ids) < len(inner) and tokenizer.plain([text])[0] == list(ids)
    except (OverflowError, TypeError, ValueError):
        same = False
    if not same or not text.strip():
        message = f"input {at}: these are not the ids of a text in this model's tokenizer (without special tokens); send the text"
        raise Refused(400, message, "input")
    return text
