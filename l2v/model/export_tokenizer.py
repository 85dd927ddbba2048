"""The tokenizer of an export: it adds what belongs around a text by itself, and is checked to give the encoder's own ids."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Regex, normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from l2v.data.tokens import TextTokenizer
from l2v.errors import UserError
from l2v.model.settings import quiet_transformers
from l2v.recipe import Template

OF_THIS_MACHINE = ("backend", "is_local", "local_files_only", "name_or_path")
DECIDED_BY_FILE = ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "from_slow", "sp_model_kwargs")
"""Keys by which some classes of transformers change what tokenizer.json says."""

PROBES = (
    "Hvor ligger Skagen?",
    "a",
    "Rødgrød med fløde på 3,5 øre; æbler, åer & Århus!",
    "  Et mellemrum før og linjeskift efter.\n",
    "To linjer\n\nmed tomt imellem\tog et tabulatortegn",
    "🙂 emoji 👩‍🔬 og kinesisk 你好",
    "lang tekst " * 12,
)
"""Short texts of every kind that tokenizers treat apart. The last is cut, with a limit that is set for it."""

STRIPS: dict[str, tuple[Any, Callable[[str], str]]] = {
    "both": (normalizers.Strip(), lambda text: text),
    "right": (normalizers.Strip(left=False), str.lstrip),
    "spaces": (normalizers.Replace(Regex(r" +\z"), ""), lambda text: text.strip() + " "),
    "none": (None, str.strip),
}
"""What white space at the ends of a text the tokenizer removes itself, as l2v does: all, all at the right, spaces at the right,
none; in order of preference. A prompt is counted alone, so its own end must survive, but for a space, which belongs to the next
word's token. Each with what is left to the caller, for the check."""


@dataclass(frozen=True)
class Framed:
    """template: what is left of it to be put before a text, by prompts. exclude: prompts are not pooled. strips: the white
    space that the tokenizer removes at the ends of a text (`STRIPS`).
    """

    tokenizer: PreTrainedTokenizerBase
    template: Template
    exclude: bool
    strips: str


def write_tokenizer(texts: TextTokenizer, pooling: str, instructions: Sequence[str], folder: Path) -> Framed:
    """Write a tokenizer that adds the template's suffix itself; the template that is left is for prompts.

    sentence-transformers has prompts, which come before a text and can be excluded from pooling, but nothing after it: so
    the tokenizer appends the suffix. Without a header a BOS token would be pooled, so it becomes the prompt. Whatever the
    tokenizer added before is kept, in its order. What was written is read again and checked.

    instructions: that prompts will hold. folder: with the config.json, on which depends how transformers reads a tokenizer.

    Raises:
        UserError: no tokenizer and prompt of that kind give the encoder's ids, or its tokens to pool.
    """
    exclude = texts.pooled != "all" and pooling != "last"  # the last token is the same, whatever stands before it
    why = ""
    for strips in STRIPS:
        framed = replace(_framed(texts, exclude and texts.pooled == "text", strips), exclude=exclude)
        why = _difference(texts, framed, instructions)
        if not why:
            _save(framed, folder)
            why = _difference(texts, replace(framed, tokenizer=_read(folder)), instructions)
        if not why:
            return framed
    raise UserError(f"this encoder cannot be exported: with the tokenizer and the prompts of an export, {why}")


def _framed(texts: TextTokenizer, exclude: bool, strips: str) -> Framed:
    tokenizer, template = copy.deepcopy(texts.tokenizer), texts.template
    backend = tokenizer.backend_tokenizer
    before, after = _added(tokenizer)
    suffix = _suffix(texts, len(after))
    bos = tokenizer.decode(before) if before else ""
    moved = bool(exclude and before and not template.prefix)
    if suffix or moved:
        backend.post_processor = _processor(tokenizer, [] if moved else before, [*suffix, *after])
        template = replace(template, suffix="")
    if moved:
        # As bos_token, sentence-transformers would treat it as a trailing special token and count a prompt of length 0.
        tokenizer.bos_token = None
        template = replace(template, prefix=bos)
    if strip := STRIPS[strips][0]:
        own = backend.normalizer
        backend.normalizer = strip if own is None else normalizers.Sequence([strip, own])
    backend.no_truncation()
    backend.no_padding()
    tokenizer.truncation_side = tokenizer.padding_side = "right"  # l2v cuts the end of a text
    tokenizer.model_max_length = texts.length
    if tokenizer.pad_token is None:
        tokenizer.pad_token = _pad_token(tokenizer, before)
    return Framed(tokenizer, template, exclude, strips)


def _pad_token(tokenizer: PreTrainedTokenizerBase, before: Sequence[int]) -> str:
    """A token to pad with; padding is masked, so it does not matter which. Not one that is put before texts, which would then
    count as one that ends a prompt.

    Raises:
        UserError: the tokenizer has no other special token.
    """
    named = [tokenizer.eos_token, tokenizer.unk_token, *map(str, tokenizer.added_tokens_decoder.values())]
    kept = tokenizer.convert_ids_to_tokens(list(before))
    found = next((token for token in named if token and token not in kept), None)
    if found is None:
        raise UserError(
            "the tokenizer has no token to pad a batch with, so this encoder cannot be exported; give it a pad_token"
        )
    return found


def _added(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer adds before and after each text."""
    backend = tokenizer.backend_tokenizer
    whole, bare = (backend.encode("a", add_special_tokens=add).ids for add in (True, False))
    for at in range(len(whole) - len(bare) + 1):
        if whole[at : at + len(bare)] == bare:
            return whole[:at], whole[at + len(bare) :]
    raise UserError("the tokenizer changes a text where it adds special tokens; such an encoder cannot be exported")


def _suffix(texts: TextTokenizer, after: int) -> list[int]:
    """The ids of the template's suffix. after: how many ids the tokenizer itself adds behind it.

    Raises:
        UserError: they are not the same behind every text.
    """
    suffix, tokenizer = texts.template.suffix, texts.tokenizer
    if not suffix:
        return []
    ids = tokenizer(suffix, add_special_tokens=False)["input_ids"]
    known = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    if not ids or ids[0] not in known:
        raise UserError(
            f"the template's suffix '{suffix}' does not begin with a special token; a tokenizer cannot append it to every text, "
            "so this encoder cannot be exported"
        )
    (whole,), _, _ = replace_length(texts, 4096).embedded(["a"])
    return whole[len(whole) - after - len(ids) : len(whole) - after]


def _processor(tokenizer: PreTrainedTokenizerBase, before: list[int], after: list[int]) -> Any:
    """A post-processor that puts these ids around each text. Byte-level offsets, which the old one may have set, are kept."""
    named = {id: _piece(tokenizer.convert_ids_to_tokens(id), id) for id in (*before, *after)}
    frame = [[named[id] for id in ids] for ids in (before, after)]
    template = processors.TemplateProcessing(
        single=[*frame[0], "$A", *frame[1]],
        pair=[*frame[0], "$A", "$B:1", *frame[1]],
        special_tokens=[
            {"id": name, "ids": [id], "tokens": [tokenizer.convert_ids_to_tokens(id)]} for id, name in named.items()
        ],
    )
    old = json.loads(tokenizer.backend_tokenizer.to_str()).get("post_processor")
    levels = [found for found in _parts(old) if found.get("type") in ("ByteLevel", "RobertaProcessing")]
    if not levels:
        return template
    level = processors.ByteLevel(
        add_prefix_space=levels[0].get("add_prefix_space", True), trim_offsets=levels[0].get("trim_offsets", True)
    )
    return processors.Sequence([level, template])


def _piece(token: str, id: int) -> str:
    """A token's name in a template, where a colon, a dollar or white space has a meaning of its own."""
    return f"token{id}" if any(c in ":$" or c.isspace() for c in token) else token


def _parts(processor: Any) -> Iterator[dict[str, Any]]:
    if isinstance(processor, dict):
        yield processor
        for part in processor.get("processors", ()):
            yield from _parts(part)


def replace_length(texts: TextTokenizer, length: int) -> TextTokenizer:
    """The same with another limit."""
    return TextTokenizer(texts.tokenizer, texts.template, length, pooled=texts.pooled)


def _difference(texts: TextTokenizer, framed: Framed, instructions: Sequence[str]) -> str:
    """Where an engine that uses prompts gets other ids than the encoder, or would pool other tokens; empty if nowhere."""
    tokenizer, left = framed.tokenizer, TextTokenizer(framed.tokenizer, framed.template, texts.length)
    for instruction in [None, *instructions]:
        prompt = left.header(instruction)
        room = len(texts.tokenizer(texts.header(instruction) + "a" + texts.template.suffix, verbose=False)["input_ids"])
        for probe, length in [(probe, room + 4096) for probe in PROBES] + [(PROBES[-1], room + 2)]:
            (ids,), (start,), _ = replace_length(texts, length).embedded([probe], instruction)
            text = prompt + STRIPS[framed.strips][1](probe)
            theirs = tokenizer(text, truncation=True, max_length=length, verbose=False)["input_ids"]
            if theirs != ids:
                seen, wanted = _shown(tokenizer, theirs), _shown(tokenizer, ids)
                return f"the text {probe.strip()[:24]!r} has the tokens {seen} instead of {wanted}"
            if framed.exclude and _prompt_length(tokenizer, prompt) != start:
                return (
                    f"{_prompt_length(tokenizer, prompt)} tokens of the prompt {prompt!r} are not pooled instead of {start} "
                    "(sentence-transformers counts one special token behind a prompt, not more); pool_prompt: true and pooling: "
                    "last need no such count, and a header or instruction that ends in a line break is counted"
                )
    return ""


def _prompt_length(tokenizer: PreTrainedTokenizerBase, prompt: str) -> int:
    """How many tokens sentence-transformers leaves out for a prompt: those of the prompt alone, without one special token at
    the end (its `_get_prompt_length`)."""
    ids = tokenizer(prompt)["input_ids"] if prompt else []
    return len(ids) - bool(ids and ids[-1] in tokenizer.all_special_ids)


def _shown(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    tokens = tokenizer.convert_ids_to_tokens(list(ids))
    return " ".join(tokens if len(tokens) <= 12 else [*tokens[:6], "...", *tokens[-5:]])


def _save(framed: Framed, folder: Path) -> None:
    """Write it for transformers 4 and 5 and every reader of tokenizer.json.

    The class that transformers 5 writes (TokenizersBackend) is unknown to version 4, and classes of single families build
    their own processor from keys; PreTrainedTokenizerFast takes what tokenizer.json says.
    """
    framed.tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    for key in (*OF_THIS_MACHINE, *DECIDED_BY_FILE):
        facts.pop(key, None)
    facts["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read(folder: Path) -> PreTrainedTokenizerBase:
    """As a user reads it. For some families (Qwen2) transformers takes a class of their own all the same."""
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
