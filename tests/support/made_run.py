"""A run as training leaves it, without the minutes: real adapters, hashes and lineage; metrics and scores by hand."""

import json
from pathlib import Path

import torch

from l2v.evaluation.seb import SEB_DA
from l2v.model.lora import trainable
from l2v.recipe.load import load_recipe, to_dict
from l2v.runs.claim import claim, publish
from l2v.runs.folder import run_folder
from l2v.training.build import build

METRICS = [
    {"step": 0, "eval_loss": 8.5, "eval_ndcg_at_10": 0.25},
    {"step": 1, "loss": 8.25, "tokens": 1000, "tokens_per_second": 100.0, "mfu": 0.25, "peak_memory_gib": 1.5},
    {"step": 2, "loss": 7.75, "tokens": 2000, "tokens_per_second": 300.0, "mfu": 0.35, "peak_memory_gib": 2.25},
    {"step": 3, "loss": 6.125, "tokens": 3000, "tokens_per_second": 200.0, "mfu": 0.3, "peak_memory_gib": 2.0},
    {"step": 3, "eval_loss": 5.5, "eval_ndcg_at_10": 0.75},
]


def make_run(recipe_file: Path, stages=("mntp", "supervised")) -> Path:
    """Stages with adapters of random weights; the others of the recipe are not trained."""
    recipe = load_recipe(str(recipe_file), [])
    run = run_folder(recipe)
    for at, name in enumerate(stages):
        claim(recipe, name, run / name, {"name": recipe.name, "stage": name, "recipe": to_dict(recipe)}, False)
        model, lineage = build(recipe, name, dtype=torch.float32, seed=at)
        weights = {key.removeprefix("decoder."): p.detach() for key, p in trainable(model).items()}
        weights = {key: torch.randn_like(value) * 0.05 for key, value in weights.items()}
        publish(model.decoder, weights, run / name, lineage)
        lines = [json.dumps(row) for row in METRICS]
        (run / name / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return run


def merged(run: Path, stage: str = "supervised") -> list[str]:
    """The hashes that an evaluation of the stage is keyed by."""
    lineage = json.loads((run / stage / "adapter" / "lineage.json").read_text(encoding="utf-8"))
    return [entry["sha256"] for entry in lineage["merged"]] + [lineage["adapter"]["sha256"]]


def write_results(run: Path) -> dict:
    """results.json as `l2v eval RUN --baselines tfidf --benchmark seb-da --benchmark local:sample` writes it."""

    def score(value: float, task, cell: str) -> dict:
        return {
            "score": value, "cells": {cell: value}, "metric": task.metric, "type": task.type, "revision": "abc123",
            "seconds": 1.0, "cached": False,
        }  # fmt: skip

    rows = []
    for name, identity, base in (
        ("TF-IDF (characters)", {"baseline": "tfidf"}, 0.31),
        ("tiny/run", {"merged": merged(run), "pooling": "mean", "attention": "bidirectional"}, 0.62),
    ):
        scores = {t.name: score(base + at / 100, t, f"{t.split}/{t.subset}") for at, t in enumerate(SEB_DA)}
        scores["sample-sts"] = score(base / 2, SEB_DA[0], "test/default") | {"type": "STS", "metric": "cosine_spearman"}
        rows.append({"name": name, "identity": identity, "scores": scores, "failed": {}, "empty_texts": 0})
    rows[1]["failed"] = {"X": "X<1>: its data is not on this machine; left out"}
    report = {"tasks": [*(t.name for t in SEB_DA), "sample-sts"], "rows": rows, "local": ["sample"], "notes": []}
    (run / "eval").mkdir(exist_ok=True)
    (run / "eval" / "results.json").write_text(json.dumps(report), encoding="utf-8")
    return report
