"""Any OpenAI-compatible chat endpoint: vLLM, llama.cpp, a company's gateway, or a provider."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

from l2v.batch import mix
from l2v.errors import UserError
from l2v.synthesis.journal import Answer
from l2v.synthesis.wording import Question, query_of

WAIT = 0.5  # seconds before the second try; doubled for each further try
LONGEST_WAIT = 30.0


class Failed(Exception):
    """No answer, but a later try may succeed: server errors, time-outs, a lost connection."""


class Endpoint:
    """Asks one question at a time; may be used from several threads.

    url: with its version, for example http://127.0.0.1:8000/v1. The key is read from the environment variable `key_name`,
    sent to the endpoint and never printed; an endpoint that needs none gets a placeholder.

    Raises:
        UserError: if the package openai is not installed, if the endpoint refuses the key, or does not know the
            model.
    """

    def __init__(
        self, url: str, model: str, *, key_name: str, retries: int, timeout: float, temperature: float, most_tokens: int
    ) -> None:
        try:
            import openai
        except ImportError:
            raise UserError("--endpoint needs the package openai: pip install 'l2v[synthesize]'") from None
        if not url.startswith(("http://", "https://")):
            raise UserError(f"--endpoint {url}: give a URL that begins with http:// or https://")
        self._key = os.environ.get(key_name) or ""
        # We retry ourselves: one rule for errors, time-outs and malformed answers.
        self._client = openai.OpenAI(base_url=url, api_key=self._key or "none", max_retries=0, timeout=timeout)
        self._library, self.url, self.model, self.key_name, self.retries = openai, url, model, key_name, retries
        self._settings = {"temperature": temperature, "max_tokens": most_tokens}

    def ask(self, question: Question) -> Answer:
        """One query, after up to `retries` further tries.

        Raises:
            Failed: if no try succeeded.
            UserError: if no question can succeed: a rejected key, an unknown model.
        """
        prompt_tokens = completion_tokens = 0
        for attempt in range(self.retries + 1):
            last = attempt == self.retries
            try:
                reply = self._client.chat.completions.create(
                    model=self.model,
                    messages=question.messages(),
                    seed=mix(question.seed, attempt) % 2**31,
                    **self._settings,
                )
                text, used = _read(reply)
            except (self._library.AuthenticationError, self._library.PermissionDeniedError) as error:
                raise UserError(
                    f"{self.url}: rejects the key ({error.status_code}); set the environment variable {self.key_name}"
                ) from None
            except self._library.NotFoundError:
                raise UserError(
                    f"{self.url}: unknown model '{self.model}', or the URL has no chat completions (404)"
                ) from None
            except (self._library.BadRequestError, self._library.UnprocessableEntityError):
                return Answer(None, "refused", prompt_tokens, completion_tokens, attempt + 1)
            except self._library.APIStatusError as error:
                if last:
                    raise Failed(f"status {error.status_code}") from None
                self._pause(question, attempt, error.response.headers.get("retry-after"))
                continue
            except (self._library.APITimeoutError, self._library.APIConnectionError) as error:
                if last:
                    raise Failed(
                        "a time-out" if isinstance(error, self._library.APITimeoutError) else "no connection"
                    ) from None
                self._pause(question, attempt)
                continue
            except (self._library.APIError, ValueError, TypeError, AttributeError):  # a malformed reply
                text, used = None, (0, 0)
            prompt_tokens, completion_tokens = prompt_tokens + used[0], completion_tokens + used[1]
            if query := query_of(text, question.text):
                return Answer(query, None, prompt_tokens, completion_tokens, attempt + 1)
            if not last:
                self._pause(question, attempt)
        return Answer(None, "malformed", prompt_tokens, completion_tokens, self.retries + 1)

    def _pause(self, question: Question, attempt: int, asked: str | None = None) -> None:
        # Random delays, or all threads that were rejected together would retry together.
        spread = 0.5 + mix(question.seed, attempt, 1) % 1024 / 1024
        wait = WAIT * 2**attempt * spread
        with contextlib.suppress(ValueError):  # a date, which few servers send
            wait = max(wait, float(asked or 0))
        time.sleep(min(wait, LONGEST_WAIT))


def _read(reply: Any) -> tuple[str | None, tuple[int, int]]:
    """Text and (prompt, completion) tokens of a reply.

    Raises:
        TypeError: or AttributeError or ValueError, if it is malformed.
    """
    usage = getattr(reply, "usage", None)
    prompt, completion = (int(getattr(usage, name, 0) or 0) for name in ("prompt_tokens", "completion_tokens"))
    choices = getattr(reply, "choices", None) or []
    choice = choices[0] if choices else None
    if choice is None or choice.finish_reason == "length":  # truncated: half a query
        return None, (prompt, completion)
    return choice.message.content, (prompt, completion)
