"""Tables of a report: headings and cells as text, for the page and the Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from l2v.errors import UserError
from l2v.evaluation import remarks
from l2v.evaluation.seb import BY_NAME, SEB_DA
from l2v.runs.facts import RunFacts, StageFacts, build_report

OWN, POSTER = "this report", "poster"
CAPTION = "The twelve Danish tasks of the Scandinavian Embedding Benchmark, in percent"


@dataclass
class Row:
    """Cells as text; mark is the origin of a highlighted row (empty: not highlighted). best: columns to mark in it."""

    cells: list[str]
    mark: str = ""
    best: Sequence[int] = ()


@dataclass
class Table:
    """words: number of text columns at the left; the rest are numbers. names: index of the column with the row's name."""

    caption: str
    heads: list[str]
    rows: list[Row]
    words: int = 1
    names: int = 0
    notes: list[str] = field(default_factory=list)

    def without_empty(self) -> Table:
        """The table without its empty columns."""
        kept = [at for at in range(len(self.heads)) if any(row.cells[at] for row in self.rows)]
        rows = [
            Row([row.cells[at] for at in kept], row.mark, [kept.index(at) for at in row.best if at in kept])
            for row in self.rows
        ]
        words = sum(at < self.words for at in kept)
        return replace(self, heads=[self.heads[at] for at in kept], rows=rows, words=words)


# Name, mark, mean, scores by task in percent, size, width.
SebRow = tuple[str, str, float | None, Mapping[str, float | None], str, str]


def seb_table(runs: Sequence[RunFacts]) -> tuple[Table | None, list[str]]:
    """The twelve Danish tasks of SEB: the runs' rows among the published ones, by mean. Also returns notes on what is missing."""
    missing: list[str] = []
    notes: list[str] = []
    rest: list[SebRow] = []
    averages: dict[str, float] = {}
    found = [row for run in runs for row in _seb_rows(run, len(runs) > 1)]
    own = [row for at, row in enumerate(found) if row not in found[:at]]  # without repeated baselines of several runs
    try:
        from l2v.evaluation import published as module

        rows = module.published()
        notes = [note.replace("`", "").replace("Bold:", "Marked:") for note in module.notes(rows) if note]
        averages = module.POSTER_AVERAGES
        rest = [
            (row.model, row.mark or "", row.mean, row.scores, module.size_text(row.size), str(row.width or ""))
            for row in rows
        ]
    except (ImportError, UserError) as error:
        missing.append(f"No published models: {error}.")
        rest, averages = [], {}
    if runs and not own:
        missing.append("No row of these runs has one of the twelve tasks yet: l2v eval RUN --stages computes them.")
    if not own and not rest:
        return None, missing
    poster: list[SebRow] = [
        (f"{name} (average printed by the poster)", POSTER, mean, {}, "", "") for name, mean in averages.items()
    ]
    everything = [*own, *rest, *poster]
    everything.sort(key=lambda row: -(row[2] if row[2] is not None else -1))
    lines, rank = [], 0
    for name, mark, mean, scores, size, width in everything:
        ranked = mean is not None and mark != POSTER
        rank += ranked
        cells = [str(rank) if ranked else "", name, size, width, _two(mean)]
        lines.append(Row([*cells, *(_two(scores.get(task.name)) for task in SEB_DA)], mark))
    heads = ["Rank", "Model", "Size", "Width", "Mean", *(task.column for task in SEB_DA)]
    return Table(CAPTION, heads, lines, words=2, names=1, notes=notes), missing


def _seb_rows(run: RunFacts, several: bool) -> list[SebRow]:
    out: list[SebRow] = []
    for row in (run.evaluation or {}).get("rows", ()):
        mean, scores = _cells(row)
        if scores:
            out.append((_name(run, row, several), OWN, mean, scores, "", ""))
    return out


def _cells(row: dict[str, Any]) -> tuple[float | None, dict[str, float]]:
    """The mean of the twelve (None if one is missing), and each task's SEB cell, in percent."""
    scores = {}
    for name in BY_NAME.keys() & row["scores"].keys():
        task = BY_NAME[name]
        cell = row["scores"][name]["cells"].get(f"{task.split}/{task.subset}")
        if cell is not None:
            scores[name] = 100 * cell
    return sum(scores.values()) / len(scores) if len(scores) == len(SEB_DA) else None, scores


def seb_rows_table(rows: Sequence[dict[str, Any]]) -> Table | None:
    """Rows of results.json on the twelve tasks, without the published ones; None if no row has a cell."""
    found = [(row["name"], *_cells(row)) for row in rows if _cells(row)[1]]
    lines = [Row([name, _two(mean), *(_two(scores.get(task.name)) for task in SEB_DA)]) for name, mean, scores in found]
    return Table(CAPTION, ["Model", "Mean", *(task.column for task in SEB_DA)], lines) if lines else None


def own_scores(run: RunFacts) -> list[Table]:
    """Scores on the user's own tasks, one table for each local benchmark; those of the quickstart are such scores too."""
    quick = quickstart_table(run)
    report = run.evaluation
    own = remarks.own_tasks(report) if report else []
    return [*([quick] if quick else []), *(task_tables(report, own) if report else [])]


def other_scores(run: RunFacts) -> list[Table]:
    """Scores on mteb's tasks that are not among SEB's twelve."""
    report = run.evaluation
    if not report:
        return []
    own = remarks.own_tasks(report)
    return task_tables(report, [name for name in report["tasks"] if name not in own and name not in BY_NAME])


def local_tables(report: dict[str, Any]) -> list[Table]:
    """Scores of all tasks but SEB's twelve: own tasks first, a table for each local benchmark and one for mteb's tasks."""
    own = remarks.own_tasks(report)
    rest = [name for name in report["tasks"] if name not in own and name not in BY_NAME]
    return task_tables(report, own) + task_tables(report, rest)


def task_tables(report: dict[str, Any], tasks: Sequence[str]) -> list[Table]:
    """A table for each benchmark of the tasks: a row for each model, the best of each task marked, intervals, comparisons."""
    groups: dict[str, list[str]] = {}
    for name in tasks:
        groups.setdefault(remarks.benchmark_of(report, name), []).append(name)
    out = []
    for local, names in groups.items():
        top = {name: remarks.best(report, name) for name in names}
        rows = [
            Row(
                [row["name"], *(_scored(row["scores"].get(name)) for name in names)],
                best=[column for column, name in enumerate(names, 1) if at in top[name]],
            )
            for at, row in enumerate(report["rows"])
            if row["scores"].keys() & set(names)
        ]
        if rows:
            heads = ["Model", *(remarks.short(report, name) for name in names)]
            caption = f"Local benchmark “{local}”, in percent" if local else "Other tasks of mteb, in percent"
            out.append(Table(caption, heads, rows, notes=_task_notes(report, names)))
    return out


def _task_notes(report: dict[str, Any], names: Sequence[str]) -> list[str]:
    """Below a table of scores: TF-IDF if it wins, the metrics, and how sure the differences are."""
    used = {
        f"{row['scores'][n]['metric']} ({remarks.short(report, n)})"
        for row in report["rows"]
        for n in names
        if n in row["scores"]
    }
    counts = remarks.counts(report, names)
    lexical = remarks.lexical(report, names)
    return [
        *([lexical] if lexical else []),
        "Scores: " + ", ".join(sorted(used)) + ".",
        *([f"In brackets, {counts}"] if counts else []),
        *remarks.comparisons(report, names),
    ]


def evaluation_notes(run: RunFacts) -> list[str]:
    """What the evaluation skipped, and which baselines are missing."""
    report = run.evaluation
    if not report:
        return []
    notes = dict.fromkeys(text for row in report["rows"] for text in row["failed"].values())
    notes |= dict.fromkeys(report.get("not_built", {}).values()) | dict.fromkeys(
        report.get("models_left_out", {}).values()
    )
    notes |= dict.fromkeys(report.get("notes", ()))
    known = {str(row["identity"].get("baseline", "")) for row in report["rows"]}
    for name, key in (("TF-IDF", "tfidf"), ("all-MiniLM-L6", "all-MiniLM-L6-v2")):
        if key not in known:
            notes[f"No {name} row: l2v eval RUN --baselines tfidf,minilm computes it with the stages."] = None
    return list(notes)


def quickstart_table(run: RunFacts) -> Table | None:
    """The quickstart's scores on its held-out questions."""
    quick = run.quickstart
    if not quick:
        return None
    top = max(row["ndcg_at_10"] for row in quick["rows"])
    rows = [
        Row(
            [
                row["name"], f"{row['ndcg_at_10']:.3f}", f"{row['ndcg_low']:.3f} to {row['ndcg_high']:.3f}",
                *(f"{row[key]:.3f}" for key in ("ndcg_plain", "ndcg_colloquial", "ndcg_disjoint", "recall_at_1")),
            ],
            best=[1] if row["ndcg_at_10"] == top else [],
        )
        for row in quick["rows"]
    ]  # fmt: skip
    heads = ["Model", "nDCG@10", "95% interval", "plain", "colloquial", "no shared word", "recall@1"]
    caption = f"{quick['queries']} held-out questions of the Danish sample against {quick['passages']} passages"
    return Table(caption, heads, rows, notes=_quickstart_notes(quick))


def _quickstart_notes(quick: dict[str, Any]) -> list[str]:
    lexical = [row["ndcg_at_10"] for row in quick["rows"] if row["name"].startswith("TF-IDF")]
    score, name = max((row["ndcg_at_10"], row["name"]) for row in quick["rows"] if not row["name"].startswith("TF-IDF"))
    parts = [f"{lexical[0]:.3f} against {score:.3f} of {name}"] if lexical and lexical[0] > score else []
    beaten = remarks.beaten(parts)
    return [
        *([beaten] if beaten else []),
        *(
            f"{pair['better']} is {pair['difference']:+.3f} nDCG@10 above {pair['than']} (paired bootstrap, 95%: "
            f"{pair['low']:+.3f} to {pair['high']:+.3f})."
            for pair in quick.get("paired", ())
        ),
    ]


def throughput_table(run: RunFacts) -> Table:
    """Speed and memory of every stage, from its metrics."""
    rows = []
    for stage in run.stages:
        found = stage.throughput()
        rows.append(
            Row([
                stage.name, _count(found["steps"]), _count(found["tokens"]), _one(found["tokens_per_second"]),
                _share(found["mfu"]), _share(found["mfu_peak"]), _one(found["peak_memory_gib"], 2),
            ])
        )  # fmt: skip
    heads = ["Stage", "Steps", "Tokens", "Tokens/s", "MFU, of measured", "MFU, of data sheet", "Peak memory, GiB"]
    caption = "Throughput: medians over the steps that were logged, peak memory"
    table = Table(caption, heads, rows).without_empty()
    if "MFU, of measured" not in table.heads:
        table.notes.append("MFU was not logged: it needs the rates that l2v doctor measures.")
    return table


def lineage_table(run: RunFacts) -> Table:
    """What each adapter was trained on."""
    rows = []
    for stage in run.stages:
        line = stage.lineage
        if line:
            base = line["base"]
            merged = " → ".join(f"{e.get('stage', e['adapter'])} {e['sha256'][:12]}" for e in line["merged"])
            own = (line.get("adapter") or {}).get("sha256", "")
            precision = f", base in {line['base_precision']}" if "base_precision" in line else ""
            revision = f" at {base['revision']}" if base.get("revision") else ""
            hashed = f" ({base['sha256'][:12]})" if base.get("sha256") else ""
            rows.append(
                Row(
                    [
                        stage.name,
                        f"{base['model']}{revision}{hashed}",
                        merged or "none",
                        line["dtype"] + precision,
                        own[:12],
                    ]
                )
            )
    heads = ["Stage", "Base (SHA-256)", "Merged before it (SHA-256)", "Trained in", "Adapter (SHA-256)"]
    return Table(
        "Lineage: each stage's adapter applies to the base with these adapters merged into it", heads, rows, words=5
    )


def data_table(run: RunFacts) -> Table:
    """The sources of every stage, with the facts of `l2v data build` if it built them."""
    rows = []
    for stage in run.stages:
        for key, role in (("data", "training"), ("eval_data", "held out")):
            for source in stage.recipe[key]:
                rows.append(Row([stage.name, role, _place(source), *provenance(source)]))
    heads = ["Stage", "Use", "Source", "Read as", "Made from", "Licence", "Rows"]
    return Table(
        "Data: what the recipe names; origin and licence if l2v data build built it", heads, rows, words=6
    ).without_empty()


def hyperparameters(stages: Sequence[StageFacts]) -> Table:
    """The hyperparameters of a stage."""
    keys = (
        "objective",
        "from",
        "steps",
        "batch",
        "length",
        "lr",
        "warmup",
        "scale",
        "negatives",
        "mask_probability",
        "attention_dropout",
    )
    rows = [
        Row([key, *(_value(stage.recipe.get(key)) for stage in stages)])
        for key in keys
        if any(stage.recipe.get(key) is not None for stage in stages)
    ]
    loras = [stage.recipe["lora"] for stage in stages]
    shown = (f"{x['r']}, {x['alpha']:g}, {x['dropout']:g}" if x else "none, all weights trained" for x in loras)
    rows.append(Row(["LoRA r, alpha, dropout", *shown]))
    return Table("Hyperparameters of the stages", ["Key", *(stage.name for stage in stages)], rows)


def _place(source: dict[str, Any]) -> str:
    extra = [
        source[key] for key in ("name", "split", "revision") if source.get(key) and source["path"].startswith("hub:")
    ]
    return ", ".join([source["path"], *extra])


def provenance(source: dict[str, Any]) -> list[str]:
    """How a source is read, what it is made from, under which licences, and its rows, as far as known."""
    columns = "sentences" if source.get("sentences") else source.get("task") or ""
    read = ", ".join(filter(None, [columns, f"at most {source['limit']:,} rows" if source.get("limit") else ""]))
    if source["path"].startswith("sample:"):
        return [read, "the Danish sample of l2v, written for it", "CC0-1.0", ""]
    if (done := build_report(source["path"])) is None:
        return [read, "", "", ""]
    licences = ", ".join(dict.fromkeys(s["licence"] for s in done["sources"]))
    rows = min(done["rows"], source.get("limit") or done["rows"])
    return [read, f"{done['title']}: " + ", ".join(s["label"] for s in done["sources"]), licences, f"{rows:,}"]


def _name(run: RunFacts, row: dict[str, Any], several: bool) -> str:
    return f"{run.name}: {row['name']}" if several and "baseline" not in row["identity"] else row["name"]


def _value(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _scored(score: dict[str, Any] | None) -> str:
    """A score in percent, with its interval."""
    if score is None:
        return ""
    interval = remarks.interval(score)
    return f"{100 * score['score']:.2f}" + (f" ({interval})" if interval else "")


def _two(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _one(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"
