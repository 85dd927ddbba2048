"""The configuration of a build: one YAML file, every key a field here, with its type and default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from l2v.data.corpus.tally import EXAMPLES
from l2v.errors import RecipeError
from l2v.recipe.shipped import find_shipped, shipped_folder
from l2v.recipe.typed_yaml import Node, build, parse_override, read_tree

Kind = Literal["documents", "sentences", "pairs"]
Format = Literal["auto", "jsonl", "json", "parquet", "csv", "excel", "text", "mediawiki", "debian"]
FIELDS = (
    "id",
    "text",
    "query",
    "positive",
    "negatives",
    "group",
    "document",
    "section",
    "instruction",
    "document_instruction",
    "score",
)
"""Keys that `columns` may have: a field of a row; its value is the column that it is read from."""


@dataclass
class Input:
    """A source of rows: its location, its licence, and the names of its columns."""

    path: str
    licence: str
    label: str | None = None
    origin: str | None = None
    format: Format = "auto"
    markup: Literal["plain", "wiki40b", "wikitext"] = "plain"
    encoding: Literal["auto", "utf-8", "windows-1252", "cp850", "mac-roman"] = "auto"
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    languages: list[str] | None = None
    instruction: str | None = None
    document_instruction: str | None = None
    take: Literal["description", "translation"] = "description"
    packages: list[str] = field(default_factory=list)
    english: list[str] = field(default_factory=list)
    into: str | None = None
    min_score: float | None = None
    limit: int | None = None
    published_rows: int | None = None

    @property
    def source(self) -> str:
        """The value of a row's `source`."""
        return self.label or self.path.removeprefix("hub:")


@dataclass
class Sentences:
    """Smallest and largest number of words of a sentence."""

    least: int = 5
    most: int = 100


@dataclass
class Language:
    """The language filter: keep texts in `keep`, detected among `among`, by the first `characters` of a text.

    A pair is judged by both its texts together, unless its source names several `languages`.
    """

    keep: list[str] = field(default_factory=lambda: ["da"])
    among: list[str] = field(default_factory=lambda: ["da", "no", "nn", "sv", "en", "de"])
    characters: int = 300
    short: int = 20


@dataclass
class Length:
    """Smallest and largest number of words; `text` of documents and sentences, `query` and `positive` of pairs."""

    text: tuple[int, int] = (5, 1_000_000)
    query: tuple[int, int] = (1, 1_000)
    positive: tuple[int, int] = (3, 10_000)


@dataclass
class Near:
    """Near-duplicates by MinHash (Broder 1997): rows whose `words`-grams have a Jaccard similarity of at least `threshold`."""

    threshold: float = 0.8
    permutations: int = 128
    words: int = 3


@dataclass
class Held:
    """Evaluation texts that no row may contain: a file, hub:NAME, or mteb:TASK; with `columns: null` every text in it counts."""

    path: str
    columns: list[str] | None = None
    name: str | None = None
    split: str = "test"
    revision: str | None = None


@dataclass
class Decontaminate:
    """A row is a leak if it is an evaluation text, contains a whole one of `least` words, or shares `ngram` consecutive words."""

    sources: list[Held] = field(default_factory=list)
    ngram: int = 13
    least: int = 6


@dataclass
class Build:
    """The configuration of a build."""

    name: str
    kind: Kind
    sources: list[Input]
    folder: str | None = None
    out: str | None = None
    title: str | None = None
    seed: int = 42
    sentences: Sentences = field(default_factory=Sentences)
    language: Language | None = field(default_factory=Language)
    length: Length = field(default_factory=Length)
    exact: bool = True
    near: Near | None = field(default_factory=Near)
    decontaminate: Decontaminate = field(default_factory=Decontaminate)
    splits: dict[str, float] = field(default_factory=lambda: {"train": 1.0})
    examples: int = 3
    chunk: int = 1000
    shard: int = 100_000

    def split_names(self) -> list[str]:
        """Splits with a share, then those that only appear as a source's `into`."""
        return list(dict.fromkeys([*self.splits, *(s.into for s in self.sources if s.into)]))


def config_folder() -> Path:
    """The configurations that come with l2v."""
    return shipped_folder("data")


def load_config(name: str, overrides: Sequence[str] = ()) -> Build:
    """Read, override (`dotted.key=value`, an item of a list by its number) and validate.

    Raises:
        RecipeError: with file and line, or the override, and the nearest valid key.
    """
    path = find_shipped(name, config_folder(), "data configuration")
    tree = read_tree(path)
    for text in overrides:
        parts, new = parse_override(text, "folder=my/files or sources.0.limit=1000")
        _put(tree, parts, new)
    return check(build(Build, tree, ""), str(path))


def _put(tree: Node, parts: list[str], new: Node) -> None:
    at = tree
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(at.value, list):
            if not part.isdigit() or int(part) >= len(at.value):
                raise RecipeError(
                    f"{new.where}: {'.'.join(parts[:depth])} is a list of {len(at.value)}; use a number from 0 in place of "
                    f"'{part}'"
                )
            if last:
                at.value[int(part)] = new
            else:
                at = at.value[int(part)]
            continue
        if not isinstance(at.value, dict):
            at.value = {}
        if last:
            at.value[part] = new
        else:
            at = at.value.setdefault(part, Node({}, new.where))


def _need(condition: bool, sentence: str) -> None:
    if not condition:
        raise RecipeError(sentence)


def check(config: Build, where: str) -> Build:
    """Check rules that span several fields. `where` names the file in the message."""
    _need(config.name.replace("-", "").replace("_", "").isalnum(), f"{where}: name: use letters, digits, - and _")
    _need(bool(config.sources), f"{where}: `sources` is empty; name at least one")
    shares = config.splits
    _need(
        bool(shares) and all(isinstance(v, (int, float)) and 0 <= v <= 1 for v in shares.values()),
        f"{where}: splits are shares from 0 to 1, for example {{train: 0.98, dev: 0.02}}",
    )
    _need(
        abs(sum(shares.values()) - 1) < 1e-6, f"{where}: splits add up to {sum(shares.values()):g} and must add up to 1"
    )
    for name in config.split_names():
        _need(name.replace("_", "").isalnum(), f"{where}: split '{name}': use letters, digits and _ in its name")
    labels: set[str] = set()
    for i, source in enumerate(config.sources):
        at = f"{where}: sources[{i}]"
        _need(
            source.source not in labels,
            f"{at}: the label '{source.source}' was used before; give each source its own label",
        )
        labels.add(source.source)
        for key in source.columns:
            _need(key in FIELDS, f"{at}: columns.{key} is not a field of a row; choose among {', '.join(FIELDS)}")
        _need(
            all(isinstance(v, str) for v in source.columns.values()),
            f"{at}: columns maps a field to the name of a column, for example {{text: tekst}}",
        )
        debian = source.format == "debian"
        _need(debian or not (source.packages or source.english), f"{at}: packages and english need format: debian")
        _need(
            not debian or source.take == "description" or (bool(source.english) and config.kind == "pairs"),
            f"{at}: take: translation needs kind: pairs and `english`, Debian's Translation-en of the same packages",
        )
        wiki = source.format == "mediawiki" or source.markup != "plain"
        _need(not wiki or config.kind != "pairs", f"{at}: wiki markup gives documents or sentences, not pairs")
        _need(source.limit is None or source.limit >= 1, f"{at}: limit must be at least 1")
    for key, (least, most) in vars(config.length).items():
        _need(0 <= least <= most, f"{where}: length.{key} is [{least}, {most}]; give least and most words")
    _need(1 <= config.sentences.least <= config.sentences.most, f"{where}: sentences: least must be 1 up to most")
    _need(0 <= config.examples <= EXAMPLES, f"{where}: examples is {config.examples}; use 0 to {EXAMPLES}")
    _need(config.chunk >= 1 and config.shard >= 1, f"{where}: chunk and shard must be at least 1")
    if near := config.near:
        _need(0 < near.threshold <= 1, f"{where}: near.threshold is {near.threshold:g}; use 0 to 1")
        _need(16 <= near.permutations <= 1024, f"{where}: near.permutations is {near.permutations}; use 16 to 1024")
        _need(near.words >= 1, f"{where}: near.words must be at least 1")
    leaks = config.decontaminate
    _need(2 <= leaks.least <= leaks.ngram <= 64, f"{where}: decontaminate: 2 <= least <= ngram <= 64 must hold")
    if language := config.language:
        from l2v.data.corpus.language import CODES

        named = [*language.keep, *language.among, *(c for s in config.sources for c in s.languages or ())]
        for code in named:
            _need(
                code in CODES, f"{where}: the language filter does not support '{code}'; it supports {', '.join(CODES)}"
            )
        _need(bool(language.keep), f"{where}: language.keep is empty; `language: null` turns the filter off")
        _need(language.characters >= 20, f"{where}: language.characters must be at least 20")
    return config
