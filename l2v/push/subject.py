"""What is pushed: a run's stage, an export, a folder prepared before, or a data set that was built."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from l2v.errors import UserError
from l2v.model.embedded import EMBEDDED
from l2v.model.export import ENCODER_FILE
from l2v.runs.facts import StageFacts, read_json, read_results, read_run
from l2v.runs.folder import is_stage, result_of, stage_folders
from l2v.runs.names import near

HUB_NAMES = {name: base.hub for name, base in EMBEDDED.items()}


@dataclass
class Model:
    """An encoder: a run's stage, or a finished export.

    stages: those it was trained in, oldest first, if known. settings: template, pooling, attention, length, precision.
    """

    name: str
    folder: Path
    base: str
    lineage: dict[str, Any]
    settings: dict[str, Any]
    evaluation: dict[str, Any] | None = None
    stages: list[StageFacts] = field(default_factory=list)
    export: bool = False

    @property
    def hashes(self) -> list[str]:
        """SHA-256 of every adapter in it, in the order of merging; they identify its row among the scores."""
        return _hashes(self.lineage)

    def row(self) -> dict[str, Any] | None:
        """Its row among the scores of `l2v eval`: the same adapters, pooling and attention."""
        for row in (self.evaluation or {}).get("rows", ()):
            identity = row["identity"]
            same = all(identity.get(key) == self.settings[key] for key in ("pooling", "attention"))
            if same and identity.get("merged") == self.hashes:
                return row
        return None


@dataclass
class Dataset:
    """A data set that `l2v data build` wrote. report: its report.json."""

    name: str
    folder: Path
    report: dict[str, Any]


@dataclass
class Ready:
    """A folder with a card that `l2v push --dry-run` (or a push that failed) left."""

    name: str
    folder: Path
    kind: str = "model"


def find(source: Path, results: Path | None) -> Model | Dataset | Ready:
    """Find out what a folder holds. results: a results.json instead of the run's own.

    Raises:
        UserError: if it cannot be pushed.
    """
    if not source.is_dir():
        remedy = "give a run, a stage of it, an export or a data set that l2v built"
        raise UserError(f"{source}: no such folder{near(str(source), remedy)}")
    if (source / ENCODER_FILE).is_file() and (source / "adapter_config.json").is_file():
        raise UserError(
            f"{source}: an unmerged adapter for serving; push the run that it was made from with --adapter-only"
        )
    if (source / ENCODER_FILE).is_file():
        return Ready(source.name, source) if (source / "README.md").is_file() else _export(source, results)
    if is_stage(source):
        return _stage(source.parent, source.name, results)
    if stage_folders(source):
        return _stage(source, None, results)
    report = read_json(source / "report.json")
    if report and {"title", "splits", "sources"} <= report.keys():
        return Dataset(report["name"], source, report)
    if (source / "adapter_config.json").is_file() and (source / "README.md").is_file():
        return Ready(source.name, source)
    raise UserError(f"{source}: neither a run, a stage, an export nor a data set that 'l2v data build' finished")


def _stage(folder: Path, name: str | None, results: Path | None) -> Model:
    run = read_run(folder, results)
    stage = next((s for s in run.stages if s.name == name), None) if name else run.last
    if stage is None or stage.lineage is None:
        raise UserError(f"{folder / (name or '')}: not fully trained yet; run 'l2v train' again to resume")
    through = [entry["stage"] for entry in stage.lineage["merged"] if "stage" in entry]
    base = run.recipe.base
    return Model(
        name=run.name if stage is run.last else f"{run.name}-{stage.name}",
        folder=folder / stage.name,
        base=base.model,
        lineage=stage.lineage,
        settings={
            "pooling": base.pooling, "attention": base.attention, "length": stage.recipe["length"],
            "template": vars(base.template), "precision": base.precision, "pooled": "all" if base.pool_prompt else "text",
        },
        evaluation=run.evaluation,
        stages=[s for s in run.stages if s.name in through or s is stage],
    )  # fmt: skip


def _export(folder: Path, results: Path | None) -> Model:
    try:
        facts = json.loads((folder / ENCODER_FILE).read_text(encoding="utf-8"))
        lineage = facts["lineage"]
        hashes, base = [entry["sha256"] for entry in lineage["merged"]], lineage["base"]["model"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder / ENCODER_FILE}: damaged; export again with 'l2v export'") from None
    model = Model(folder.name, folder, base, lineage, facts, export=True)
    if stage_folders(folder.parent):  # an export inside its run
        run = read_run(folder.parent, results)
        for stage in run.stages:
            if stage.lineage is not None and _hashes(stage.lineage) == hashes:
                through = [entry.get("stage") for entry in stage.lineage["merged"]]
                model.evaluation, model.stages = (
                    run.evaluation,
                    [s for s in run.stages if s.name in through or s is stage],
                )
    elif results:
        model.evaluation = read_results(results)
    return model


def _hashes(lineage: dict[str, Any]) -> list[str]:
    """Of what is put into the base, in order: earlier adapters and its own; of a stage without LoRA, its own alone."""
    own = lineage.get("adapter") or {}
    earlier = [] if trained_all(lineage) else [entry["sha256"] for entry in lineage["merged"]]
    return [*earlier, own["sha256"]] if own else earlier


def trained_all(lineage: dict[str, Any]) -> bool:
    """Whether a stage was trained without LoRA, so that its weights have all before it in them."""
    return (lineage.get("adapter") or {}).get("weights") == "all"


def earlier_adapters(model: Model) -> list[tuple[str, Path | None]]:
    """Adapters merged before a stage's own, oldest first: a name, and the folder on this machine (None: on the hub)."""
    out: list[tuple[str, Path | None]] = []
    for at, entry in enumerate(model.lineage["merged"]):
        beside = result_of(model.folder.parent / entry["stage"]) if "stage" in entry else None
        folder = beside or Path(entry["adapter"])
        if folder.is_dir():
            out.append((f"adapters/{at + 1}-{entry.get('stage', folder.name)}", folder))
        else:
            out.append((entry["adapter"], None))
    return out


def adapters_lineage(model: Model, base: str) -> dict[str, Any]:
    """The lineage of a stage's adapter, with paths in the pushed folder instead of local paths."""
    places = [place for place, _ in earlier_adapters(model)]
    merged = [entry | {"adapter": place} for entry, place in zip(model.lineage["merged"], places, strict=True)]
    return model.lineage | {"base": model.lineage["base"] | {"model": base}, "merged": merged}


def export_lineage(model: Model, base: str) -> dict[str, Any]:
    """The lineage of a merged encoder, without local paths: every adapter in it by stage or name.

    A stage without LoRA stands alone, as `Encoder.save` writes it.
    """
    merged = (
        []
        if trained_all(model.lineage)
        else [
            entry | {"adapter": entry.get("stage") or (Path(place).name if folder else place)}
            for entry, (place, folder) in zip(model.lineage["merged"], earlier_adapters(model), strict=True)
        ]
    )
    if own := model.lineage.get("adapter"):
        merged.append({"adapter": model.lineage["stage"], **own})
    return {"base": model.lineage["base"] | {"model": base}, "merged": merged}


def public_base(model: str) -> str:
    """A base's public name: that on the hub, or the last part of a folder's path."""
    return HUB_NAMES.get(model) or (Path(model).name if Path(model).is_absolute() or Path(model).exists() else model)
