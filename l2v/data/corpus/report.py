"""What a build did: report.json, report.md and the data-set card; interruptions do not change a byte."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from l2v.data.corpus import card, duplicates, shards
from l2v.data.corpus.chunk import read_tally
from l2v.data.corpus.config import Build
from l2v.data.corpus.tally import CHANGES, EXAMPLES, REASONS, Tally
from l2v.files import replace_text
from l2v.recipe.load import to_dict


@dataclass(frozen=True)
class Found:
    """The inputs of a report."""

    config: Build
    errors: dict[int, str]
    sets: list[dict[str, Any]]
    rows: duplicates.Rows
    fate: np.ndarray
    kept: np.ndarray
    chunks: Sequence[Path]
    examples: list[list[int]]


def make(found: Found) -> dict[str, Any]:
    """The report as plain values.

    Raises:
        RuntimeError: if the counts of a source do not add up.
    """
    config, names = found.config, found.config.split_names()
    tallies = [Tally() for _ in config.sources]
    source_of = [int(path.name[1:4]) for path in found.chunks]
    for chunk, path in enumerate(found.chunks):
        tally = tallies[source_of[chunk]]
        tally.add(read_tally(path))
        fate, _ = duplicates.fates(found.rows, found.fate, chunk)
        for number, reason in duplicates.FATES.items():
            if count := int((fate == number).sum()):
                tally.dropped[reason] += count
        for split, count in zip(names, found.kept[chunk].tolist(), strict=True):
            if count:
                tally.kept[split] += count
    _examples(found, tallies, source_of)
    for source, tally in zip(config.sources, tallies, strict=True):
        if not tally.adds_up:
            raise RuntimeError(f"{source.source}: the counts of a build do not add up: {tally}")
        tally.examples = {what: texts[: config.examples] for what, texts in tally.examples.items() if config.examples}
    settings = to_dict(config)
    for key in ("folder", "out", "sources"):
        settings.pop(key)
    sources = [
        {
            "label": source.source, "path": source.path, "licence": source.licence, "origin": source.origin,
            "revision": source.revision, "published_rows": source.published_rows, "error": found.errors.get(number),
            **tally.plain(),
        }
        for number, (source, tally) in enumerate(zip(config.sources, tallies, strict=True))
    ]  # fmt: skip
    total = Tally()
    for tally in tallies:
        total.add(tally)
    splits = {name: int(count) for name, count in zip(names, found.kept.sum(axis=0), strict=True)}
    return {
        "name": config.name,
        "title": config.title or config.name,
        "kind": config.kind,
        "settings": settings,
        "near": duplicates.describe(config.near),
        "evaluation_sets": found.sets,
        "records": total.records,
        "made": total.made,
        "dropped": _ordered(total.dropped, REASONS),
        "changed": _ordered(total.changed, CHANGES),
        "splits": splits,
        "sources": sources,
    }


def _ordered(counts: Counter[str], names: dict[str, str]) -> dict[str, int]:
    return {name: counts[name] for name in names if counts[name]}


def _examples(found: Found, tallies: list[Tally], source_of: list[int]) -> None:
    """A few duplicates of each source, with the rows that they repeat."""
    for gone, stays in found.examples:
        chunk = int(np.searchsorted(found.rows.starts, gone, side="right")) - 1
        tally, reason = tallies[source_of[chunk]], duplicates.FATES[int(found.fate[gone])]
        if len(tally.examples.get(reason, ())) < EXAMPLES:
            one, two = (shards.row_of(found.rows, found.chunks, found.config.kind, n) for n in (gone, stays))
            tally.show(reason, f"{one['id']} repeats {two['id']}", one.get("text") or one["query"])


def write(done: dict[str, Any], config: Build, out: Path) -> None:
    """Write card, Markdown and JSON; the JSON comes last and marks the build as finished."""
    texts = {
        "README.md": card.render(done, config),
        "report.md": render(done),
        "report.json": json.dumps(done, ensure_ascii=False, indent=1) + "\n",
    }
    for name, text in texts.items():
        replace_text(out / name, text)


def summary(done: dict[str, Any]) -> str:
    """What the command line prints at the end."""
    lines = [f"{done['records']:,} records, {done['made']:,} rows"]
    lines += [f"  dropped  {reason:<16}{count:>12,}  {REASONS[reason]}" for reason, count in done["dropped"].items()]
    lines += [f"  kept     {split:<16}{count:>12,}" for split, count in done["splits"].items()]
    return "\n".join(lines)


def problems(done: dict[str, Any]) -> list[str]:
    """A sentence for each source that is not complete and each evaluation set that could not be read."""
    sources = [f"incomplete source: {s['error']}" for s in done["sources"] if s["error"]]
    return sources + [f"not checked against: {s['error']}" for s in done["evaluation_sets"] if s["error"]]


def render(done: dict[str, Any]) -> str:
    """The Markdown report."""
    parts = [f"# {done['title']}: what was built\n"]
    if bad := problems(done):
        parts.append("\n".join(f"**{sentence}**" for sentence in bad) + "\n")
    parts.append(
        f"{done['records']:,} records gave {done['made']:,} rows; {sum(done['splits'].values()):,} were kept: "
        + ", ".join(f"{name} {count:,}" for name, count in done["splits"].items())
        + ".\n"
    )
    parts.append("## Sources\n")
    parts.append(card.sources_table(done))
    parts.append("\n## Dropped\n")
    heads = ["reason", *(s["label"] for s in done["sources"]), "together"]
    rows = [
        [f"{reason}: {REASONS[reason]}", *(f"{s['dropped'].get(reason, 0):,}" for s in done["sources"]), f"{count:,}"]
        for reason, count in done["dropped"].items()
    ]
    parts.append(card.table(heads, rows) if rows else "Nothing.")
    if done["changed"]:
        parts.append("\n## Repaired and kept\n")
        parts.append(
            card.table(["what", "texts"], [[f"{w}: {CHANGES[w]}", f"{n:,}"] for w, n in done["changed"].items()])
        )
    parts.append("\n## Filters\n")
    parts.append(card.filters(done))
    if any(s["examples"] for s in done["sources"]):
        parts.append("\n## Examples\n")
    for reason in [*REASONS, *CHANGES]:
        found = [(s["label"], *e) for s in done["sources"] for e in s["examples"].get(reason, ())]
        if found:
            parts.append(f"### {reason}\n")
            parts += [f"- {label}, {where}: {card.cell(text)}" for label, where, text in found]
            parts.append("")
    return "\n".join(parts).rstrip() + "\n"
