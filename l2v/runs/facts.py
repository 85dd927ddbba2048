"""Reads a run's files: stages, metrics, lineage, scores, origin of the data. Computes nothing new."""

from __future__ import annotations

import fnmatch
import json
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from l2v.errors import UserError, first_line
from l2v.model.lora import LINEAGE
from l2v.recipe import Recipe
from l2v.recipe.load import to_dict
from l2v.runs.folder import STAGE_FILE, result_of, stage_folders, stage_recipe
from l2v.runs.metrics import read_metrics
from l2v.runs.names import near


@dataclass
class StageFacts:
    """One stage: its part of the recipe as written, its rows of metrics, and its lineage if it is trained."""

    name: str
    objective: str
    recipe: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    lineage: dict[str, Any] | None = None

    @property
    def trained(self) -> bool:
        """Whether it has its adapter."""
        return self.lineage is not None

    def curve(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of every row with the key."""
        return [(row["step"], row[key]) for row in self.metrics if row.get(key) is not None]

    def throughput(self) -> dict[str, float | int | None]:
        """steps, tokens seen, median tokens/s and MFU over the rows, peak memory (GiB); None if not logged."""

        def of(key: str, reduce: Any) -> Any:
            values = [value for _, value in self.curve(key)]
            return reduce(values) if values else None

        return {
            "steps": of("loss", lambda _: max(step for step, _ in self.curve("loss"))),
            "tokens": of("tokens", max),
            "tokens_per_second": of("tokens_per_second", statistics.median),
            "mfu": of("mfu", statistics.median),
            "mfu_peak": of("mfu_peak", statistics.median),
            "peak_memory_gib": of("peak_memory_gib", max),
        }


@dataclass
class RunFacts:
    """One run. recipe: of its last stage; evaluation, quickstart: what `l2v eval` and `l2v quickstart` wrote there."""

    name: str
    folder: Path
    recipe: Recipe
    stages: list[StageFacts]
    evaluation: dict[str, Any] | None = None
    quickstart: dict[str, Any] | None = None
    missing: list[str] = field(default_factory=list)

    @property
    def last(self) -> StageFacts | None:
        """The last trained stage; the run's name refers to it."""
        return next((stage for stage in reversed(self.stages) if stage.trained), None)

    def tree(self) -> dict[str, Any]:
        """The recipe as plain values, with the keys that each trained stage actually used."""
        tree = to_dict(self.recipe)
        tree["stages"] = {stage.name: stage.recipe for stage in self.stages}
        return tree


def read_run(folder: Path, results: Path | None = None) -> RunFacts:
    """Read a run's folder. results: instead of RUN/eval/results.json. Missing parts are sentences in `missing`.

    Raises:
        UserError: if the folder is not a run, or one of its files is damaged.
    """
    stages = stage_folders(folder)
    if not stages and not folder.exists():
        hint = near(str(folder), "give the folder that 'l2v train' wrote")
        raise UserError(f"{folder}: not a run of l2v: no such folder{hint}")
    if not stages:
        raise UserError(
            f"{folder}: not a run of l2v (no STAGE/{STAGE_FILE} below it); give the folder that 'l2v train' wrote"
        )
    trees = {stage.name: stage_recipe(stage) for stage in stages}
    newest = max(stages, key=lambda stage: (stage / STAGE_FILE).stat().st_mtime).name
    recipe = trees[newest]
    order = recipe.order() + [name for name in trees if name not in recipe.stages]
    run = RunFacts(recipe.name, folder, recipe, [])
    for name in order:
        own = trees.get(name, recipe)
        stage = StageFacts(name, own.stages[name].objective, to_dict(own.stages[name]))
        stage.metrics = read_metrics(folder / name)
        trained = result_of(folder / name)
        stage.lineage = read_json(trained / LINEAGE) if trained else None
        if not stage.trained:
            began = "not finished" if stage.metrics else "not trained yet"
            run.missing.append(f"Stage {name} is {began}: l2v train resumes it.")
        run.stages.append(stage)
    run.quickstart = read_json(folder / "quickstart.json")
    run.evaluation = read_results(results) if results else read_json(folder / "eval" / "results.json")
    if run.evaluation is None:
        run.missing.append(
            f"No evaluation yet: l2v eval {folder} --stages --baselines tfidf,minilm scores the stages on the Danish tasks."
        )
    return run


def read_json(file: Path) -> dict[str, Any] | None:
    """A JSON file that l2v wrote; None if it does not exist.

    Raises:
        UserError: if it is damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}; write it again with the command that made it") from None


def read_results(file: Path) -> dict[str, Any]:
    """The results.json that a user names.

    Raises:
        UserError: if it is not one.
    """
    found = read_json(file)
    if found is None or not {"tasks", "rows"} <= found.keys():
        raise UserError(f"{file}: not the results.json that 'l2v eval' writes")
    return found


SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}\.parquet")


def build_report(path: str) -> dict[str, Any] | None:
    """What `l2v data build` says about the files that a source names: title; the splits they belong to; the sources with rows
    in those splits; `rows`, the rows of the files themselves.

    None if the files were not built by l2v, or are not on this machine and the report is not either.
    """
    if path.startswith(("hub:", "sample:")):
        return None
    place = Path(path).expanduser()
    folder, pattern = (place, "*.parquet") if place.is_dir() else (place.parent, place.name)
    done = read_json(folder / "report.json")
    if not done or not {"title", "sources", "splits"} <= done.keys():
        return None
    shards = {file: match["split"] for file in folder.glob(pattern) if (match := SHARD.fullmatch(file.name))}
    # Without the shards, by their names: one that stands for all of a split.
    names = set(shards.values()) or {
        n for n in done["splits"] if fnmatch.fnmatch(f"{n}-00000-of-00001.parquet", pattern)
    }
    splits = {name: count for name, count in done["splits"].items() if name in names}
    if not splits:
        return None
    sources = [source for source in done["sources"] if any(source["kept"].get(name) for name in splits)]
    rows = _rows(list(shards)) if shards else sum(splits.values())
    return done | {"splits": splits, "sources": sources, "rows": rows}


def _rows(files: list[Path]) -> int:
    """Rows of Parquet files, from their footers; so a single shard of a split counts as what it is.

    Raises:
        UserError: a file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    total = 0
    for file in files:
        try:
            total += pq.read_metadata(file).num_rows
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file}: not a readable Parquet file: {first_line(error)}") from None
    return total
