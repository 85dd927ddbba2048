"""What a row of a file becomes: the columns of a source, prompts, empty texts, scores, groups. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from l2v.data import raw
from l2v.data.columns import DEFAULTS, absent, guess, numbered, settle
from l2v.data.find import find_files, left_out
from l2v.data.reading import Reading
from l2v.data.text import sentences
from l2v.errors import UserError
from l2v.recipe.source import Source

Kind = Literal["documents", "sentences", "pairs"]

NAMES = ("text", "query", "positive", "negatives", "instruction", "document_instruction")
OPTIONAL = ("negatives", "instruction", "document_instruction", "score")
WORDS = {"true": 1.0, "yes": 1.0, "ja": 1.0, "sand": 1.0, "false": 0.0, "no": 0.0, "nej": 0.0, "falsk": 0.0}
# l2v's own names of columns that nothing reads unless the source names them.
SAID = ("instruction", "document_instruction", "group")


@dataclass(frozen=True)
class Rules:
    """A source with its columns resolved, as `normalise` needs it.

    path: of the source; a group never spans two. score_guessed: a value that is no number is then no score.
    """

    path: str
    text: str
    query: str
    positive: str
    negatives: str
    instruction: str | None
    document_instruction: str | None
    query_prompt: str | None
    document_prompt: str | None
    symmetric: bool
    group: str | None
    grouped: bool
    score: str | None
    min_score: float | None
    score_guessed: bool
    skip_empty: bool
    sentences: bool

    @classmethod
    def of(cls, source: Source, *, grouped: bool, guessed: Collection[str] = ()) -> Rules:
        """The rules of a source whose columns are settled. grouped: rows carry a `group`."""
        prompts = source.prompts()
        own = {f.name: getattr(source, f.name) for f in fields(source) if f.name in cls.__dataclass_fields__}
        own |= {"query_prompt": prompts.query, "document_prompt": prompts.document, "symmetric": prompts.symmetric}
        own["skip_empty"] = source.skip_empty or source.skip_bad
        return cls(**own, grouped=grouped, score_guessed="score" in guessed)

    @classmethod
    def of_sample(cls, source: Source, *, grouped: bool) -> Rules:
        """The rules of rows of the sample, whose columns have l2v's own names."""
        own: dict[str, Any] = {key: key for key in NAMES}
        plain = replace(source, **own, score=None, skip_empty=False, skip_bad=False, sentences=False)
        return cls.of(plain, grouped=grouped)


def read_source(
    source: Source, kind: Kind, reading: Reading, *, grouped: bool = False
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """What each row of a source's files becomes, streamed in order, with its location: none if the row is skipped.

    reading: receives counts, and notes on guessed and unread columns, also if the caller stops early.

    Raises:
        UserError: for what cannot be found or read (rows and files: unless `reading` keeps going), and for a column that
            the source names and no row has.
    """
    files = find_files(source.path)
    if sentence := left_out(source.path):
        reading.note(sentence)
    choices: Choices = {}
    try:
        for file in files:
            shown = source.path if len(files) == 1 and not Path(source.path).expanduser().is_dir() else str(file)
            try:
                names, complete = raw.columns(file, shown)
                rows = raw.read_rows(file, shown, reading, whole=source.whole)
                table = Table(shown, names, complete)
                yield from rows_of(source, kind, reading, table, rows, choices, grouped=grouped)
            except UserError as error:
                if len(files) == 1:
                    raise
                reading.lose(error, file=True)
    finally:
        note_columns(source, kind, reading, choices)


Choices = dict[str, list[str]]
"""By what was guessed: a note for each file, so that a folder of like files gives one."""


@dataclass(frozen=True)
class Table:
    """Rows with one set of columns: a file, or a data set of the Hub. complete: `names` are all columns a row may have."""

    shown: str
    names: Sequence[str]
    complete: bool


def rows_of(
    source: Source, kind: Kind, reading: Reading, table: Table, rows: Iterable[raw.Row], choices: Choices, *, grouped: bool
) -> Iterator[tuple[str, list[dict[str, Any]]]]:  # fmt: skip
    """What each row of one table becomes, with its location; `choices` receives the note on its guessed columns."""
    shown, names = table.shown, table.names
    choice = settle(source, names, kind)
    if note := choice.note(shown):
        choices.setdefault(str(choice.guessed), []).append(note)
    rules = Rules.of(choice.source, grouped=grouped, guessed=choice.guessed)
    missing = optional_columns(choice.source, kind)
    if table.complete:
        _check_columns(missing, names, shown)
    seen: dict[str, None] = {}
    try:
        for where, row in rows:
            if not seen.keys() >= row.keys():
                seen |= dict.fromkeys(row)
                missing = _unmet(missing, seen)
            try:
                several = normalise(row, rules, kind, where, reading)
            except UserError as error:
                reading.lose(error)
                continue
            reading.rows += 1
            yield where, several
        if missing and seen:
            raise UserError(absent(shown, missing[0], seen))
    finally:
        used = columns_read(rules, kind, seen)
        reading.unread |= dict.fromkeys(name for name in seen if name not in used)
        _note_late(choice.source, kind, reading, table, seen)


def _note_late(source: Source, kind: Kind, reading: Reading, table: Table, seen: Collection[str]) -> None:
    """Note columns with a common name that the first rows lack, so that they were not guessed."""
    for key in ("negatives", "score") if kind == "pairs" else ():
        current = getattr(source, key)
        column = guess(key, [name for name in seen if name not in table.names])
        if column and (not current or (current == DEFAULTS[key] and current not in seen)):
            reading.note(
                f"{table.shown}: the first rows lack the column '{column}', so it was not taken for {key}; set {key}: {column} "
                "on the source to use it"
            )


def note_columns(source: Source, kind: Kind, reading: Reading, choices: Choices) -> None:
    """Note the columns of a source that were guessed, and those that nothing reads."""
    for note, *others in choices.values():
        more = f"; the same in {len(others)} more file{'s' * (len(others) > 1)}"
        reading.note(note + more if others else note)
    if sentence := unread_note(source, kind, reading):
        reading.note(sentence)


def unread_note(source: Source, kind: Kind, reading: Reading) -> str | None:
    """The sentence on columns that rows have and nothing reads."""
    # A stage of texts reads one column by intent.
    names = [name for name in reading.unread if kind == "pairs" or name in SAID]
    if not names:
        return None
    own = [name for name in names if name in SAID]
    hint = f"; to use it, set {own[0]}: {own[0]} on the source" if own else ""
    return f"{source.path}: columns that are not used: {', '.join(names)}{hint}"


def columns_read(rules: Rules, kind: Kind, names: Collection[str]) -> set[str]:
    """The columns among `names` that a row of this kind is made from."""
    keys: tuple[str, ...] = ("query", "positive", "instruction", "document_instruction", "score")
    used = {getattr(rules, key) for key in (keys if kind == "pairs" else ("text",))}
    if kind == "pairs":
        used |= set(numbered(rules.negatives, names))
    if rules.grouped:
        used.add(rules.group)
    return used


def optional_columns(source: Source, kind: Kind) -> list[str]:
    """Columns that a source names and a row may lack; a column that no row has is an error.

    A column with the key's own name may be missing: mining and building write `negatives` or
    `document_instruction` only if there are any.
    """
    if kind != "pairs":
        return []
    named = [(key, getattr(source, key)) for key in OPTIONAL]
    wanted = [column for key, column in named if column not in (None, "") and (column != key or key == "score")]
    # A smallest score without a column of scores would keep every row.
    return [*wanted, "score"] if source.min_score is not None and not source.score else wanted


def _check_columns(wanted: list[str], names: Collection[str], shown: str) -> None:
    if missing := _unmet(wanted, names):
        raise UserError(absent(shown, missing[0], names))


def _unmet(wanted: list[str], names: Collection[str]) -> list[str]:
    return [column for column in wanted if not any(name in names for name in numbered(column, names))]


def normalise(
    row: dict[str, Any], rules: Rules, kind: Kind, where: str, reading: Reading | None = None
) -> list[dict[str, Any]]:
    """The row under l2v's column names: none if it is skipped, several if it is split into sentences or has several answers.

    Raises:
        UserError: a text is missing, empty or of another type; the message begins with `where`.
    """
    if kind != "pairs":
        texts = _answers(row, rules.text, where)
        if not texts or not all(texts):
            return _empty(rules, rules.text, where, reading)
        out = {"group": _group(row, rules, where)} if rules.grouped else {}
        parts = [part for text in texts for part in sentences(text)] if rules.sentences else texts
        return [{"text": part} | out for part in parts]
    score = row.get(rules.score) if rules.score else None
    if rules.score and not is_pair(score, rules.score, rules.min_score, where, guessed=rules.score_guessed):
        if reading:
            reading.below += 1
            reading.example("below", where)
        return []
    query = _text(row, rules.query, where)
    answers = _answers(row, rules.positive, where)
    for column, found in ((rules.query, query), (rules.positive, answers)):
        if not found or not all(found):
            return _empty(rules, column, where, reading)
    pair: dict[str, Any] = {
        "query": query,
        "positive": "",
        "negatives": _negatives(row, rules.negatives, where, reading),
    }
    for key, prompt in (("instruction", "query_prompt"), ("document_instruction", "document_prompt")):
        column = getattr(rules, key)
        pair[key] = (row.get(column) if column else None) or getattr(rules, prompt) or None
    if rules.symmetric:
        pair["document_instruction"] = pair["instruction"]
    if rules.grouped:
        pair["group"] = _group(row, rules, where)
    return [pair | {"positive": answer} for answer in answers]


def _text(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        raise UserError(absent(where, column, row))
    value = row[column]
    if not isinstance(value, str):
        raise UserError(f"{where}: the field '{column}' is text; found {type(value).__name__}")
    return value.strip()


def _answers(row: dict[str, Any], column: str, where: str) -> list[str]:
    """One text, or several in a list, without repetitions."""
    value = row.get(column)
    if not isinstance(value, list):
        return [_text(row, column, where)]
    if not all(isinstance(answer, str) for answer in value):
        raise UserError(f"{where}: the field '{column}' is a text or a list of texts")
    return list(dict.fromkeys(answer.strip() for answer in value if answer.strip()))


def _empty(rules: Rules, column: str, where: str, reading: Reading | None) -> list[dict[str, Any]]:
    if not rules.skip_empty:
        raise UserError(f"{where}: '{column}' is empty; remove the row or set skip_empty: true on its source")
    if reading:
        reading.empty += 1
        reading.example("empty", where)
    return []


def is_pair(value: Any, column: str, min_score: float | None, where: str, *, guessed: bool = False) -> bool:
    """Whether the score of a row says that its texts belong together: at least `min_score`, or 1 of 0 and 1 without it.

    A row without a score is a pair, unless `min_score` is given. guessed: nobody named the column, so a word in it is no
    score but, say, a topic.

    Raises:
        UserError: the value is no number, or one that needs a `min_score`.
    """
    if value is None or value == "":
        return min_score is None
    number = _number(value)
    if number is None:
        if guessed and isinstance(value, str) and min_score is None:
            return True
        raise UserError(f"{where}: the field '{column}' is a number; found {value!r}")
    if min_score is not None:
        return number >= min_score
    if number not in (0, 1):
        raise UserError(
            f"{where}: '{column}' is {value}, and only 0 and 1 say by themselves what is a pair; set min_score on the "
            "source: pairs below it are skipped (0 takes all)"
        )
    return number == 1


def says_no(row: dict[str, Any], column: str) -> bool:
    """Whether a row's score is 0 (or false, or nej), so that its texts do not belong together."""
    return _number(row.get(column)) == 0


def _number(value: Any) -> float | None:
    if isinstance(value, bool | int | float):
        return float(value) if math.isfinite(value) else None
    word = str(value).strip().casefold()
    if word in WORDS:
        return WORDS[word]
    try:
        number = float(word.replace(",", "."))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _negatives(row: dict[str, Any], pattern: str, where: str, reading: Reading | None) -> list[str]:
    """Hard negatives of a row; an empty one counts as absent. An empty cell of a table says nothing and is not counted."""
    out: list[str] = []
    for column in numbered(pattern, row):
        found = row.get(column) or []
        found = [found] if isinstance(found, str) else found
        if not isinstance(found, list) or not all(isinstance(n, str) for n in found):
            raise UserError(f"{where}: the field '{column}' is a text or a list of texts")
        texts = [text for n in found if (text := n.strip())]
        if reading and isinstance(row.get(column), list):
            reading.blanks += len(found) - len(texts)
        out += texts
    return out


def _group(row: dict[str, Any], rules: Rules, where: str) -> int:
    from l2v.data.tokens import text_key  # with transformers, which only grouped rows wait for

    if rules.group is None:
        return -1
    if rules.group not in row:
        raise UserError(absent(where, rules.group, row))
    value = row[rules.group]
    if not isinstance(value, str | int | None) or isinstance(value, bool):
        raise UserError(f"{where}: the field '{rules.group}' is text or a whole number; found {type(value).__name__}")
    # The key includes the source: numbers restart in every data set, so a group never spans two sources.
    return -1 if value in (None, "") else text_key(f"{rules.path}\n{value}")
