"""The base's licence, which derived models inherit, and what Llama's licences require of a name and a page.

Sources: the Meta Llama 3 Community License Agreement (18 April 2024) and those of Llama 3.1, 3.2 and 3.3, section 1.b.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2v.errors import UserError, first_line

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
    (r"gemma-?[23]?-", "gemma"),
)


@dataclass(frozen=True)
class Licence:
    """identifier: that of the hub. built_with, notice: required texts on the page and in NOTICE. prefix: of the name."""

    identifier: str
    built_with: str = ""
    notice: str = ""
    prefix: str = ""

    @classmethod
    def of(cls, identifier: str) -> Licence:
        """The licence with the requirements of the Llama 3 licences."""
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


def find_licence(base: str, name: str, given: str | None, ask_hub: Callable[[str], str | None]) -> Licence:
    """The licence of a base: from the user, else its folder's card, else the hub, else its name.

    base: as the run names it, a folder or a name; name: its name on the hub.

    Raises:
        UserError: if none of them has it.
    """
    if given:
        return Licence.of(given)
    own = front_matter(Path(base) / "README.md").get("license")
    if own is None and not Path(name).is_absolute():
        own = ask_hub(name)
    if not isinstance(own, str):
        own = next((identifier for pattern, identifier in BY_NAME if re.search(pattern, Path(name).name.lower())), None)
    if own is None:
        raise UserError(f"the licence of the base '{name}' is not known; give its identifier on the hub with --license")
    return Licence.of(own)


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
