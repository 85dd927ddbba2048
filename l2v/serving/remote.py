"""An engine behind a URL: vLLM, Text Embeddings Inference, or any server of an export with OpenAI's interface."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from l2v.errors import UserError, first_line
from l2v.serving.engines import BATCH, Encode, Facts

KEY = "OPENAI_API_KEY"
CUTS: tuple[dict[str, Any], ...] = ({}, {"truncate_prompt_tokens": -1}, {"truncate": True})
"""How a server is asked to cut texts: not at all (Text Embeddings Inference with --auto-truncate), by vLLM's key, or by the key
of others."""
TOO_LONG = (400, 413, 422)
"""The statuses with which servers refuse a text that is too long."""


class Endpoint:
    """URL or URL#MODEL. The client puts the prompts, since these servers have none, or no default one.

    precision: of the server's arithmetic, which it does not say.

    Raises:
        UserError: it is no URL.
    """

    def __init__(self, given: str, precision: str) -> None:
        self.name, self.precision = given, precision
        self.url, _, self.model = given.partition("#")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(f"--url {given}: no URL; give one such as http://127.0.0.1:8000/v1 or URL#MODEL")

    def missing(self) -> str | None:
        """Whether the client is installed."""
        return None if importlib.util.find_spec("openai") else "needs the package openai: pip install 'l2v[eval]'"

    def open(self, folder: Path) -> Encode:
        """A client of the server. Raises UserError: nothing answers there, or it is `l2v serve`."""
        import openai

        facts = Facts.read(folder)
        client = openai.OpenAI(base_url=self.url, api_key=os.environ.get(KEY) or "none", timeout=600)
        model = self.model or self._first(client, openai)

        def encode(texts: list[str], instruction: str | None) -> np.ndarray:
            prompt = facts.prompt(instruction)
            batches = [texts[at : at + BATCH] for at in range(0, len(texts), BATCH)]
            return np.concatenate([self._ask(client, openai, model, [prompt + text for text in b]) for b in batches])

        return encode

    def _first(self, client: Any, openai: Any) -> str:
        """The model that the server lists first; a server without a list has one model, and any name will do."""
        try:
            found = client.models.list().data
        except openai.APIStatusError:
            return "default"
        except openai.APIError as error:
            raise UserError(f"does not answer: {first_line(error)}") from None
        if found and found[0].owned_by == "l2v":
            raise UserError("l2v serve, which puts the template itself; --url is for other servers of the export")
        return found[0].id if found else "default"

    def _ask(self, client: Any, openai: Any, model: str, texts: list[str]) -> np.ndarray:
        """Vectors [texts, width] of one request, cut by the server if need be."""
        refused = ""
        for more in CUTS:
            try:
                reply = client.embeddings.create(input=texts, model=model, encoding_format="float", extra_body=more)
            except openai.APIStatusError as error:
                refused = refused or f"status {error.status_code}: {first_line(error)}"
                if error.status_code not in TOO_LONG:
                    break
                continue
            except openai.APIError as error:
                raise UserError(f"does not answer: {first_line(error)}") from None
            rows = [row.embedding for row in sorted(reply.data, key=lambda row: row.index)]
            if len(rows) != len(texts):
                raise UserError(f"asked for {len(texts)} vectors and got {len(rows)}")
            return np.asarray(rows, dtype=np.float32)
        raise UserError(refused)
