"""Any endpoint with OpenAI's embeddings interface as a row: `l2v serve`, vLLM, TEI, or a provider."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from mteb.models.abs_encoder import AbsEncoder, get_prompt_name
from mteb.models.instruct_wrapper import InstructSentenceTransformerModel
from mteb.models.model_implementations import MODEL_REGISTRY

from l2v.encoder import nonempty
from l2v.errors import UserError, first_line
from l2v.evaluation.model import model_meta

KEY = "OPENAI_API_KEY"
TEXTS = 64  # in one request
TRIES = 6  # the client waits between them, longer each time, and as long as the server asks


class EndpointBaseline(AbsEncoder):
    """mteb's encoder around URL#MODEL; texts get the prompts of mteb's metadata, if mteb knows the model by this name.

    An endpoint does not say which weights it has: results are kept by URL and model, and `--again` recomputes them.

    Raises:
        UserError: the package openai is missing, or the endpoint does not answer a first text.
    """

    batch = 1024

    def __init__(self, name: str) -> None:
        try:
            import openai
        except ImportError:
            raise UserError(f"--baselines {name}: needs the package openai: pip install 'l2v[eval]'") from None
        self.url, _, self.served = name.partition("#")
        if not self.served:
            raise UserError(f"--baselines {name}: give URL#MODEL, such as http://127.0.0.1:8000/v1#my-encoder")
        self._library = openai
        key = os.environ.get(KEY) or "none"
        self._client = openai.OpenAI(base_url=self.url, api_key=key, max_retries=TRIES, timeout=600)
        meta = MODEL_REGISTRY.get(self.served)
        options = dict(meta.loader_kwargs) if meta else {}
        self.instruction_template = options.get("instruction_template")
        self.model_prompts = options.get("model_prompts")
        self.prompts_dict = options.get("prompts_dict")
        self._instructed = meta is not None and meta.loader is InstructSentenceTransformerModel
        self._passages = bool(options.get("apply_instruction_to_passages", True))
        self.name, self.empty = self.served, 0
        self.width = len(self._ask(["prøve"])[0])
        self.identity = {
            "endpoint": self.url, "baseline": self.served, "dimension": self.width, "prompts": self.model_prompts,
            "template": str(self.instruction_template) if self._instructed else None,
        }  # fmt: skip
        self.mteb_model_meta = model_meta(f"l2v/{self.served.replace('/', '-')}", self.identity)

    def encode(self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **_: Any) -> np.ndarray:
        """Vectors of the texts in a loader of batches: float32 [texts, dimension], in order; zeros for an empty text."""
        texts = [text for batch in inputs for text in batch["text"]]
        before = self._prompt(task_metadata, prompt_type)
        full = nonempty(texts, "zeros")
        self.empty += len(texts) - len(full)
        out = np.zeros((len(texts), self.width), np.float32)
        for begin in range(0, len(full), TEXTS):
            rows = full[begin : begin + TEXTS]
            out[rows] = self._ask([before + texts[at] for at in rows])
        return out

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _prompt(self, task_metadata: Any, prompt_type: Any) -> str:
        """What is put before each text; "" for nothing."""
        if self._instructed:
            if prompt_type and prompt_type.value == "document" and not self._passages:
                return ""
            return self.get_task_instruction(task_metadata, prompt_type) or ""
        if not self.model_prompts:
            return ""
        return self.model_prompts.get(get_prompt_name(self.model_prompts, task_metadata, prompt_type), "")

    def _ask(self, texts: Sequence[str]) -> np.ndarray:
        where = f"{self.url}#{self.served}"
        try:
            reply = self._client.embeddings.create(input=list(texts), model=self.served)
            rows = [row.embedding for row in sorted(reply.data, key=lambda row: row.index)]
            vectors_SE = np.asarray(rows, np.float32)
        except self._library.APIStatusError as error:
            raise UserError(f"{where}: status {error.status_code}: {first_line(error)}") from None
        except self._library.APIError as error:
            raise UserError(f"{where}: does not answer: {first_line(error)}") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{where}: its answer is not one of vectors: {first_line(error)}") from None
        if vectors_SE.shape[:1] != (len(texts),) or vectors_SE.ndim != 2 or not np.isfinite(vectors_SE).all():
            raise UserError(f"{where}: asked for {len(texts)} vectors and got {list(vectors_SE.shape)}, or NaN")
        return vectors_SE
