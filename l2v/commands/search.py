"""`l2v search MODEL ["tekst"]`: semantic search from the shell."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from l2v.commands.parser import add_loading, new_parser
from l2v.data.columns import absent
from l2v.data.find import find_files
from l2v.data.raw import columns
from l2v.errors import RecipeError, UserError
from l2v.runs.names import check_model

if TYPE_CHECKING:
    from rich.console import Console

    from l2v.search import Hit, IndexSearcher, Searcher


def main(argv: Sequence[str] | None = None) -> int:
    """Find the texts nearest to queries; vectors of a corpus are kept next to the run for the next search."""
    args = parser().parse_intermixed_args(argv)
    if args.query is not None and not args.query.strip():
        raise UserError("the query is empty; give a text to search for")
    if args.top < 1:
        raise UserError(f"--top is {args.top}; show at least 1")
    check_model(args.model)
    if args.index and args.texts:
        raise RecipeError("give --texts FILE or --index FILE, not both")
    if args.approximate_above is not None and not args.index:
        raise RecipeError("--approximate-above needs --index FILE, which l2v encode writes")
    if args.texts and not (":" in args.texts.partition("/")[0] and not Path(args.texts).exists()):
        files = find_files(args.texts)
        names, complete = columns(files[0], args.texts)
        if len(files) == 1 and complete and args.column != "text" and args.column not in names:
            raise UserError(absent(args.texts, args.column, names))
    # Imported here: a mistyped name is answered before torch and transformers are loaded, which takes seconds.
    from rich.console import Console

    searcher = _searcher(args)
    _say(searcher.notes)
    asked = sys.stdin.isatty() if args.query is None else False
    console = Console(soft_wrap=True)
    queries = [args.query] if args.query is not None else _asked() if asked else _lines()
    for query in queries:
        try:
            hits = searcher.find(query, args.top)
        except UserError as error:
            if not asked:
                raise
            _say([f"l2v: {error}"])  # the next query may be right
            continue
        if args.json:
            for rank, hit in enumerate(hits, 1):
                print(json.dumps({"query": query, "rank": rank} | hit.as_json(), ensure_ascii=False, default=str))
        else:
            _show(console, None if asked or args.query is not None else query, hits)
        sys.stdout.flush()
    if args.query is not None:
        kind, file = ("--index", args.index) if args.index else ("--texts", args.texts)
        texts = f" {kind} {shlex.quote(file)}" if file else ""
        again = f"l2v search {shlex.quote(args.model)}{texts}"
        _say([f"next: {again} asks for queries and keeps the model loaded; --json prints hits for programs"])
    return 0


def _searcher(args: argparse.Namespace) -> Searcher | IndexSearcher:
    from l2v.search import IndexSearcher, Searcher, read_corpus

    options = {
        "instruction": args.instruction, "precision": args.precision, "trust_remote_code": args.trust_remote_code,
    }  # fmt: skip
    if args.index:
        if args.length is not None:
            options["length"] = args.length
        return IndexSearcher(args.model, args.index, approximate_above=args.approximate_above, **options)
    notes: list[str] = []
    passages = read_corpus(args.texts, args.column, notes, fields=args.json)
    _say(notes)
    return Searcher(args.model, passages, length=args.length, **options)


def _say(notes: list[str]) -> None:
    for note in notes:
        print(note, file=sys.stderr)


def _show(console: Console, query: str | None, hits: list[Hit]) -> None:
    """Two lines a hit: score and text, then its place. query: as a heading."""
    if query is not None:
        console.print(f"> {query}", highlight=False, markup=False)
    for hit in hits:
        passage = hit.passage
        own = f", id {passage.id}" if passage.id is not None and passage.row is not None else ""
        text = " ".join(passage.text.split()) or "(an index of this kind holds no texts)"
        console.print(f"{hit.score:.3f}  {text}", highlight=False, markup=False)
        console.print(f"       {passage.where}{own}", highlight=False, markup=False, style="dim")


def _asked() -> Iterator[str]:
    """Queries typed at a prompt, until an empty line or the end of input."""
    while True:
        try:
            print("query (an empty line ends): ", end="", file=sys.stderr, flush=True)
            query = input().strip()
        except EOFError:
            print(file=sys.stderr)
            return
        if not query:
            return
        yield query


def _lines() -> Iterator[str]:
    """A query on each line of the standard input; blank lines are skipped."""
    try:
        for line in sys.stdin:
            if line.strip():
                yield line.strip()
    except UnicodeDecodeError as error:
        raise UserError(f"the queries of the standard input are not UTF-8: {error}") from None


def parser() -> argparse.ArgumentParser:
    """The arguments of `l2v search`."""
    p = new_parser(
        "search", "Find the texts nearest to a query; the vectors of a corpus are kept next to the run.",
        'runs/smollm2-135m-da "hvordan slipper jeg af med lus"', 'my-encoder "feriedage" --texts texts.txt --top 5',
        "my-encoder --texts faq.csv --json > hits.jsonl", "runs/faq feriedage --index faq.parquet",
    )  # fmt: skip
    p.add_argument("model", metavar="MODEL", help="a run, a stage of it, an export or a base")
    p.add_argument(
        "query", metavar="QUERY", nargs="?",
        help="what to look for; without it, queries are asked for, or read from a pipe, one a line",
    )  # fmt: skip
    p.add_argument(
        "--texts",
        metavar="FILE",
        help="a file, folder or glob (CSV, JSONL, Parquet, Excel, text) or hub:NAME to search (default: the Danish sample)",
    )
    p.add_argument(
        "--index", metavar="FILE", help="vectors that l2v encode wrote with the same model, searched exactly"
    )
    p.add_argument(
        "--approximate-above", type=int, metavar="N",
        help="search an index of more vectors with FAISS's HNSW, which may miss some (default: always exact)",
    )  # fmt: skip
    p.add_argument("--length", type=int, metavar="N", help="tokens of a text (default: the index's or the run's)")
    p.add_argument(
        "--column", default="text", metavar="COLUMN",
        help="the field that holds the text (default: text, or a common name like it)",
    )  # fmt: skip
    p.add_argument("--instruction", metavar="TEXT", help="instruction before the query (default: that of the training)")
    p.add_argument("--top", type=int, default=3, metavar="N", help="how many to show (default: 3)")
    p.add_argument("--json", action="store_true", help="one JSON object a hit: score, file, row, id, text, all fields")
    add_loading(p)
    return p
