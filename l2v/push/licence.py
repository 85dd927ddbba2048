"""The licence that a pushed model inherits from its base, and the check that it carries what that licence requires."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from l2v.errors import UserError
from l2v.model.embedded import EMBEDDED
from l2v.model.licence import (
    BY_NAME,
    CARD,
    GEMMA_NOTICE,
    Licence,
    front_matter,
    has_notice,
    has_terms,
    licence_of_folder,
)

__all__ = ["Licence", "check_papers", "find_licence", "licence_of_name"]


def find_licence(base: str, name: str, given: str | None, ask_hub: Callable[[str], str | None]) -> Licence:
    """The licence of a base: from the user, else its folder, else the hub, else its name.

    base: as the run names it, a folder or a name; name: its name on the hub.

    Raises:
        UserError: if none of them has it, or the user's differs from one that binds every derived model.
    """
    known = EMBEDDED[base].licence if base in EMBEDDED else licence_of_folder(Path(base))
    if given:
        binding = known or licence_of_name(name)
        if binding and Licence.of(binding).terms and binding != given:
            raise UserError(
                f"the base '{name}' is under the {Licence.of(binding).terms}, which bind every model made from it; "
                f"omit --license, or give --license {binding}"
            )
        return Licence.of(given)
    own = known
    if own is None and not Path(name).is_absolute():
        own = ask_hub(name)
    if not isinstance(own, str) or own == "other":
        own = licence_of_name(name) or own
    if own is None:
        raise UserError(f"the licence of the base '{name}' is not known; give its identifier on the hub with --license")
    return Licence.of(own)


def licence_of_name(name: str) -> str | None:
    """The licence by a base's name."""
    return next((identifier for pattern, identifier in BY_NAME if re.search(pattern, Path(name).name.lower())), None)


def check_papers(folder: Path) -> None:
    """Check that a folder carries what the terms of its base require: card, notice and a copy of the terms.

    A model counts as made from Gemma where its card, its notice, its lineage or the base in its adapter's configuration says
    so, or its `model_type` where no card states another licence.

    Raises:
        UserError: something is missing; the sentence names all of it.
    """
    named = (licence_of_name(name) for name in _bases(folder))
    if "gemma" not in (licence_of_folder(folder), *named) and not has_notice(folder, GEMMA_NOTICE):
        return
    licence, missing = Licence.of("gemma"), []
    card = (folder / CARD).read_text(encoding="utf-8", errors="replace") if (folder / CARD).is_file() else ""
    if front_matter(folder / CARD).get("license") != licence.identifier:
        missing.append(f"'license: {licence.identifier}' in its card")
    if " ".join(licence.notice.split()) not in " ".join(card.split()):
        missing.append(f"the sentence '{licence.notice}' in its card")
    if not has_notice(folder, licence.notice):
        missing.append("that sentence in a file NOTICE")
    if not has_terms(folder):
        missing.append("a copy of the terms (the page ai.google.dev/gemma/terms as GEMMA_TERMS.html)")
    if missing:
        raise UserError(
            f"{folder}: made from Gemma, whose terms have to go with it; missing: {'; '.join(missing)}. "
            "Add them, or write the folder again with 'l2v push RUN --dry-run FOLDER'"
        )


def _bases(folder: Path) -> Iterator[str]:
    """The bases that the files of a folder name."""
    stated = front_matter(folder / CARD).get("base_model")
    yield from [stated] if isinstance(stated, str) else [name for name in stated or [] if isinstance(name, str)]
    for file, keys in (
        ("adapter_config.json", ("base_model_name_or_path",)),
        ("lineage.json", ("base", "model")),
        ("l2v_encoder.json", ("lineage", "base", "model")),
    ):
        if isinstance(name := _value(folder / file, keys), str):
            yield name


def _value(file: Path, keys: tuple[str, ...]) -> Any:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        for key in keys:
            value = value[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return value
