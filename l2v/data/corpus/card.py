"""The data-set card: README.md with the front matter that the Hub reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from l2v.data.corpus.config import Build
from l2v.data.corpus.near import found_share
from l2v.data.corpus.tally import RECORD_REASONS

HUB_LICENCES = frozenset(
    (
        "apache-2.0",
        "mit",
        "cc0-1.0",
        "cc-by-2.0",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc-by-sa-3.0",
        "cc-by-sa-4.0",
        "cc-by-nc-4.0",
        "cc-by-nc-sa-4.0",
        "gfdl",
        "gpl",
        "gpl-2.0",
        "gpl-3.0",
        "lgpl",
        "lgpl-3.0",
        "bsd",
        "bsd-3-clause",
        "odc-by",
        "odbl",
        "unlicense",
        "unknown",
        "other",
    )
)
"""Licence identifiers of the Hub that are used for text."""
TASKS = {
    "documents": ["fill-mask", "text-generation"],
    "sentences": ["sentence-similarity", "feature-extraction"],
    "pairs": ["sentence-similarity", "text-retrieval"],
}
SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
)
FIELDS = {
    "text": "the text",
    "query": "the search query",
    "positive": "a text that answers it",
    "negatives": "a list of texts that do not answer it, often empty",
    "instruction": "the query's instruction, or null",
    "document_instruction": "the documents' instruction, or null",
    "id": "source, and the id or number of the row there",
    "source": "which source it is from",
    "licence": "the licence of that source",
    "document": "the document it is from",
    "group": "rows that belong together: they share a split, and are false negatives of each other",
    "section": "a topic label, if the source has one",
    "lang": "its language; of a pair, the positive's",
}


def cell(text: str) -> str:
    """Text escaped for a Markdown table cell."""
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["-"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def sources_table(done: dict[str, Any]) -> str:
    """Sources with provenance, licence and counts."""
    rows = []
    for s in done["sources"]:
        where = s["origin"] or s["path"]
        if s["revision"]:
            where += f" at {s['revision'][:12]}"
        published = "" if s["published_rows"] is None else f"{s['published_rows']:,}"
        dropped = sum(n for r, n in s["dropped"].items() if r not in RECORD_REASONS)
        kept = sum(s["kept"].values())
        counts = [published, *(f"{n:,}" for n in (s["records"], s["made"], dropped, kept))]
        rows.append([cell(s["label"]), cell(where), s["licence"], *counts])
    return table(["source", "from", "licence", "published rows", "records", "rows", "rows dropped", "kept"], rows)


def filters(done: dict[str, Any]) -> str:
    """The filters in the order in which they are applied, with their settings."""
    keys = done["settings"]
    out = ["- Text: Unicode NFC, one kind of space, no control characters; markup removed where the source has it."]
    if done["kind"] == "sentences":
        s = keys["sentences"]
        out.append(f"- Sentences: split by rules for Danish; {s['least']} to {s['most']} words are kept.")
    if language := keys["language"]:
        out.append(
            f"- Language (py3langid, by the first {language['characters']} characters): "
            f"{', '.join(language['keep'])} of {', '.join(language['among'])}, or the languages that a source names; texts under "
            f"{language['short']} characters are not checked."
        )
    for key, (least, most) in keys["length"].items():
        if (key == "text") == (done["kind"] == "documents") and done["kind"] != "sentences":
            out.append(f"- Length of {key}: {least:,} to {most:,} words.")
    leaks = keys["decontaminate"]
    for held in done["evaluation_sets"]:
        read = f"not read ({held['error']})" if held["error"] else f"{held['texts']:,} texts"
        out.append(
            f"- Evaluation set {held['path']}: {read}; a row is dropped if it is one of its texts, contains a whole one of "
            f"{leaks['least']} words or more, or shares {leaks['ngram']} consecutive words."
        )
    if not done["evaluation_sets"]:
        out.append("- No evaluation set was named: the rows were not checked for leaks.")
    if keys["exact"]:
        out.append("- Duplicates: rows with the same words (ignoring case and punctuation); the first is kept.")
    if near := done["near"]:
        from l2v.data.corpus.config import Near

        share = found_share(near["threshold"], Near(near["threshold"], near["permutations"], near["words"]))
        out.append(
            f"- Near-duplicates: MinHash of word {near['words']}-grams, {near['permutations']} permutations in "
            f"{near['bands']} bands of {near['rows_per_band']}, finds candidates; a row is dropped if it shares at least "
            f"{near['threshold']:.0%} of its {near['words']}-grams with an earlier row (Jaccard). Of pairs exactly at "
            f"the threshold, {share:.1%} become candidates."
        )
    shares = ", ".join(f"{name} {share:g}" for name, share in keys["splits"].items())
    out.append(f"- Splits by a hash of `group` (seed {keys['seed']}): {shares}.")
    return "\n".join(out)


def render(done: dict[str, Any], config: Build) -> str:
    """The card."""
    used = [s for s in done["sources"] if sum(s["kept"].values())]
    licences = list(dict.fromkeys(s["licence"] for s in used))
    known = list(dict.fromkeys(x if x in HUB_LICENCES else "other" for x in licences))
    total = sum(done["splits"].values())
    languages = config.language.keep if config.language else ["da"]
    languages = list(dict.fromkeys([*languages, *(c for s in config.sources for c in s.languages or ())]))
    front: dict[str, Any] = {
        "language": languages,
        "license": known[0] if len(known) == 1 else known,
        "pretty_name": done["title"],
        "task_categories": TASKS[done["kind"]],
        "size_categories": [next((name for most, name in SIZES if total < most), "n>10M")],
        "source_datasets": [s["path"].removeprefix("hub:") for s in used if s["path"].startswith("hub:")],
        "configs": [
            {
                "config_name": "default",
                "data_files": [
                    {"split": name, "path": f"{name}-*.parquet"} for name, count in done["splits"].items() if count
                ],
            }
        ],
        "tags": ["l2v", done["kind"]],
    }
    if "other" in known and len(licences) == 1:
        front["license_name"] = licences[0]
    front = {key: value for key, value in front.items() if value}
    fields = SCHEMA_ORDER[done["kind"]]
    splits = table(["split", "rows"], [[name, f"{count:,}"] for name, count in done["splits"].items()])
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, allow_unicode=True, sort_keys=False).rstrip(),
            "---\n",
            f"# {done['title']}\n",
            f"{total:,} {done['kind']}, built with `l2v data build`. Each row names its source and its licence.\n",
            splits,
            "\n## Sources\n",
            sources_table(done),
            "\n## Columns\n",
            table(["column", "holds"], [[f"`{name}`", FIELDS[name]] for name in fields]),
            "\n## Filters\n",
            filters(done),
            "\nWhat each of them dropped, with examples: report.md. Counts as JSON: report.json.\n",
            "## Use\n",
            "```python",
            "import datasets",
            f'rows = datasets.load_dataset("parquet", data_files="{next(iter(done["splits"]))}-*.parquet", split="train")',
            "```\n",
            "In a recipe of l2v: `data: FOLDER/" + next(iter(done["splits"])) + "-*.parquet`.\n",
        ]
    )


_LABELS = ("id", "source", "licence", "document", "group", "section", "lang")
SCHEMA_ORDER = {
    "documents": ("text", *_LABELS),
    "sentences": ("text", *_LABELS),
    "pairs": ("query", "positive", "negatives", "instruction", "document_instruction", *_LABELS),
}
