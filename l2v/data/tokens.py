"""Text to token ids: templates, instructions, truncation, and where pooling starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Literal

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from l2v.errors import RecipeError, UserError, first_line
from l2v.recipe import Base, Template
from l2v.recipe.safety import code_refused, needs_code


def load_tokenizer(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """A fast tokenizer (its offsets separate the text from the template).

    trust_remote_code: the caller's own permission to run code that comes with it.

    Raises:
        UserError: it cannot be loaded, has no fast version, or needs code that the caller does not allow.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        if needs_code(error):
            auto_map = get_tokenizer_config(path, revision=revision).get("auto_map")
            raise UserError(code_refused(path, auto_map if isinstance(auto_map, dict) else None)) from None
        raise UserError(f"{path}: no tokenizer can be loaded: {first_line(error)}") from None
    if not tokenizer.is_fast:
        raise UserError(f"{path}: its tokenizer has no fast version; convert it to a tokenizer.json first")
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, base: Base, trained: Collection[str] = ()) -> None:
    """Check that the base has an embedding for every token that a text can have.

    A padding token beyond them is harmless, because nothing is padded.

    rows: of its embedding. trained: tokens that get a row of their own (lora.trainable_tokens).

    Raises:
        UserError: it does not.
    """
    known = {*trained, tokenizer.pad_token}
    beyond = {token: id for token, id in tokenizer.get_vocab().items() if id >= rows and token not in known}
    if beyond:
        token, id = max(beyond.items(), key=lambda item: item[1])
        raise UserError(
            f"the tokenizer of '{base.tokenizer or base.model}' has {len(beyond):,} tokens (such as '{token}', id {id:,}) for "
            f"which the base '{base.model}', an embedding of {rows:,} rows, has no vector; use the tokenizer that belongs "
            "to the base (base.tokenizer), or train vectors for them (lora.trainable_tokens)"
        )


def token_ids(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """The ids of tokens, each named as it stands in the vocabulary.

    Raises:
        RecipeError: one is no token of the tokenizer.
    """
    vocabulary = tokenizer.get_vocab()
    if missing := [token for token in tokens if token not in vocabulary]:
        raise RecipeError(
            f"lora.trainable_tokens: {', '.join(repr(token) for token in missing)} is no token of the tokenizer; add it with "
            "its add_tokens, save the tokenizer, and name that folder in base.tokenizer"
        )
    return [vocabulary[token] for token in tokens]


Pooled = Literal["text", "all", "unprompted"]


class TextTokenizer:
    """Turns texts into ids, in the two forms that stages need.

    Documents (MNTP) are the plain text with the special tokens that the tokenizer itself adds. Embedded texts are put
    into the base's template: prefix + instruction + text + suffix, tokenised as one string. Character offsets show which
    tokens belong to the text, so no marker inside it is needed.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: Template, length: int, *, pooled: Pooled = "text"
    ) -> None:
        """pooled: which tokens are pooled. text: the text's own and those behind them. all: special tokens, header and
        instruction too; unprompted: these only without header and instruction, counted as sentence-transformers counts them.
        """
        self.tokenizer, self.template, self.length, self.pooled = tokenizer, template, length, pooled

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, base: Base, length: int) -> TextTokenizer:
        """With the template of a base, and pooled as it says."""
        return cls(tokenizer, base.template, length, pooled="all" if base.pool_prompt else "text")

    def fingerprint(self) -> str:
        """A hash of everything that changes the ids, or from where they are pooled."""
        facts = [self.tokenizer.backend_tokenizer.to_str(), asdict(self.template), self.length, self.pooled, "space"]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of whole documents, BOS first where the tokenizer has one; never truncated (blocks cut them)."""
        return self.tokenizer(list(texts), verbose=False)["input_ids"]

    def embedded(self, texts: Sequence[str], instruction: str | None = None) -> tuple[list[list[int]], list[int], int]:
        """Ids, the position from which each is pooled, and how many texts were truncated to `length` tokens.

        Spaces at the end of a header count to the text: most words have a token with the space before them, and where one has
        not (digits, emoji), pooling begins at the same position, as in engines that exclude a fixed number of tokens.
        """
        header = self.header(instruction)
        shown, prompted = len(header.rstrip(" ")), self._prompted(header)
        strings = [header + text.strip() + self.template.suffix for text in texts]
        encoded = self.tokenizer(strings, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
        out, starts, cut = [], [], 0
        for string, ids, offsets, special in zip(
            strings, encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True
        ):
            begin, end = len(header), len(string) - len(self.template.suffix)
            real = [i for i, (a, b) in enumerate(offsets) if b > a or not special[i]]
            start = next((i for i in real if offsets[i][1] > shown), len(ids))
            first = next((i for i in real if offsets[i][1] > begin), len(ids))
            stop = next((i for i in real if i >= first and offsets[i][0] >= end), real[-1] + 1 if real else len(ids))
            over = len(ids) - self.length
            if over > 0:
                if over >= stop - start:
                    raise RecipeError(
                        f"length {self.length} leaves no room for the text: template and instruction take "
                        f"{len(ids) - (stop - start)} tokens; raise length or shorten the instruction"
                    )
                ids = ids[: stop - over] + ids[stop:]
                cut += 1
            out.append(ids)
            starts.append({"text": start, "all": 0}.get(self.pooled, min(prompted, len(ids) - 1)))
        return out, starts, cut

    def _prompted(self, header: str) -> int:
        """How many tokens sentence-transformers leaves out for a prompt: those of the prompt alone, less one special at its end.

        Behind a space, which is a token of its own there, that is one too many where the text's first token has the space in it.
        """
        ids = self.tokenizer(header, verbose=False)["input_ids"] if header else []
        return len(ids) - bool(ids and ids[-1] in self.tokenizer.all_special_ids)

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of the texts alone: no template, no special tokens, never truncated."""
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def overhead(self) -> int:
        """Tokens that the template and the tokenizer's special tokens add to a text without an instruction."""
        ids = self.tokenizer(f"{self.template.prefix}a{self.template.suffix}", verbose=False)["input_ids"]
        return len(ids) - len(self.plain(["a"])[0])

    def header(self, instruction: str | None) -> str:
        """What precedes the text: the template's prefix and the instruction, if any."""
        return self.template.prefix + (self.template.instruction.format(instruction=instruction) if instruction else "")

    def single(self, text: str) -> int:
        """The id of a text that must be one token (the mask token)."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise RecipeError(
                f"base.mask_token '{text}' is {len(ids)} tokens in this tokenizer; choose one that is one token"
            )
        return ids[0]


def text_key(text: str) -> int:
    """A 63-bit key that is equal for equal texts."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def as_ids(ids: Sequence[int]) -> np.ndarray:
    """int64 ids, as segments carry them."""
    return np.asarray(ids, dtype=np.int64)
