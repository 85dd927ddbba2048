"""A raw record to rows: parse, find the columns, remove markup, clean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from l2v.data import danish
from l2v.data.columns import numbered
from l2v.data.corpus import clean, markup
from l2v.data.corpus.config import Build, Input
from l2v.data.corpus.debian import Index, stanza
from l2v.data.corpus.tally import Tally
from l2v.data.rows import is_pair
from l2v.data.text import parse
from l2v.errors import UserError

Row = dict[str, Any]


class Dropped(Exception):
    """Raised for a record that gives no row: the reason, and a sentence or the text for the report."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(reason)
        self.reason, self.text = reason, text


class Parser:
    """Rows of a source's records. Pure: the rows depend on the record alone."""

    def __init__(self, config: Build, source: Input) -> None:
        self.config, self.source = config, source
        self.pairs = config.kind == "pairs"
        self.index = None
        if source.format == "debian":
            self.index = Index(source.packages, source.english, config.folder)

    def rows(self, number: int, where: str, payload: Any, tally: Tally) -> Iterator[Row]:
        """The rows of the record with that number in its source; `tally` counts what is dropped or repaired."""
        tally.records += 1
        try:
            columns = self._columns(where, payload, tally)
            found = [self._named(each, where, number, tally) for each in self._by_answer(columns, where)]
        except Dropped as why:
            tally.drop(why.reason, where, why.text)
            return
        if len(found) > 1:
            for place, row in enumerate(found):
                tally.made += 1
                yield row | {"id": f"{row['id']}#{place}"}
            return
        (row,) = found
        if self.config.kind != "sentences":
            tally.made += 1
            yield row
            return
        for place, sentence in enumerate(danish.sentences(row["text"])):
            tally.made += 1
            yield row | {"id": f"{row['id']}#{place}", "text": sentence}

    def _by_answer(self, columns: dict[str, Any], where: str) -> list[dict[str, Any]]:
        """The record once for each of its answers, if it is a pair; a record whose score says otherwise is dropped."""
        if not self.pairs:
            return [columns]
        score = self.source.columns.get("score", "score")
        try:
            # The column may be a guess, so a word in it is no mistake.
            if score in columns and not is_pair(columns[score], score, self.source.min_score, where, guessed=True):
                raise Dropped("not a pair", f"{where}: {score} {columns[score]}")
        except UserError as error:
            raise Dropped("malformed", str(error)) from None
        name = self.source.columns.get("positive", "positive")
        answers = columns.get(name)
        if not isinstance(answers, list):
            return [columns]
        kept = list(dict.fromkeys(answer for answer in answers if isinstance(answer, str) and answer.strip()))
        if not kept:
            raise Dropped("empty", f"{where}: '{name}' holds no text")
        return [columns | {name: answer} for answer in kept]

    def _columns(self, where: str, payload: Any, tally: Tally) -> dict[str, Any]:
        source = self.source
        if isinstance(payload, UserError):
            raise Dropped("malformed", str(payload))
        if isinstance(payload, dict):
            values = {k: self._decoded(v, where, tally) if isinstance(v, str) else v for k, v in payload.items()}
            return self._page(values) if source.format == "mediawiki" else values
        text = self._decoded(payload, where, tally)
        if self.index is not None:
            try:
                return self.index.row(stanza(text), source.take, self.config.kind)
            except (KeyError, ValueError) as error:
                reason = f"the field {error} is absent" if isinstance(error, KeyError) else str(error)
                raise Dropped("malformed", f"{where}: {reason}") from None
        if source.format == "jsonl":
            try:
                return parse(text, where)
            except UserError as error:
                raise Dropped("malformed", str(error)) from None
        return {"text": text}

    def _page(self, page: dict[str, Any]) -> dict[str, Any]:
        title = page.get("title", "")
        if page.get("ns", "0") != "0":
            raise Dropped("namespace", title)
        if "redirect" in page:
            raise Dropped("redirect", f"{title} → {page['redirect']}")
        return {"id": page.get("id", title), "document": title, "text": page.get("text", "")}

    def _decoded(self, data: bytes | str, where: str, tally: Tally) -> str:
        """Text of a line or a field; a string has surrogates for bytes that are not UTF-8."""
        if isinstance(data, str):
            if self.source.encoding == "auto" and not any("\udc80" <= c <= "\udcff" for c in data):
                return data
            try:
                data = data.encode("utf-8", "surrogateescape")
            except UnicodeEncodeError:
                raise Dropped("encoding", f"{where}: half of a surrogate pair") from None
        try:
            text, other = clean.decode(data, self.source.encoding)
        except UnicodeDecodeError as error:
            raise Dropped("encoding", f"{where}: {error.reason} at byte {error.start}") from None
        if other:
            tally.change("re-decoded", where, text)
        return text

    def _named(self, columns: dict[str, Any], where: str, number: int, tally: Tally) -> Row:
        source = self.source
        wanted = ("query", "positive") if self.pairs else ("text",)
        title = columns.get("title")
        document = self._value(columns, "document") or (title if isinstance(title, str) else None)
        if not self.pairs and source.markup == "wiki40b":
            document = document or markup.wiki40b_title(str(self._value(columns, "text") or ""))
        row: Row = {
            "id": f"{source.source}/{self._value(columns, 'id') or number}",
            "source": source.source,
            "licence": source.licence,
            "document": document or f"{source.source}/{number}",
            "section": self._value(columns, "section") or "",
        }
        group = self._value(columns, "group")
        # a named group spans sources: the same package in two files goes to the same split
        row["group"] = group or (f"{source.source}/{document}" if document else row["document"])
        for key in wanted:
            value = self._value(columns, key)
            if value is None:
                name = source.columns.get(key, key)
                if name not in columns:
                    found = ", ".join(map(str, columns)) or "nothing"
                    raise Dropped("malformed", f"{where}: the field '{name}' is absent; found {found}")
                value = ""
            row[key] = self._clean(value, where, tally)
        if not self.pairs:
            if not row["text"]:
                raise Dropped("empty", str(document or where))
            return row
        row["negatives"] = self._negatives(columns, row["positive"], where, tally)
        for key in ("instruction", "document_instruction"):
            row[key] = getattr(source, key) or self._value(columns, key) or None
        return row

    def _value(self, columns: dict[str, Any], key: str) -> Any:
        name = self.source.columns.get(key, key)
        value = columns.get(name)
        if key == "negatives" or value is None:
            return value
        if isinstance(value, (int, float)) and key not in ("text", "query", "positive"):
            return str(value)
        if not isinstance(value, str):
            raise Dropped("malformed", f"the field '{name}' is text; found {type(value).__name__}")
        return value

    def _clean(self, value: str, where: str, tally: Tally) -> str:
        text, repaired = clean.mojibake(value)
        if repaired:
            tally.change("mojibake", where, text)
        how = "wikitext" if self.source.format == "mediawiki" else self.source.markup
        if how != "plain":
            paragraphs = (markup.wikitext if how == "wikitext" else markup.wiki40b)(text)
            done = clean.normal("\n".join(paragraphs))
        else:
            done = clean.normal(text)
        if self.pairs:
            done = " ".join(done.split("\n"))
        if done != value and not repaired:
            tally.change("cleaned", where, done)
        return done

    def _negatives(self, columns: dict[str, Any], positive: str, where: str, tally: Tally) -> list[str]:
        value: list[Any] = []
        for name in numbered(self.source.columns.get("negatives", "negatives"), columns):
            found = columns.get(name) or []
            value += [found] if isinstance(found, str) else found if isinstance(found, list) else [found]
        if not all(isinstance(n, str) for n in value):
            raise Dropped("malformed", f"{where}: negatives are a text or a list of texts")
        texts = [clean.normal(n).replace("\n", " ") for n in value]
        kept = [n for n in dict.fromkeys(texts) if n and n != positive]
        if len(kept) < len(texts):
            tally.change("negatives", where, positive)
        return kept
