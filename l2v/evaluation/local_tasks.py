"""Rows to mteb tasks: one builder for each type."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from mteb.abstasks import (
    AbsTask,
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.task_metadata import TaskMetadata

from l2v.data.rows import says_no
from l2v.errors import RecipeError, UserError
from l2v.evaluation.rows import Rows, read_rows

# Limit of queries x documents: excluding a group's documents needs the list of allowed documents of every query in memory.
MAX_RANKED_PAIRS = 20_000_000


@dataclass
class Built:
    """A task, its data in mteb's shape, and notes on skipped rows of the files."""

    task: AbsTask
    dataset: Any
    notes: list[str]


def _retrieval(name: str, folder: Path, entry: dict[str, Any], revision: str) -> Built:
    found = _retrieval_texts(folder, entry)
    queries = dict(list(found.queries.items())[: entry["limit"]])
    if not queries:
        raise UserError(f"{folder / entry['file']}: no query is left; check 'only' and '{entry['positive']}'")
    extra = {
        key: set().union(*(found.members[g] for g in found.groups.get(text, ()))) - set(relevant)
        for text, (key, relevant) in queries.items()
    }
    ranked = None
    if entry["groups"] == "relevant":
        for key, relevant in queries.values():
            relevant.update(dict.fromkeys(extra[key], 1))
    elif entry["groups"] == "exclude" and any(extra.values()):
        ranked = _allowed(name, [key for key, _ in queries.values()], found.documents, extra)
    split = {
        "corpus": Dataset.from_dict(
            {"id": list(found.documents), "title": [""] * len(found.documents), "text": list(found.documents.values())}
        ),
        "queries": Dataset.from_dict({"id": [key for key, _ in queries.values()], "text": list(queries)}),
        "relevant_docs": dict(queries.values()),
        "top_ranked": ranked,
    }
    task = _task(AbsTaskRetrieval, name, "Retrieval", "ndcg_at_10", entry, revision)
    return Built(task, {"default": {"test": split}}, _clean(found.notes))


@dataclass
class _RetrievalTexts:
    """documents: text by id (equal texts are one document). queries: text to (id, relevant documents).

    members: documents of each group. groups: groups of each query.
    """

    notes: list[str | None]
    documents: dict[str, str] = field(default_factory=dict)
    queries: dict[str, tuple[str, dict[str, int]]] = field(default_factory=dict)
    members: dict[str, set[str]] = field(default_factory=dict)
    groups: dict[str, set[str]] = field(default_factory=dict)


def _retrieval_texts(folder: Path, entry: dict[str, Any]) -> _RetrievalTexts:
    query, positive, group = entry["query"], entry["positive"], entry["group"]
    read = read_rows(folder / entry["file"], [query], [positive])
    out = _RetrievalTexts([read.note()])
    known: dict[str, dict[str, Any]] = {}
    if entry["corpus"]:
        corpus = read_rows(folder / entry["corpus"], [entry["text"]], [entry["id"]])
        out.notes.append(corpus.note())
        known = {str(row[entry["id"]]): row for row in corpus.rows}
        out.documents = {key: row[entry["text"]] for key, row in known.items()}
    by_text: dict[str, str] = {}
    missing = wrong = no = 0
    for row in read.rows:
        if entry["corpus"]:
            found = row[positive] if isinstance(row[positive], list) else [row[positive]]
            ids = [str(key) for key in found if str(key) in known]
            missing += not ids
            if not ids:
                continue
        else:
            answers = row[positive] if isinstance(row[positive], list) else [row[positive]]
            texts = [text.strip() for text in answers if isinstance(text, str) and text.strip()]
            wrong += not texts
            if not texts:
                continue
            ids = [by_text.setdefault(text, f"d{len(by_text)}") for text in texts]
            out.documents |= dict(zip(ids, texts, strict=True))
            if says_no(row, entry["score"]):  # a document to be found by others
                no += 1
                continue
        if row.get(group) is not None:
            out.members.setdefault(str(row[group]), set()).update(ids)
            out.groups.setdefault(row[query], set()).add(str(row[group]))
        facts = row | (known[ids[0]] if entry["corpus"] else {})
        if not _kept(facts, entry["only"]):
            continue
        relevant = out.queries.setdefault(row[query], (f"q{len(out.queries)}", {}))[1]
        relevant.update(dict.fromkeys(ids, 1))
    if wrong:
        out.notes.append(f"{wrong} rows skipped: their '{positive}' is not a text, or empty")
    if no:
        out.notes.append(f"{no} rows are no answer by their '{entry['score']}' of 0; their texts are documents only")
    if not out.documents:
        raise UserError(f"{folder / entry['file']}: no row has a text in '{positive}'")
    if missing:
        out.notes.append(
            f"{missing} queries skipped: their '{positive}' is not an '{entry['id']}' of {entry['corpus']}"
        )
    return out


def _allowed(
    name: str, queries: Sequence[str], documents: dict[str, str], excluded: dict[str, set[str]]
) -> dict[str, list[str]]:
    """The documents that each query is ranked against."""
    if len(queries) * len(documents) > MAX_RANKED_PAIRS:
        raise UserError(
            f"{name}: groups: exclude keeps {len(queries):,} x {len(documents):,} ids in memory; use groups: relevant, "
            "or a limit"
        )
    return {key: [d for d in documents if d not in excluded[key]] for key in queries}


def _bitext(name: str, folder: Path, entry: dict[str, Any], revision: str) -> Built:
    read = _rows(folder, entry, [entry["first"], entry["second"]])
    pairs = list(dict.fromkeys((row[entry["first"]], row[entry["second"]]) for row in read.rows))[: entry["limit"]]
    columns = {"sentence1": [first for first, _ in pairs], "sentence2": [second for _, second in pairs]}
    task = _task(AbsTaskBitextMining, name, "BitextMining", "f1", entry, revision)
    return Built(task, DatasetDict(test=Dataset.from_dict(columns)), _clean([read.note()]))


def _classification(name: str, folder: Path, entry: dict[str, Any], revision: str) -> Built:
    split = entry["split"]
    read = _rows(folder, entry, [entry["text"]], [entry["label"], *([split] if split else [])])
    rows, notes = _frequent(read.rows, entry)
    if split:
        parts = {part: [row for row in rows if str(row[split]) == str(entry[part])] for part in ("train", "test")}
    else:
        parts = _halves(rows, entry)
    for part, found in parts.items():
        if len({str(row[entry["label"]]) for row in found}) < 2:
            raise UserError(f"{folder / entry['file']}: fewer than 2 labels in its {part} part")
    numbers = {label: at for at, label in enumerate(sorted({str(row[entry["label"]]) for row in rows}))}
    dataset = DatasetDict(
        {
            part: Dataset.from_dict(
                {
                    "text": [row[entry["text"]] for row in found],
                    "label": [numbers[str(row[entry["label"]])] for row in found],
                }
            )
            for part, found in parts.items()
        }
    )
    facts = {"samples_per_label": entry["samples_per_label"]}
    task = _task(AbsTaskClassification, name, "Classification", "accuracy", entry, revision, **facts)
    return Built(task, dataset, _clean([read.note(), *notes]))


def _clustering(name: str, folder: Path, entry: dict[str, Any], revision: str) -> Built:
    read = _rows(folder, entry, [entry["text"]], [entry["label"]])
    rows, notes = _frequent(read.rows, entry)
    if len({str(row[entry["label"]]) for row in rows}) < 2:
        raise UserError(f"{folder / entry['file']}: fewer than 2 labels; there is nothing to cluster")
    columns = {"sentences": [row[entry["text"]] for row in rows], "labels": [str(row[entry["label"]]) for row in rows]}
    # mteb embeds 4% of a set by default; a local set is small, so all of it is used, resampled as mteb does.
    facts = {"max_fraction_of_documents_to_embed": None, "max_documents_per_cluster": min(len(rows), 16_384)}
    task = _task(AbsTaskClustering, name, "Clustering", "v_measure", entry, revision, **facts)
    return Built(task, DatasetDict(test=Dataset.from_dict(columns)), _clean([read.note(), *notes]))


def _sts(name: str, folder: Path, entry: dict[str, Any], revision: str) -> Built:
    read = _rows(folder, entry, [entry["first"], entry["second"]], [entry["score"]])
    try:
        scores = [float(row[entry["score"]]) for row in read.rows]
    except (TypeError, ValueError):
        raise UserError(f"{folder / entry['file']}: '{entry['score']}' is not always a number") from None
    if len(set(scores)) < 2:
        raise UserError(f"{folder / entry['file']}: every pair has the same score; there is nothing to correlate")
    columns = {
        "sentence1": [row[entry["first"]] for row in read.rows],
        "sentence2": [row[entry["second"]] for row in read.rows],
        "score": scores,
    }
    facts = {"min_score": min(scores), "max_score": max(scores)}
    task = _task(AbsTaskSTS, name, "STS", "cosine_spearman", entry, revision, **facts)
    return Built(task, DatasetDict(test=Dataset.from_dict(columns)), _clean([read.note()]))


BUILD: dict[str, Callable[[str, Path, dict[str, Any], str], Built]] = {
    "retrieval": _retrieval,
    "bitext": _bitext,
    "classification": _classification,
    "clustering": _clustering,
    "sts": _sts,
}


def _task(kind: type, name: str, type_: str, score: str, entry: dict[str, Any], revision: str, **facts: Any) -> AbsTask:
    try:
        metadata = TaskMetadata(
            name=name,
            description=f"{entry['file']}, local",
            type=type_,
            main_score=score,
            eval_splits=["test"],
            eval_langs=entry["languages"],
            prompt=entry["prompt"],
            dataset={"path": "local", "revision": revision},
        )
    except ValueError as error:
        raise RecipeError(f"{name}: mteb rejects the task: {' '.join(str(error).split())}") from None
    return type(name, (kind,), {"metadata": metadata, **facts})()


def _rows(folder: Path, entry: dict[str, Any], texts: Sequence[str], others: Sequence[str] = ()) -> Rows:
    read = read_rows(folder / entry["file"], texts, others)
    read.rows = [row for row in read.rows if _kept(row, entry["only"])][: entry["limit"]]
    if not read.rows:
        raise UserError(f"{folder / entry['file']}: 'only' leaves no row")
    return read


def _kept(row: dict[str, Any], only: dict[str, Any] | None) -> bool:
    return all(str(row.get(key)) == str(value) for key, value in (only or {}).items())


def _frequent(rows: list[dict[str, Any]], entry: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows whose label has at least `least` rows."""
    counts = Counter(str(row[entry["label"]]) for row in rows)
    kept = [row for row in rows if counts[str(row[entry["label"]])] >= entry["least"]]
    rare = sum(count < entry["least"] for count in counts.values())
    note = f"{rare} labels with fewer than {entry['least']} rows skipped ({len(rows) - len(kept)} rows)"
    return kept, [note] if rare else []


def _halves(rows: list[dict[str, Any]], entry: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Half of each label's rows to train on, half to test on; by hash of the text, so the order of the file does not matter."""
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    seen: Counter[str] = Counter()
    for row in sorted(rows, key=lambda row: hashlib.sha256(row[entry["text"]].encode()).digest()):
        label = str(row[entry["label"]])
        parts["train" if seen[label] % 2 == 0 else "test"].append(row)
        seen[label] += 1
    return parts


def _clean(notes: list[str | None]) -> list[str]:
    return [note for note in notes if note]
