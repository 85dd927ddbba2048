"""The name of a model on the command line: a folder, or a repository on the Hub; and what lies near a mistyped one."""

from __future__ import annotations

import difflib
from pathlib import Path

from l2v.errors import UserError
from l2v.model.embedded import EMBEDDED
from l2v.model.hub import is_repository_name, why_missing
from l2v.runs.folder import stage_folders

RUNS = Path("runs")
SHOWN = 8  # names in a message
REMEDY = "give a run, a stage of it (runs/NAME/STAGE), an export or a base: a folder, or owner/name on the Hub"


def check_model(name: str) -> None:
    """Check that a name can be a model, without asking the Hub.

    Raises:
        UserError: it is no folder here and cannot be a name on the Hub.
    """
    if not (Path(name).exists() or name in EMBEDDED or _may_be_on_hub(name)):
        raise UserError(f"{name} was not found: no such folder{near(name)}")


def find_model(name: str, file: str = "config.json", revision: str | None = None) -> None:
    """Check that a model exists: a folder here, an embedded base or a repository on the Hub, which is asked once.

    Raises:
        UserError: it does not, or the Hub cannot be asked.
    """
    check_model(name)
    if Path(name).exists() or name in EMBEDDED:
        return
    if why := why_missing(name, file, revision):
        raise UserError(f"{name} was not found: no such folder, and {why}{near(name)}")


def near(name: str, remedy: str = REMEDY) -> str:
    """The end of a sentence about a folder that does not exist: what is there instead, and the nearest name or the remedy."""
    missing = Path(name)
    while not missing.parent.exists():
        missing = missing.parent
    place, what, names = missing.parent, "stages", [stage.name for stage in stage_folders(missing.parent)]
    if not names:
        place, what = (place if runs_in(place) else RUNS), "runs"
        names = runs_in(place)
    if not names:
        return f"; {RUNS}/ holds no run; {remedy}"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    close = [found for word in (missing.name, Path(name).name) for found in difflib.get_close_matches(word, names, n=1)]
    end = f"did you mean {place / close[0]}?" if close else remedy
    return f"; {what} in {place}/: {', '.join(names[:SHOWN])}{more}; {end}"


def runs_in(folder: Path) -> list[str]:
    """The names of the runs in a folder."""
    try:
        return sorted(child.name for child in folder.iterdir() if stage_folders(child))
    except OSError:
        return []


def _may_be_on_hub(name: str) -> bool:
    """Whether the Hub may be asked for a name: not for a path into a folder of runs, which is mistyped."""
    owner, slash, _ = name.partition("/")
    if slash and (Path(owner) == RUNS or stage_folders(Path(owner)) or runs_in(Path(owner))):
        return False
    return is_repository_name(name)
