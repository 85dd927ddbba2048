"""What a name refers to: a run, a stage, an export, an adapter or a base, with all that decides its vectors."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from l2v.errors import UserError
from l2v.model.adapter_file import LINEAGE, describe_adapter, holds_weights, read_json
from l2v.model.embedded import EMBEDDED
from l2v.model.export import ENCODER_FILE
from l2v.recipe import Base, Contrastive, Recipe, Template
from l2v.recipe.instructions import Instructions
from l2v.runs.folder import is_stage, result_of, stage_folders, stage_recipe, trained_stages
from l2v.runs.names import find_model
from l2v.runs.published import MODULES, read_published


@dataclass
class Found:
    """What a name refers to.

    adapters: merged into the base, in order. length: tokens of a text, None if nothing says it. note: a sentence for the
    user on what was chosen. pooled: which tokens are pooled (see `TextTokenizer`). rows: of the embedding, at least.
    normalize: vectors have length 1 unless the caller asks for others. matryoshka: prefix lengths that it was trained on.
    """

    base: Base
    adapters: list[str] = field(default_factory=list)
    length: int | None = None
    instructions: Instructions = field(default_factory=Instructions)
    note: str | None = None
    pooled: Literal["text", "all", "unprompted"] = "text"
    rows: int = 0
    normalize: bool = True
    matryoshka: list[int] = field(default_factory=list)


def find(name: str) -> Found:
    """What a name refers to; the base is checked to exist.

    Raises:
        UserError: it does not exist, is not trained yet, or one of its files is damaged.
    """
    found = _find(name)
    base = found.base
    if base.init != "random" and base.model != name:
        try:
            find_model(base.model, revision=base.revision)
        except UserError as error:
            raise UserError(f"the base of {name}: {error}") from None
    return found


def _find(name: str) -> Found:
    folder = Path(name)
    if (folder / ENCODER_FILE).is_file():
        return _export(folder, name)
    if is_stage(folder):
        return _stage(folder)
    if stage_folders(folder):
        return _run(folder)
    if (folder / "adapter_config.json").is_file():
        return _adapter(folder)
    if holds_weights(folder):
        return _weights(folder)
    find_model(name)
    if published := read_published(name):
        return Found(
            published.base, length=published.length, instructions=published.instructions, pooled=published.pooled,
            normalize=published.normalize,
        )  # fmt: skip
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{name}: neither a model, an adapter nor a run of l2v")
    return Found(Base(model=name, **_known(name)))


def _known(model: str) -> dict[str, Any]:
    return {"template": EMBEDDED[model].template} if model in EMBEDDED else {}


def _export(folder: Path, name: str) -> Found:
    try:
        facts = json.loads((folder / ENCODER_FILE).read_text(encoding="utf-8"))
        own: dict[str, Any] = {"model": name}
        adapters: list[str] = []
        if (folder / "adapter_config.json").is_file():  # unmerged: `l2v export --adapter-only`
            own, adapters = {key: value for key, value in facts["base"].items() if key != "template"}, [name]
        base = Base(**own | {"template": Template(**facts["template"]), "pooling": facts["pooling"]})
        base.attention, base.precision = facts["attention"], facts["precision"]
        instructions = Instructions.of_json(facts.get("instructions", {}))
        return Found(
            base, adapters, length=facts["length"], instructions=instructions, pooled=facts.get("pooled", "text"),
            normalize=facts.get("normalize", True), matryoshka=facts.get("matryoshka", []),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder / ENCODER_FILE}: damaged; export again with 'l2v export'") from None


def _run(folder: Path) -> Found:
    trained = trained_stages(folder)
    name, recipe = list(trained.items())[-1]
    found = _stage(folder / name)
    left = [stage for stage in recipe.order() if stage not in trained]
    if left:
        found.note = f"{folder}: its stage '{name}' is used; not trained yet: {', '.join(left)} (l2v train resumes)"
    return found


def _stage(folder: Path) -> Found:
    trained = result_of(folder)
    if trained is None:
        raise UserError(f"{folder}: the stage is not fully trained yet; run 'l2v train' again to continue it")
    recipe = stage_recipe(folder)
    instructions = Instructions.trained(recipe, folder.name)
    return Found(
        recipe.base, [*_lineage(trained), str(trained)], recipe.stages[folder.name].length, instructions,
        pooled="all" if recipe.base.pool_prompt else "text", matryoshka=_matryoshka(recipe, folder.name),
    )  # fmt: skip


def _matryoshka(recipe: Recipe, stage: str) -> list[int]:
    """The prefix lengths that the last contrastive stage up to `stage` trained; none if there is no such stage."""
    for name in [stage, *reversed(recipe.chain(stage))]:
        if isinstance(found := recipe.stages[name], Contrastive):
            return list(found.matryoshka or ())
    return []


def _adapter(folder: Path) -> Found:
    if is_stage(folder.parent):
        return _stage(folder.parent)
    if (folder / MODULES).is_file():
        raise UserError(
            f"{folder}: a sentence-transformers model whose weights are an adapter; load it with sentence-transformers, or give "
            "its base first and the folder in adapters=[...], with the pooling that its files state"
        )
    name = read_json(str(folder)).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{folder}: its adapter_config.json names no base; give the base first and adapters=[...]")
    return Found(Base(model=name, **_known(name)), [*_lineage(folder), str(folder)])


def _weights(folder: Path) -> Found:
    """The weights of a stage without LoRA; away from their run, the base that they name gives the tokenizer."""
    if is_stage(folder.parent):
        return _stage(folder.parent)
    try:
        name = json.loads(_text(folder / LINEAGE))["base"]["model"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder / LINEAGE}: damaged; restore it, or train the stage again") from None
    return Found(Base(model=name, **_known(name)), [str(folder)])


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def _lineage(adapter: Path) -> list[str]:
    """The adapters that this one was trained on, looked up next to it first, because the run may have been moved.

    A stage without LoRA needs none of those before it.
    """
    file = adapter / LINEAGE
    if not file.is_file() or holds_weights(adapter):
        return []
    try:
        entries = [
            (entry.get("stage", ""), entry["adapter"], entry["sha256"]) for entry in json.loads(_text(file))["merged"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file}: damaged; restore it, or train the stage again") from None
    out = []
    for stage, named, digest in entries:
        same_run = result_of(adapter.parent.parent / stage) if stage else None
        path = str(same_run or named)
        if describe_adapter(path)["sha256"] != digest:
            raise UserError(
                f"{path}: not the adapter that {adapter} was trained on (its hash differs); restore or retrain it"
            )
        out.append(path)
    return out
