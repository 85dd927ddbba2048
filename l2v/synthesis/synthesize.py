"""Queries for passages, written by a language model and kept if a search with them finds the passage."""

from __future__ import annotations

import argparse
import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from l2v.data.sources import open_rows
from l2v.encoder import Encoder
from l2v.encoding.identity import encoder_key
from l2v.errors import UserError
from l2v.mining.arguments import source_of
from l2v.mining.candidates import Bm25, Exact
from l2v.mining.choose import plain
from l2v.mining.shards import Shards, check_out, write_rows
from l2v.mining.vectors import vectors
from l2v.recipe.tasks import find_task
from l2v.synthesis.endpoint import Endpoint, Failed
from l2v.synthesis.journal import Answer, Journal
from l2v.synthesis.local import Local
from l2v.synthesis.wording import STYLES, SYSTEM, Question, question

SEARCHED = 1024  # queries that are searched at a time


def synthesize(args: argparse.Namespace) -> str:
    """Let a language model write queries as the arguments of `l2v data synthesize` say; returns a summary.

    Raises:
        UserError: queries failed (the answered ones are kept), or a file cannot be used.
    """
    out = check_out(args.out)
    notes: list[str] = []
    read = open_rows([source_of(args.passages, args)], "documents", notes)["text"][:]
    for note in notes:
        print(note)
    different: dict[str, str] = {}
    for text in read:
        different.setdefault(plain(text), text)
    passages = list(different.values())
    styles = tuple(dict.fromkeys(args.styles))
    questions = [question(p, n, text, styles, args.seed) for p, text in enumerate(passages) for n in range(args.number)]
    facts = {"passages": _digest(passages), "wording": _digest([SYSTEM, *(STYLES[s].prompt for s in styles)])}
    facts |= {key: getattr(args, key) for key in ("model", "number", "seed", "temperature", "most_tokens")}
    shards = Shards(out, facts | {"styles": styles})
    filter_ = _filter(args, passages, shards.work)  # an error here is raised before the first question
    journal = Journal(shards.folder)
    try:
        failed = _ask(args, questions, journal)
    finally:
        journal.close()
    if failed and not args.skip_failed:
        raise UserError(
            f"{len(failed)} of {len(questions)} queries failed (the last one: {failed[-1]}); the others are kept: run the same "
            "command again to retry only these, or add --skip-failed to skip them"
        )
    rows, dropped = _consistent(questions, journal.answers, filter_, args.top)
    write_rows(out, rows)
    shards.clear()
    return _summary(args, out, len(read), passages, questions, journal.answers, len(failed), rows, dropped)


def _ask(args: argparse.Namespace, questions: list[Question], journal: Journal) -> list[str]:
    """Ask the unanswered questions; returns a reason for each question that failed."""
    settings = {"retries": args.retries, "temperature": args.temperature, "most_tokens": args.most_tokens}
    missing = sum(q.key not in journal.answers for q in questions)
    bar = tqdm(total=len(questions), initial=len(questions) - missing, desc="ask", unit="query", disable=not missing)
    with bar:
        if not missing:
            return []
        if args.endpoint:
            endpoint = Endpoint(args.endpoint, args.model, key_name=args.key_from, timeout=args.timeout, **settings)
            return _ask_endpoint(endpoint, args.concurrency, questions, journal, bar)
        local = Local(args.model, **settings)
        # Batches do not depend on what was answered before: a batch shares its sampling seed.
        for begin in range(0, len(questions), args.batch):
            batch = questions[begin : begin + args.batch]
            if all(q.key in journal.answers for q in batch):
                continue
            for q, answer in zip(batch, local.ask(batch), strict=True):
                if q.key not in journal.answers:
                    journal.add(q.key, answer)
                    bar.update(1)
        return []


def _ask_endpoint(
    endpoint: Endpoint, concurrency: int, questions: list[Question], journal: Journal, bar: tqdm
) -> list[str]:
    left = iter([q for q in questions if q.key not in journal.answers])
    failed: list[str] = []
    in_a_row, most = 0, max(8, 2 * concurrency)
    pool = ThreadPoolExecutor(concurrency)
    running = {}
    try:
        while True:
            for q in left:  # submit no more than can run, so that an interrupt stops at once
                running[pool.submit(endpoint.ask, q)] = q
                if len(running) >= concurrency:
                    break
            if not running:
                return failed
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                q = running.pop(done)
                try:
                    journal.add(q.key, done.result())
                    in_a_row = 0
                except Failed as error:
                    failed.append(str(error))
                    in_a_row += 1
                bar.update(1)
            if in_a_row >= most:
                raise UserError(
                    f"{endpoint.url}: {in_a_row} queries in a row failed (the last one: {failed[-1]}); the answers so far "
                    "are kept, and the same command resumes"
                )
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _filter(args: argparse.Namespace, passages: list[str], folder: Path):
    """(queries, instructions) -> numbers of the passages ranked first, [n, top]; None without a filter."""
    if args.filter == "none":
        return None
    if args.filter == "bm25":
        words = Bm25(passages)
        return lambda queries, _: words.search(queries, args.top)[0]
    encoder = Encoder.from_pretrained(args.filter, trust_remote_code=args.trust_remote_code)
    passages_ME = vectors(encoder, encoder_key(encoder), passages, [None] * len(passages), folder, "passages")
    exact = Exact(passages_ME, next(encoder.model.parameters()).device)

    def search(queries: list[str], instructions: list[str]) -> np.ndarray:
        vectors_NE = np.empty((len(queries), encoder.dimension), dtype=np.float32)
        for instruction in sorted(set(instructions)):
            at = [i for i, own in enumerate(instructions) if own == instruction]
            vectors_NE[at] = encoder.encode([queries[i] for i in at], instruction, normalize=True)
        return exact.search(vectors_NE, args.top)[0]

    return search


def _consistent(
    questions: list[Question], answers: dict[str, Answer], search, top: int
) -> tuple[list[dict[str, Any]], Counter]:
    """The pairs that are kept, and counts of the reasons for dropping others."""
    rows, seen = [], set()
    dropped: Counter[str] = Counter()
    for chosen in _batches(questions):
        asked = [(q, answers[q.key]) for q in chosen if q.key in answers]
        dropped.update(str(answer.why) for _, answer in asked if answer.query is None)
        found = [(q, answer.query) for q, answer in asked if answer.query is not None]
        instructions = [find_task(STYLES[q.style].task).query for q, _ in found]
        first = search([query for _, query in found], instructions) if search and found else None
        for at, (q, query) in enumerate(found):
            rank = None if first is None else next((r for r, p in enumerate(first[at], 1) if p == q.passage), math.inf)
            if rank == math.inf:
                dropped[f"its passage is not among the first {top}"] += 1
            elif (plain(query), q.passage) in seen:
                dropped["the same query again"] += 1
            else:
                seen.add((plain(query), q.passage))
                row = {"query": query, "positive": q.text, "instruction": instructions[at], "style": q.style}
                rows.append(row if rank is None else row | {"rank": rank})
    return rows, dropped


def _batches(questions: list[Question]) -> Iterator[list[Question]]:
    for begin in range(0, len(questions), SEARCHED):
        yield questions[begin : begin + SEARCHED]


def _summary(args, out, read, passages, questions, answers, failed, rows, dropped) -> str:
    asked = [answers[q.key] for q in questions if q.key in answers]
    tokens = [sum(getattr(a, name) for a in asked) for name in ("prompt_tokens", "completion_tokens")]
    styles = Counter(row["style"] for row in rows)
    lines = [
        f"{out}: {len(rows):,} pairs of {len(passages):,} passages"
        + (f" ({read - len(passages):,} duplicate passages)" if read > len(passages) else ""),
        f"asked: {len(asked):,} queries in {sum(a.tries for a in asked):,} tries"
        + (f", {failed:,} failed" if failed else ""),
        f"kept: {', '.join(f'{styles[s]:,} {s}' for s in STYLES if styles[s]) or 'none'}",
        f"dropped: {', '.join(f'{n:,} {why}' for why, n in sorted(dropped.items())) or 'none'}",
        f"tokens: {tokens[0]:,} read, {tokens[1]:,} written",
    ]
    if args.price:
        cost = sum(price * n for price, n in zip(args.price, tokens, strict=True)) / 1e6
        lines.append(f"cost: {cost:.4f}, at {args.price[0]:g} and {args.price[1]:g} a million tokens read and written")
    return "\n".join(lines)


def _digest(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)} {text}".encode())
    return digest.hexdigest()[:16]
