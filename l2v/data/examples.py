"""Tokenised examples: what one row becomes for each objective. Memory-mapped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Protocol

import datasets
import numpy as np
import pyarrow as pa

from l2v.batch import Segment
from l2v.data.mixture import Mixture
from l2v.data.tokens import TextTokenizer, as_ids, text_key
from l2v.errors import UserError
from l2v.recipe import MAX_AUTO_NEGATIVES


class Examples(Protocol):
    """A map from an example id (its index) to its segments."""

    lengths: np.ndarray
    """Tokens of every example, all segments together: int64 [examples]."""
    segments: np.ndarray
    """Number of segments of every example: int64 [examples]."""
    notes: list[str]
    """Messages about the data to log, a sentence each."""
    rows: datasets.Dataset
    """The tokenised rows, with their token ids in the column `ids`."""
    rows_of: np.ndarray
    """The row that every example comes from, or begins in: int64 [examples]."""
    mixture: Mixture | None
    """How the sources of the rows are mixed; None if they are concatenated."""

    def __getitem__(self, index: int) -> list[Segment]: ...


class MntpBlocks:
    """Documents one after another, cut into blocks of exactly `length` tokens (the last one may be shorter).

    With `document_mask` every document in a block is its own segment: attention does not cross its borders and
    positions restart. Without it, a block is one segment, as in McGill's llm2vec.
    """

    def __init__(self, rows: datasets.Dataset, tokenizer: TextTokenizer, *, document_mask: bool = True) -> None:
        length = tokenizer.length

        def tokenise(batch: dict[str, list]) -> dict[str, list]:
            ids = tokenizer.documents(batch["text"])
            return {"ids": ids, "n": [len(i) for i in ids]}

        self.rows = _map(rows, tokenise, tokenizer, "documents")
        self.ends = np.cumsum(np.asarray(self.rows["n"], dtype=np.int64))
        self.length, self.document_mask = length, document_mask
        total = int(self.ends[-1])
        count = -(-total // length)
        self.lengths = np.full(count, length, dtype=np.int64)
        self.lengths[-1] = total - (count - 1) * length
        if self.lengths[-1] < 2:  # nothing can be predicted in it
            self.lengths = self.lengths[:-1]
        if len(self.lengths) == 0:
            raise UserError("the documents hold fewer than 2 tokens; MNTP has nothing to predict")
        self.segments = np.ones(len(self.lengths), dtype=np.int64)
        self.squares = _squares(self.ends, length, document_mask)[: len(self.lengths)]
        begins = np.arange(len(self.lengths), dtype=np.int64) * length
        self.rows_of = np.searchsorted(self.ends, begins, side="right")
        self.mixture: Mixture | None = None
        self.notes = [f"{len(self.rows)} documents, {total} tokens, {len(self.lengths)} blocks of {length}"]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> list[Segment]:
        begin = index * self.length
        end = begin + int(self.lengths[index])
        document = int(np.searchsorted(self.ends, begin, side="right"))
        pieces: list[np.ndarray] = []
        while begin < end:
            start = int(self.ends[document - 1]) if document else 0
            stop = min(end, int(self.ends[document]))
            if stop > begin:
                pieces.append(as_ids(self.rows[document]["ids"])[begin - start : stop - start])
            begin, document = max(begin, stop), document + 1
        if not self.document_mask:
            pieces = [np.concatenate(pieces)]
        # No loss compares documents, so none needs a key.
        return [Segment(ids, example=index, column=column, text_key=0) for column, ids in enumerate(pieces)]


def _squares(ends: np.ndarray, length: int, document_mask: bool) -> np.ndarray:
    """Sum of the squared lengths of every block's segments: float64 [blocks]. ends: where each document ends."""
    edges = np.arange(length, int(ends[-1]), length)
    stops = np.union1d(edges, ends if document_mask else ends[-1:])
    pieces = np.diff(stops, prepend=0).astype(np.float64)
    return np.bincount((stops - 1) // length, pieces**2)


class Views:
    """SimCSE: a text twice; the two segments differ only in their column, and so in their dropout masks."""

    def __init__(self, rows: datasets.Dataset, tokenizer: TextTokenizer) -> None:
        def tokenise(batch: dict[str, list]) -> dict[str, list]:
            ids, starts, cut = tokenizer.embedded(batch["text"])
            keys = [[text_key(t)] for t in batch["text"]]
            return _columns([[i] for i in ids], [[s] for s in starts], keys, cut, batch.get("group"))

        self.rows = _map(rows, tokenise, tokenizer, "views")
        self.lengths = 2 * np.asarray(self.rows["n"], dtype=np.int64)
        self.segments = np.full(len(self.rows), 2, dtype=np.int64)
        self.rows_of = np.arange(len(self.rows))
        self.mixture: Mixture | None = None
        self.notes = _notes(self.rows, "texts", tokenizer.length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Segment]:
        row = self.rows[index]
        ids, start, key = as_ids(row["ids"][0]), row["starts"][0], row["keys"][0]
        return [Segment(ids, start, index, column, key, row.get("group", -1)) for column in (0, 1)]


class Pairs:
    """Supervised: query, positive and hard negatives; a row may have none.

    max_negatives: hard negatives of a row that are used; "auto": those that it has, at most MAX_AUTO_NEGATIVES.
    mask_duplicates: whether two answers to one question are kept from being negatives of each other, for the notes.
    """

    def __init__(
        self, rows: datasets.Dataset, tokenizer: TextTokenizer, *, max_negatives: int | Literal["auto"] = "auto",
        mask_duplicates: bool = True,
    ) -> None:  # fmt: skip
        most = MAX_AUTO_NEGATIVES if max_negatives == "auto" else max_negatives

        def tokenise(batch: dict[str, list]) -> dict[str, list]:
            all_ids, all_starts, all_keys, cut = [], [], [], 0
            for i, query in enumerate(batch["query"]):
                documents = [batch["positive"][i], *batch["negatives"][i][:most]]
                ids, starts, cut_query = tokenizer.embedded([query], batch["instruction"][i])
                more, more_starts, cut_documents = tokenizer.embedded(documents, batch["document_instruction"][i])
                all_ids.append(ids + more)
                all_starts.append(starts + more_starts)
                all_keys.append([text_key(t) for t in (query, *documents)])
                cut += cut_query + cut_documents
            columns = _columns(all_ids, all_starts, all_keys, cut, batch.get("group"))
            return columns | {"query_key": [keys[0] for keys in all_keys], "brought": [*map(len, batch["negatives"])]}

        self.rows = _map(rows, tokenise, tokenizer, f"pairs-of-{most}")
        self.lengths = np.asarray(self.rows["n"], dtype=np.int64)
        self.segments = np.asarray(self.rows["segments"], dtype=np.int64)
        self.rows_of = np.arange(len(self.rows))
        self.mixture: Mixture | None = None
        self.notes = _notes(self.rows, "pairs", tokenizer.length)
        self.notes += _negatives_note(self.segments - 2, np.asarray(self.rows["brought"], np.int64), max_negatives)
        self.notes += _questions_note(np.asarray(self.rows["query_key"], np.int64), mask_duplicates)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Segment]:
        row = self.rows[index]
        columns, group = zip(row["ids"], row["starts"], row["keys"], strict=True), row.get("group", -1)
        return [Segment(as_ids(ids), start, index, at, key, group) for at, (ids, start, key) in enumerate(columns)]


def _negatives_note(used: np.ndarray, brought: np.ndarray, max_negatives: int | str) -> list[str]:
    """How many hard negatives the rows bring, and how many are not used. used, brought: int64, of each row."""
    total, unused = int(brought.sum()), int((brought - used).sum())
    if not total:
        return ["no row has hard negatives; a query's negatives are the other texts of its batch"]
    notes = [f"{used.sum():,} hard negatives, up to {used.max()} a row"] if used.any() else []
    if notes and (none := int((used == 0).sum())):
        notes[0] += f"; {none:,} rows have none"
    if unused:
        why = f"{max_negatives} (at most {MAX_AUTO_NEGATIVES} a row)" if max_negatives == "auto" else max_negatives
        notes.append(f"{unused:,} of {total:,} hard negatives are unused: max_negatives is {why}")
    return notes


def _questions_note(query_keys: np.ndarray, mask_duplicates: bool) -> list[str]:
    """How many queries occur more than once. query_keys: int64, equal for equal texts."""
    counts = np.unique(query_keys, return_counts=True)[1]
    repeated = int(counts[counts > 1].sum())
    if not repeated:
        return []
    so = "their answers are not negatives of each other"
    if not mask_duplicates:
        so = "mask_duplicates: false makes their answers negatives of each other"
    return [f"{repeated:,} of {len(query_keys):,} queries occur more than once; {so}"]


def _columns(ids: list, starts: list, keys: list, cut: int, groups: list | None) -> dict[str, list]:
    cuts = [0] * len(ids)
    if cuts:
        cuts[0] = cut  # counted per batch of rows; only the sum is reported
    tokens = [sum(map(len, example)) for example in ids]
    counts = [len(example) for example in ids]
    columns = {"ids": ids, "starts": starts, "keys": keys, "n": tokens, "segments": counts, "cut": cuts}
    return columns if groups is None else columns | {"group": groups}


def token_buffers(rows: datasets.Dataset) -> Iterator[memoryview]:
    """The bytes of tokenised rows' token ids, in order, many rows at a time."""
    for chunk in rows.with_format("arrow").iter(batch_size=10_000):
        ids = chunk["ids"].combine_chunks()
        while pa.types.is_list(ids.type) or pa.types.is_large_list(ids.type):
            ids = ids.flatten()
        yield memoryview(ids.to_numpy(zero_copy_only=False))


def _notes(rows: datasets.Dataset, what: str, length: int) -> list[str]:
    notes = [f"{len(rows)} {what}, {sum(rows['n'])} tokens"]
    cut = sum(rows["cut"])
    if cut:
        notes.append(
            f"{cut} texts were longer than {length} tokens and were truncated; raise `length` to keep them whole"
        )
    return notes


def _map(rows: datasets.Dataset, function, tokenizer: TextTokenizer, name: str) -> datasets.Dataset:
    # Our own fingerprint: a tokenizer pickles to another hash after its first use, and the cache would miss.
    return rows.map(
        function,
        batched=True,
        remove_columns=rows.column_names,
        new_fingerprint=f"{rows._fingerprint}-{name}-{tokenizer.fingerprint()}",
        desc="tokenising",
    )
