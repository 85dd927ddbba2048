"""Hard negatives for pairs: candidates by an encoder and BM25, without those that may themselves be answers."""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from l2v.data.sources import open_rows
from l2v.encoder import Encoder
from l2v.encoding.identity import encoder_key
from l2v.errors import UserError, first_line
from l2v.files import replace_text
from l2v.mining.arguments import source_of
from l2v.mining.candidates import Bm25, Exact, Faiss
from l2v.mining.choose import Known, Rule, choose, in_turn, plain
from l2v.mining.report import Found
from l2v.mining.shards import Shards, check_out, write_rows, writing
from l2v.mining.vectors import vectors
from l2v.recipe.source import Source

BLOCK = 1024  # queries in a shard


@dataclass
class Pairs:
    """The pairs, their distinct documents, and how they belong together.

    own_N: number of each query's positive; groups_N: -1 for none; kinds_M, kinds_N: number of the instruction before a
    document, and before the documents of a query; plain_M: normalised documents.
    """

    rows: Any
    documents: list[str]
    plain_M: list[str]
    prompts: list[str | None]
    own_N: np.ndarray
    groups_N: np.ndarray
    kinds_M: np.ndarray
    kinds_N: np.ndarray
    known: Known


def read(source: Source, corpus: Source | None) -> Pairs:
    """Read pairs, and the documents that may become negatives: positives, given negatives, the corpus."""
    notes: list[str] = []
    rows = open_rows([source], "pairs", notes)
    numbers: dict[tuple[str, str | None], int] = {}
    kinds: dict[str | None, int] = {}
    documents: list[str] = []
    plain_M: list[str] = []
    kinds_M: list[int] = []

    def number(text: str, prompt: str | None) -> int:
        key = (plain(text), prompt)
        if key not in numbers:
            numbers[key] = len(documents)
            documents.append(text)
            plain_M.append(key[0])
            kinds_M.append(kinds.setdefault(prompt, len(kinds)))
        return numbers[key]

    known, own_N, groups_N, kinds_N = Known(), [], [], []
    for row in tqdm(rows, desc="read", unit="pair", leave=False):
        own, group = number(row["positive"], row["document_instruction"]), row.get("group", -1)
        known.add(row["query"], own, group)
        own_N.append(own)
        groups_N.append(group)
        kinds_N.append(kinds_M[own])
        for text in row["negatives"]:
            number(text, row["document_instruction"])
    if corpus is not None:
        for text in open_rows([corpus], "documents", notes)["text"]:
            for prompt in list(kinds):
                number(text, prompt)
    for note in notes:
        print(note)
    prompts = [list(kinds)[kind] for kind in kinds_M]
    return Pairs(
        rows,
        documents,
        plain_M,
        prompts,
        np.array(own_N),
        np.array(groups_N),
        np.array(kinds_M),
        np.array(kinds_N),
        known,
    )


def mine(
    pairs: Pairs,
    shards: Shards,
    queries_NE: np.ndarray,
    documents_ME: np.ndarray,
    searches: dict[str, Callable[[int, int], np.ndarray]],
    rule: Rule,
    judge: Callable[[str, list[str]], np.ndarray] | None,
) -> int:
    """Write the missing shards; returns the number of all shards. searches: name -> (begin, end) -> numbers [n, k]."""
    count = -(-len(pairs.rows) // BLOCK)
    missing = [number for number in range(count) if not shards.has(number)]
    todo = sum(min(BLOCK, len(pairs.rows) - number * BLOCK) for number in missing)
    with tqdm(
        total=len(pairs.rows), initial=len(pairs.rows) - todo, desc="mine", unit="query", disable=not todo
    ) as bar:
        for number in missing:
            begin, end = number * BLOCK, min((number + 1) * BLOCK, len(pairs.rows))
            found = {name: search(begin, end) for name, search in searches.items()}
            out = []
            for i in range(begin, end):
                lists = {name: at[i - begin] for name, at in found.items()}
                out.append(_mine_one(pairs, i, lists, queries_NE[i], documents_ME, rule, judge))
                bar.update(1)
            shards.write(number, out)
    return count


def _mine_one(pairs, i, lists, query_E, documents_ME, rule, judge) -> dict[str, Any]:
    row, own, group = pairs.rows[i], int(pairs.own_N[i]), int(pairs.groups_N[i])
    dropped: Counter[str] = Counter()
    left = []
    for at in in_turn(lists.values()):
        if pairs.kinds_M[at] != pairs.kinds_N[i]:
            continue  # embedded after another instruction: the scores are not comparable
        if reason := pairs.known.reason(row["query"], own, group, at, pairs.plain_M):
            dropped[reason] += at != own
        else:
            left.append(at)
    if judge:
        scores = judge(row["query"], [pairs.documents[at] for at in (own, *left)])
        order = np.argsort(-scores[1:], kind="stable")
        left, scores = [left[k] for k in order], np.concatenate([scores[:1], scores[1:][order]])
    else:
        scores = documents_ME[[own, *left]] @ query_E
    positive, scores = float(scores[0]), [float(s) for s in scores[1:]]
    taken, close = choose(left, scores, positive, rule)
    dropped["too close"] = len(close)
    closest = max(close, key=lambda k: scores[k], default=None)
    made = {
        "query": row["query"],
        "positive": row["positive"],
        "negatives": [pairs.documents[left[k]] for k in taken],
        "instruction": row["instruction"],
        "document_instruction": row["document_instruction"],
        "positive_score": round(positive, 6),
        "negative_scores": [round(scores[k], 6) for k in taken],
        "negative_from": [next(name for name, at in lists.items() if left[k] in at) for k in taken],
    }
    if "group" in row:
        made["group"] = group if group >= 0 else None
    return {
        "row": made,
        "dropped": dict(dropped),
        "close": [round(scores[k], 6) for k in close],
        "closest": None if closest is None else [pairs.documents[left[closest]], round(scores[closest], 6)],
    }


def cross_encoder(name: str, device: torch.device) -> Callable[[str, list[str]], np.ndarray]:
    """(query, documents) -> scores, by a sentence-transformers cross-encoder."""
    try:
        from sentence_transformers import CrossEncoder
    except ImportError:
        raise UserError("--cross-encoder needs sentence-transformers: pip install 'l2v[export]'") from None
    try:
        model = CrossEncoder(name, device=str(device))
    except Exception as error:
        raise UserError(f"{name}: no cross-encoder can be loaded: {first_line(error)}") from None

    def judge(query: str, documents: list[str]) -> np.ndarray:
        scores = model.predict([(query, text) for text in documents], show_progress_bar=False)
        if np.ndim(scores) != 1:
            raise UserError(f"{name}: gives {np.shape(scores)[1]} scores a pair; a cross-encoder for ranking gives one")
        return np.asarray(scores, dtype=np.float64)

    return judge


def mine_negatives(args: argparse.Namespace) -> None:
    """Mine hard negatives as the arguments of `l2v data mine` say, and write them with a report.

    Raises:
        UserError: the pairs, the encoder or the output cannot be used.
    """
    rule = Rule(args.number, args.relative, args.absolute)
    out = check_out(args.out)
    source = source_of(args.data, args)
    pairs = read(source, Source(args.corpus, text=args.corpus_column) if args.corpus else None)
    encoder = Encoder.from_pretrained(args.encoder, precision=args.precision, trust_remote_code=args.trust_remote_code)
    device = next(encoder.model.parameters()).device
    key = encoder_key(encoder)
    queries = pairs.rows["query"][:]
    options = {"by": args.by, "depth": args.depth, "faiss": args.faiss, "cross_encoder": args.cross_encoder}
    facts = {"encoder": key, "rule": asdict(rule), **options, "data": _digest(pairs)}
    shards = Shards(out, facts)
    folder = Path(args.cache).expanduser() if args.cache else shards.work
    documents_ME = vectors(encoder, key, pairs.documents, pairs.prompts, folder, "documents")
    queries_NE = vectors(encoder, key, queries, pairs.rows["instruction"][:], folder, "queries")
    searches = {}
    if "encoder" in args.by:
        if args.faiss:
            index = Faiss(documents_ME, args.faiss)
            searches["encoder"] = lambda begin, end: index.search(queries_NE[begin:end], args.depth)[0]
        else:
            exact = Exact(documents_ME, device, pairs.kinds_M if len(set(pairs.kinds_M)) > 1 else None)
            searches["encoder"] = lambda begin, end: exact.search(
                queries_NE[begin:end], args.depth, pairs.kinds_N[begin:end]
            )[0]
    if "bm25" in args.by:
        words = Bm25(pairs.documents)
        searches["bm25"] = lambda begin, end: words.search(queries[begin:end], args.depth)[0]
    judge = cross_encoder(args.cross_encoder, device) if args.cross_encoder else None
    count = mine(pairs, shards, queries_NE, documents_ME, searches, rule, judge)
    _finish(args, out, shards, count, pairs, rule)


def _finish(args, out: Path, shards: Shards, count: int, pairs: Pairs, rule: Rule) -> None:
    found = Found()
    for row in shards.read(count):
        found.add(row)
    instructed = {key for key in ("instruction", "document_instruction") if any(pairs.rows[key])}

    def rows():
        for row in shards.read(count):
            yield {k: v for k, v in row["row"].items() if not k.endswith("instruction") or k in instructed}

    measure = f"score of {args.cross_encoder}" if args.cross_encoder else "cosine"
    facts = {
        "encoder": args.encoder,
        "pairs": f"{args.data}, {len(pairs.rows):,} rows",
        "documents": f"{len(pairs.documents):,}" + (f", with those of {args.corpus}" if args.corpus else ""),
        "candidates": f"the first {args.depth} by {' and by '.join(args.by)}",
        "judged by": measure,
        "no negative": _limits(rule),
    }
    picture = out.with_suffix(".png")
    found.draw(picture, measure)
    table = found.table(facts) + f"\n![scores]({picture.name})\n"
    with writing(out.with_suffix(".md")):
        replace_text(out.with_suffix(".md"), table)
    write_rows(out, rows())
    shards.clear()
    kept, none = sum(n * c for n, c in found.per_row.items()), found.per_row[0]
    dropped = sum(found.dropped.values())
    print(
        f"{out}: {len(pairs.rows):,} rows, {kept:,} negatives, {dropped:,} candidates dropped, {none:,} rows without negatives"
    )
    print(f"{out.with_suffix('.md')}: table of the scores; picture: {picture.name}")
    if found.poor:
        print(f"note: {found.poor}")


def _limits(rule: Rule) -> str:
    parts = [f"above {rule.relative:g} of the positive's score"] if rule.relative is not None else []
    parts += [f"above the positive's score minus {rule.absolute:g}"] if rule.absolute is not None else []
    return ", ".join(parts) or "no limit"


def _digest(pairs: Pairs) -> str:
    digest = hashlib.sha256()
    for row in pairs.rows:
        digest.update(repr(sorted(row.items())).encode())
    for text in pairs.documents:
        digest.update(f"{len(text)} {text}".encode())
    return digest.hexdigest()[:16]
