"""A tokenizer in GGUF: its entries, and the rule by which llama.cpp splits texts, chosen by trying."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf

from l2v.errors import UserError
from l2v.formats.facts import Export

RULES = (
    "gpt-2", "smollm", "llama-bpe", "qwen2", "qwen35", "gpt-4o", "tekken", "deepseek-v3", "gpt3-finnish", "viking", "default",
)  # fmt: skip
"""llama.cpp's names of ways to split a text before byte-pair encoding; no file of transformers says which one it is."""
PROBES = (
    "I'm you'll WE'VE, it's 'til l'été",
    "1234567890 12 3 4,5 1/2",
    "  two  spaces   and\ttabs\n\n\nlines \n ",
    "a_b-c.d(e)[f]{g}",
    "foo(bar);  // comment\r\n",
    "ÆØÅ æøå éèüß ñ",
    "東京タワー 한국어 हिन्दी العربية עברית",
    "👩‍👩‍👧 🚲🇩🇰 ©™",
    "e\u0301 vs \u00e9",
    "A1b2C3 x=10000;y=-3.14e-5",
    "\u00a0nbsp \u2019quotes\u201d …",
)


def write_vocabulary(writer: gguf.GGUFWriter, export: Export, rows: int, rule: str) -> None:
    """Add the tokenizer. rows: of the embedding; what has no token is filled up. rule: see `rules`.

    The file also says what is put before and behind a text: as the export's tokenizer does it.
    """
    facts = json.loads((export.folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer = export.tokenizer.tokenizer
    pieces = _pieces(facts)
    ranks = {"".join(pair): rank for rank, pair in reversed(list(enumerate(_merges(facts))))}
    added = {each["id"]: each for each in facts.get("added_tokens", [])}
    by_id = {id: token for token, id in tokenizer.get_vocab().items()}
    tokens, types, scores = [], [], []
    for id in range(rows):
        token = by_id.get(id, f"[UNUSED_{id}]")
        tokens.append(token)
        scores.append(float(-ranks.get(token, len(ranks))))
        if id not in by_id:
            types.append(gguf.TokenType.UNUSED)
        elif id in added:
            types.append(gguf.TokenType.CONTROL if added[id]["special"] else gguf.TokenType.USER_DEFINED)
        else:
            byte = pieces and re.fullmatch("<0x[0-9A-F]{2}>", token)
            types.append(gguf.TokenType.BYTE if byte else gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre("default" if pieces else rule)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if pieces:
        writer.add_token_scores(scores)
        writer.add_add_space_prefix(rule == "space")
        unknown = facts["model"].get("unk_token")
        if unknown is not None:
            writer.add_unk_token_id(tokenizer.convert_tokens_to_ids(unknown))
    else:
        writer.add_token_merges([" ".join(pair) for pair in _merges(facts)])
    _frame(writer, export)


def _frame(writer: gguf.GGUFWriter, export: Export) -> None:
    """The tokens before and behind a text, as BOS and EOS."""
    tokenizer = export.tokenizer.tokenizer
    whole, bare = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (True, False))
    at = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), None)
    before, behind = ([], []) if at is None else (whole[:at], whole[at + len(bare) :])
    before = [*before, *header_as_bos(export)]
    if at is None or len(before) > 1 or len(behind) > 1:
        raise UserError(
            f"{export.folder}: cannot be written as GGUF: its tokenizer puts {len(before)} tokens before and {len(behind)} "
            "behind a text, and llama.cpp one each"
        )
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(behind))
    begin = before[0] if before else tokenizer.bos_token_id
    end = behind[0] if behind else tokenizer.eos_token_id
    for id, add in ((begin, writer.add_bos_token_id), (end, writer.add_eos_token_id)):
        if id is not None:
            add(id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)


def composes(export: Export) -> bool:
    """Whether the tokenizer brings texts into Unicode's form NFC, which llama.cpp leaves to its caller."""
    normalizer = export.tokenizer.tokenizer.backend_tokenizer.normalizer
    return normalizer is not None and normalizer.normalize_str("e\u0301") == "\u00e9"


def header_as_bos(export: Export) -> list[int]:
    """The header's token, if it is a single special one: then a BOS token, which an export puts there where it is not pooled."""
    tokenizer = export.tokenizer.tokenizer
    ids = tokenizer(export.tokenizer.header(None), add_special_tokens=False)["input_ids"]
    known = tokenizer.added_tokens_decoder
    return ids if len(ids) == 1 and ids[0] in known and known[ids[0]].special else []


def rules(export: Export) -> Sequence[str]:
    """The names that may describe the tokenizer.

    Raises:
        UserError: llama.cpp has nothing of its kind.
    """
    facts = json.loads((export.folder / "tokenizer.json").read_text(encoding="utf-8"))
    if facts["model"]["type"] != "BPE":
        raise UserError(
            f"{export.folder}: cannot be written as GGUF: a tokenizer of kind {facts['model']['type']}; byte-pair encodings can"
        )
    return ("bare", "space") if _pieces(facts) else RULES


def choose_rule(export: Export, write: Callable[[Path, str], None], folder: Path) -> str:
    """The first of `rules` with which llama.cpp gives the token ids of the export. write: writes a file of the vocabulary alone.

    Raises:
        UserError: none does.
    """
    from llama_cpp import Llama

    file, worst = folder / "vocabulary.gguf", ""
    for rule in rules(export):
        write(file, rule)
        try:
            model = Llama(str(file), vocab_only=True, verbose=False)
        except ValueError:  # a version that does not know the name
            continue
        with_ids = first_difference(export, model)
        model.close()
        if with_ids is None:
            return rule
        worst = worst or with_ids
    raise UserError(
        f"{export.folder}: cannot be written as GGUF: llama.cpp would split texts into other tokens, such as {worst}"
    )


def first_difference(export: Export, model: Any) -> str | None:
    """The first text that llama.cpp gives other token ids than the export; None if there is none."""
    header, given = export.tokenizer.header(None), not header_as_bos(export)
    for text in (*export.texts(), *PROBES):
        text = unicodedata.normalize("NFC", text) if composes(export) else text
        want = export.tokenizer.tokenizer(header + text.strip())["input_ids"]
        sent = (header if given else "") + text.strip()
        if model.tokenize(sent.encode(), add_bos=True, special=True) != want:
            return repr(text if len(text) < 60 else text[:60] + "…")
    return None


def _pieces(facts: dict[str, Any]) -> bool:
    """Whether it is of SentencePiece's kind: entries are text with ▁ for spaces, and bytes have entries of their own."""
    return bool(facts["model"].get("byte_fallback"))


def _merges(facts: dict[str, Any]) -> list[Sequence[str]]:
    return [each.split(" ") if isinstance(each, str) else each for each in facts["model"]["merges"]]
