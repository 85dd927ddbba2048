"""The model card: README.md with the front matter that the Hub reads, scores in its model-index."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from l2v.model.engines import Report
from l2v.push.licence import Licence
from l2v.push.subject import Model, earlier_adapters, public_base
from l2v.report.page import table_text
from l2v.report.tables import Row, Table, hyperparameters, local_tables, provenance, seb_rows_table
from l2v.runs.facts import build_report

DESCRIPTIONS = {
    "mntp": "masked next-token prediction",
    "simcse": "SimCSE (the same text under two dropouts)",
    "supervised": "contrastive learning on pairs",
}
TRIAL_STEPS = 200  # published recipes train longer; the card of a model with fewer steps says so


def render(
    model: Model, repo: str, licence: Licence, *, base: str, adapter: bool, engines: Sequence[Report] = ()
) -> str:  # fmt: skip
    """The card. base: its name on the hub; adapter: the card is for the adapters, not for a merged encoder. engines: what
    each makes of the export.
    """
    name, row = repo.rsplit("/", 1)[-1], model.row()
    earlier = earlier_adapters(model)
    template = model.settings["template"]
    sources = [source for stage in model.stages for source in stage.recipe["data"]]
    steps = sum(stage.recipe["steps"] for stage in model.stages)
    facts = {
        "name": name,
        "repo": repo,
        "base": base,
        "licence": licence,
        "adapter": adapter,
        "settings": model.settings,
        "template": ", ".join(f"{key}={value!r}" for key, value in template.items()),
        "earlier": [f'f"{{folder}}/{place}"' if folder else f'"{place}"' for place, folder in earlier],
        "stages": [{"description": DESCRIPTIONS.get(stage.objective, stage.objective)} for stage in model.stages],
        "hyperparameters": hyperparameters(model.stages) if model.stages else None,
        "data": _data(model),
        "lineage": _lineage(model),
        "base_hash": model.lineage["base"].get("sha256"),
        "scores": _scores(model),
        "instructions": any(
            source.get("instruction") or source.get("query_prompt") or source.get("task") for source in sources
        ),
        "pool_prompt": model.settings.get("pooled", "text") == "all",
        "engines": _engines(engines),
        "short": steps if model.stages and steps < TRIAL_STEPS else None,
    }
    environment = jinja2.Environment(loader=jinja2.PackageLoader("l2v.push", "."), undefined=jinja2.StrictUndefined)
    environment.filters["markdown"] = table_text
    body = re.sub(r"\n{3,}", "\n\n", environment.get_template("card.md").render(facts)).strip()
    data = ModelCardData(
        language="da",
        license=licence.identifier,
        library_name="peft" if adapter else "sentence-transformers",
        pipeline_tag="feature-extraction" if adapter else "sentence-similarity",
        base_model=base,
        base_model_relation="adapter" if adapter else "finetune",
        datasets=_datasets(sources) or None,
        tags=["l2v", "llm2vec", "danish", *(["lora"] if adapter else ["sentence-transformers", "feature-extraction"])],
        model_name=name if row else None,
        eval_results=results(row) if row else None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"


def results(row: dict[str, Any]) -> list[EvalResult]:
    """A row of results.json for the Hub's model-index: one result for each cell, in percent."""
    out = []
    for name, score in row["scores"].items():
        dataset = _hub_dataset(name)
        for cell, value in score["cells"].items():
            split, subset = cell.split("/", 1)
            out.append(
                EvalResult(
                    task_type=score["type"], dataset_type=dataset, dataset_name=f"{name} ({subset})", dataset_config=subset,
                    dataset_split=split, dataset_revision=score["revision"], metric_type=score["metric"],
                    metric_value=round(100 * value, 4),
                )
            )  # fmt: skip
    return out


def _hub_dataset(task: str) -> str:
    """The data set of a task on the Hub; a local task keeps its own name."""
    try:
        import mteb

        return mteb.get_task(task).metadata.dataset["path"]
    except Exception:  # mteb is optional, and raises several kinds of KeyError
        return task


def _scores(model: Model) -> list[Table]:
    """The model's own row and those of the baselines of the same evaluation."""
    row = model.row()
    if row is None or model.evaluation is None:
        return []
    rows = [row, *(r for r in model.evaluation["rows"] if "baseline" in r["identity"])]
    seb = seb_rows_table(rows)
    return [*([seb] if seb else []), *local_tables(model.evaluation | {"rows": rows})]


def _engines(engines: Sequence[Report]) -> Table:
    rows = [Row([engine.name, engine.vectors or f"not for it: {engine.refused}"]) for engine in engines]
    return Table("Engines", ["Engine", "Vectors"], rows, words=2)


def _data(model: Model) -> Table:
    rows = [
        Row([stage.name, _name(source["path"]), *provenance(source)])
        for stage in model.stages
        for source in stage.recipe["data"]
    ]
    heads = ["Stage", "Data", "Read as", "Made from", "Licence", "Rows"]
    return Table("Data", heads, rows, words=5).without_empty()


def _lineage(model: Model) -> Table:
    named = [
        (entry.get("stage") or place, entry["sha256"])
        for entry, (place, _) in zip(model.lineage["merged"], earlier_adapters(model), strict=True)
    ]
    if own := (model.lineage.get("adapter") or {}).get("sha256"):
        named.append((model.lineage["stage"], own))
    return Table(
        "Lineage",
        ["Order", "Adapter", "SHA-256"],
        [Row([str(at), *x]) for at, x in enumerate(named, 1)],
        words=3,
        names=1,
    )


def _name(path: str) -> str:
    """The public name of a source: that on the hub, of the sample or of a build, or a file name without its folder."""
    if path.startswith(("hub:", "sample:")):
        return path.removeprefix("hub:")
    done = build_report(path)
    return done["title"] if done else public_base(path).rsplit("/", 1)[-1]


def _datasets(sources: list[dict[str, Any]]) -> list[str]:
    paths = [source["path"] for source in sources]
    built = [s["path"] for path in paths if (done := build_report(path)) for s in done["sources"]]
    return list(dict.fromkeys(path.removeprefix("hub:") for path in [*paths, *built] if path.startswith("hub:")))
