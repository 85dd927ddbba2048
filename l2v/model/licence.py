"""The licence of a base: what it is, and what it requires of every model made from it.

Sources: the Meta Llama 3 Community License Agreement (18 April 2024) and those of Llama 3.1, 3.2 and 3.3, section 1.b; the
Gemma Terms of Use, section 3.1, which ask for a notice file, a copy of the terms, and a statement that files were changed.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2v.errors import UserError, first_line
from l2v.model.embedded import EMBEDDED, converted_folder, package_file

CARD, NOTICE, TERMS = "README.md", "NOTICE", "GEMMA_TERMS"
PAPERS = ("LICENSE*", "LICENCE*", "USE_POLICY*", "NOTICE*", "Notice*", f"{TERMS}*")
"""Files of a base's folder that go with every model made from it."""
GEMMA_NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"

# Licence by the base's name, if neither its folder nor the hub has one: the first match.
BY_NAME = (
    (r"llama-?3\.3", "llama3.3"),
    (r"llama-?3\.2", "llama3.2"),
    (r"llama-?3\.1", "llama3.1"),
    (r"llama-?3(?![.\d])", "llama3"),
    (r"llama-?2(?![.\d])", "llama2"),
    (r"smollm", "apache-2.0"),
    (r"mistral-7b", "apache-2.0"),
    (r"qwen3-", "apache-2.0"),
    (r"gemma-?4-", "apache-2.0"),
    (r"gemma-?(?:[23]n?)?-", "gemma"),
)
# Gemma 4 left the Gemma terms for Apache-2.0.
GEMMA_TYPES = re.compile(r"(?!gemma4)(?:t5|vault|recurrent_|shield|embedding_?|pali|code)?gemma")


@dataclass(frozen=True)
class Licence:
    """identifier: that of the hub. built_with, notice: required texts on the page and in NOTICE. prefix: of the name.

    terms: the agreement's name, where a copy of it and a statement of what was changed have to go with the model.
    """

    identifier: str
    built_with: str = ""
    notice: str = ""
    prefix: str = ""
    terms: str = ""

    @classmethod
    def of(cls, identifier: str) -> Licence:
        """The licence with the requirements of the Llama 3 licences and of the Gemma terms."""
        if identifier == "gemma":
            return cls(identifier, notice=GEMMA_NOTICE, terms="Gemma Terms of Use")
        match = re.fullmatch(r"llama(3(?:\.\d)?)", identifier)
        if not match:
            return cls(identifier)
        version = match[1]
        maker = "Meta Llama 3" if version == "3" else f"Llama {version}"
        return cls(
            identifier,
            built_with="Built with Meta Llama 3" if version == "3" else "Built with Llama",
            notice=f"{maker} is licensed under the {maker} Community License, Copyright © Meta Platforms, Inc. All Rights "
            "Reserved.",
            prefix="Llama-3" if version == "3" else "Llama",
        )

    def name(self, name: str) -> str:
        """The name, changed if the licence requires it."""
        if not self.prefix or name.startswith(self.prefix):
            return name
        rest = re.sub(r"^(meta-?)?llama-?(3(\.\d)?)?[-_.]?", "", name, flags=re.IGNORECASE)
        return f"{self.prefix}-{rest}" if rest else self.prefix

    def check_name(self, repo: str) -> None:
        """Check a repository name against the licence.

        Raises:
            UserError: if the licence requires another name.
        """
        name = repo.rsplit("/", 1)[-1]
        if self.prefix and not name.startswith(self.prefix):
            better = "/".join([*repo.split("/")[:-1], self.name(name)])
            raise UserError(
                f"{repo}: the base's licence ({self.identifier}) requires a name that begins with '{self.prefix}'; use {better}"
            )


def licence_of_folder(folder: Path) -> str | None:
    """The identifier of the licence that a model's folder states or shows; None if it does neither.

    Its card decides; without one a notice that belongs to a licence, then a model type whose every published model has one
    licence. Where the card says `other`, its `license_name` and `license_link` are read too.
    """
    card = front_matter(folder / CARD)
    stated = card.get("license")
    if isinstance(stated, str) and stated != "other":
        return stated
    if "gemma" in f"{card.get('license_name')} {card.get('license_link')}".lower() or has_notice(folder, GEMMA_NOTICE):
        return "gemma"
    return licence_of_type(model_type(folder)) or (stated if isinstance(stated, str) else None)


def licence_of_type(kind: str) -> str | None:
    """The licence of all published models of a `model_type`; None where they differ or none is known."""
    return "gemma" if GEMMA_TYPES.match(kind) else None


def model_type(folder: Path) -> str:
    """The `model_type` in a folder's config.json; empty without one."""
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def has_notice(folder: Path, notice: str) -> bool:
    """Whether a notice file of the folder has the required sentence; line breaks and letter case do not matter."""
    wanted = " ".join(notice.lower().split())
    for file in folder.glob("[Nn][Oo][Tt][Ii][Cc][Ee]*"):
        if file.is_file() and wanted in " ".join(file.read_text(encoding="utf-8", errors="replace").lower().split()):
            return True
    return False


def has_terms(folder: Path) -> bool:
    """Whether the folder has a copy of the Gemma terms, under the name that l2v gives it or that others do."""
    return any(
        re.search(r"gemma.*terms|terms.*gemma|^licen[sc]e", file.name, re.IGNORECASE) for file in folder.iterdir()
    )


def write_papers(identifier: str, folder: Path, *, changed: str, source: Path | None = None) -> None:
    """Put what the base's licence requires into a model's folder: papers of the base's folder, and a notice.

    changed: one sentence on what was changed. source: the base's folder.
    """
    if source is not None and source.is_dir() and source.resolve() != folder.resolve():
        for paper in sorted({p for pattern in PAPERS for p in source.glob(pattern) if p.is_file()}):
            (folder / paper.name).unlink(missing_ok=True)  # it may be a hard link to the file of another folder
            shutil.copyfile(paper, folder / paper.name)
    licence = Licence.of(identifier)
    if not licence.notice:
        return
    if licence.terms and not has_terms(folder) and (terms := _own_copy(identifier)):
        shutil.copyfile(terms, folder / (TERMS + terms.suffix))
    notice = folder / NOTICE
    text = notice.read_text(encoding="utf-8") if has_notice(folder, licence.notice) and notice.is_file() else ""
    lines = [] if text else [licence.notice]
    if licence.terms and not text:
        lines += [
            "",
            f"Whoever receives this model, or a model made from it, is bound by the use restrictions of the {licence.terms} "
            "(section 3.2 and ai.google.dev/gemma/prohibited_use_policy), and has to pass them on with a copy of the terms.",
        ]
    if licence.terms and changed not in text:
        lines += ["", f"The files of this model were modified. {changed}"]
    notice.unlink(missing_ok=True)
    notice.write_text("\n".join([*text.splitlines(), *lines]) + "\n", encoding="utf-8")


def _own_copy(identifier: str) -> Path | None:
    """A copy of the terms that came with an embedded base under the same licence."""
    for base in EMBEDDED.values():
        if base.licence == identifier and base.terms:
            places = [*converted_folder(base.name).glob(f"{TERMS}*"), package_file(base.terms)]
            return next((place for place in places if place and place.is_file()), None)
    return None


def base_licence(model: str, kind: str) -> str | None:
    """The licence of a base that a run names: an embedded one, a folder, or a repository of whose `model_type` it is known."""
    if model in EMBEDDED:
        return EMBEDDED[model].licence
    return licence_of_folder(Path(model)) if Path(model).is_dir() else licence_of_type(kind)


def front_matter(file: Path) -> dict[str, Any]:
    """The metadata of a card; empty without a card or metadata.

    Raises:
        UserError: if its YAML cannot be read.
    """
    import yaml
    from huggingface_hub import metadata_load

    if not file.is_file():
        return {}
    try:
        return metadata_load(file) or {}
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{file}: its front matter is not valid YAML: {first_line(error)}") from None
