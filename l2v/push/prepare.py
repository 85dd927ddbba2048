"""Prepare the folder to upload; it is complete on disk before anything is sent."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from l2v.encoder import Encoder
from l2v.errors import UserError, first_line
from l2v.model.adapter_file import holds_weights
from l2v.model.engines import reports
from l2v.model.export import ENCODER_FILE
from l2v.model.licence import CARD, front_matter, write_papers
from l2v.model.lora import LINEAGE, WEIGHTS
from l2v.push import card
from l2v.push.licence import Licence, check_papers
from l2v.push.subject import Dataset, Model, adapters_lineage, earlier_adapters, export_lineage
from l2v.runs.folder import result_of


def make_model(
    model: Model,
    folder: Path,
    repo: str,
    licence: Licence,
    *,
    base: str,
    adapter: bool,
    trust_remote_code: bool = False,
) -> None:
    """Write an encoder or its adapters into `folder`, with card, notice, and the papers in the base's folder.

    Raises:
        UserError: if the folder holds something else, or cannot be written.
    """
    if folder.exists() and any(folder.iterdir()) and not ours(folder):
        raise UserError(f"{folder} is not empty and was not written by l2v push; choose another folder")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        if adapter:
            _adapters(model, folder, base)
        elif model.export:
            copy(model.folder, model_files(model.folder), folder)
        else:
            Encoder.from_pretrained(model.folder, trust_remote_code=trust_remote_code).save(folder)
        if not adapter:
            file = folder / ENCODER_FILE
            facts = json.loads(file.read_text(encoding="utf-8"))
            _rewrite(file, facts | {"lineage": export_lineage(model, base)})
        changed = f"It holds {'LoRA adapters' if adapter else 'an encoder'} that l2v trained on {base}."
        for source in (model.folder, Path(model.base)):
            write_papers(licence.identifier, folder, changed=changed, source=source)
        text = card.render(model, repo, licence, base=base, adapter=adapter, engines=[] if adapter else reports(folder))
        (folder / CARD).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None
    check_papers(folder)


def ours(folder: Path) -> bool:
    """Whether the folder has a model card that l2v wrote."""
    metadata = front_matter(folder / CARD)
    return "l2v" in (metadata.get("tags") or ()) and "library_name" in metadata


def _adapters(model: Model, folder: Path, base: str) -> None:
    adapters = [*earlier_adapters(model), ("", result_of(model.folder))]
    for _, adapter in adapters:
        if adapter is not None and holds_weights(adapter):
            raise UserError(
                f"{adapter}: trained without LoRA, so it is no adapter; push the whole model, without --adapter-only"
            )
    for place, adapter in adapters:
        if adapter is not None:
            target = folder / place
            copy(adapter, [WEIGHTS], target)
            config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
            _rewrite(target / "adapter_config.json", config | {"base_model_name_or_path": base})
    _rewrite(folder / LINEAGE, adapters_lineage(model, base))


def _rewrite(file: Path, value: Any) -> None:
    if file.is_symlink() or (file.exists() and file.stat().st_nlink > 1):
        file.unlink()  # it may be a hard link to the source file
    file.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def copy(source: Path, names: list[str], target: Path) -> None:
    """Copy files into another folder, as hard links if the file system allows, since weights are large."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / name, target / name)
        except OSError:
            shutil.copyfile(source / name, target / name)


def model_files(folder: Path) -> list[str]:
    """The files of a model's folder to upload: all except hidden ones, including the card."""
    found = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts)]


def dataset_files(data: Dataset) -> tuple[list[str], list[str]]:
    """The files of a data set to upload, after a check of its card against its files; and notes for the user.

    Raises:
        UserError: where the card is missing or has no metadata, or a split's rows are not those that the report
            counts.
    """
    import pyarrow.parquet

    folder = data.folder
    metadata = front_matter(folder / CARD)
    for key in ("language", "license", "configs"):
        if not metadata.get(key):
            raise UserError(
                f"{folder / CARD}: its front matter has no '{key}'; build the data set again with 'l2v data build'"
            )
    shards = []
    for split, expected in data.report["splits"].items():
        found = sorted(folder.glob(f"{split}-*.parquet"))
        try:
            rows = sum(pyarrow.parquet.read_metadata(file).num_rows for file in found)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: a file of split '{split}' is damaged: {first_line(error)}") from None
        if rows != expected:
            raise UserError(
                f"{folder}: split '{split}' has {rows:,} rows and report.json counts {expected:,}; build it again"
            )
        shards += [file.name for file in found]
    texts = [name for name in (CARD, "report.md", "report.json") if (folder / name).is_file()]
    notes = []
    paths = sorted({s["path"] for s in data.report["sources"] if re.match(r"[/~]|[A-Za-z]:\\", s["path"])})
    if paths:
        notes.append(
            f"its card and report name folders of this machine ({', '.join(paths[:3])}): rename them, or give relative paths"
        )
    unknown = [s["label"] for s in data.report["sources"] if s["licence"] == "unknown"]
    if unknown:
        notes.append(f"the licence of {', '.join(unknown)} is unknown: make sure that its texts may be shared")
    if any(s.get("examples") for s in data.report["sources"]):
        notes.append("report.md and report.json quote texts that were dropped, as examples")
    return [*texts, *shards], notes
