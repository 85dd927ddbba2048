"""A language model in transformers, on this machine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM

from l2v.batch import mix
from l2v.data.tokens import load_tokenizer
from l2v.errors import UserError, first_line
from l2v.model.embedded import resolve
from l2v.model.load import device, dtype_of
from l2v.synthesis.journal import Answer
from l2v.synthesis.wording import Question, query_of


class Local:
    """Answers a batch of questions at a time.

    Raises:
        UserError: if no causal language model can be loaded.
    """

    def __init__(self, model: str, *, retries: int, temperature: float, most_tokens: int) -> None:
        path = resolve(model)
        self.tokenizer = load_tokenizer(path)
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        try:
            loaded = AutoModelForCausalLM.from_pretrained(path, dtype=dtype_of("auto"), trust_remote_code=False)
        except Exception as error:
            raise UserError(f"{model}: no language model can be loaded: {first_line(error)}") from None
        self.model, self.retries = loaded.eval().to(device()), retries
        self.settings = {"max_new_tokens": most_tokens, "pad_token_id": self.tokenizer.pad_token_id}
        self.settings |= {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}

    @torch.inference_mode()
    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """One query for each question; after a malformed answer it samples again with another seed."""
        left, out, used = list(range(len(questions))), {}, [[0, 0] for _ in questions]
        for attempt in range(self.retries + 1):
            texts = [self._prompt(questions[at]) for at in left]
            batch = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
            batch = {key: batch[key].to(self.model.device) for key in ("input_ids", "attention_mask")}
            torch.manual_seed(mix(questions[left[0]].seed, attempt))
            ids = self.model.generate(**batch, **self.settings)[:, batch["input_ids"].shape[1] :]
            for at, answer, prompt in zip(left, ids, batch["attention_mask"].sum(1).tolist(), strict=True):
                used[at][0] += prompt
                used[at][1] += int((answer != self.tokenizer.pad_token_id).sum())
                text = self.tokenizer.decode(answer, skip_special_tokens=True)
                if query := query_of(text, questions[at].text):
                    out[at] = Answer(query, None, used[at][0], used[at][1], attempt + 1)
            left = [at for at in left if at not in out]
            if not left or not self.settings["do_sample"]:
                break  # greedy decoding would repeat the same answer
        return [
            out.get(at) or Answer(None, "malformed", used[at][0], used[at][1], attempt + 1)
            for at in range(len(questions))
        ]

    def _prompt(self, question: Question) -> str:
        if self.tokenizer.chat_template:
            return self.tokenizer.apply_chat_template(question.messages(), tokenize=False, add_generation_prompt=True)
        system, user = (message["content"] for message in question.messages())
        return f"{self.tokenizer.bos_token or ''}{system}\n\n{user}\n\nSøgning:"
