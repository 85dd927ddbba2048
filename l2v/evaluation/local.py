"""A benchmark made from the user's files, in mteb's task classes, so that mteb computes the scores.

A folder has an `eval.yaml` that lists its tasks; otherwise file names give the tasks: `retrieval*`, `pairs*`, `bitext*`,
`classification*`, `clustering*` and `sts*`, with the field names in `FIELDS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from mteb.abstasks import AbsTask

from l2v.data import raw
from l2v.data.columns import guess
from l2v.data.decoding import plain_name
from l2v.data.find import READABLE, is_readable
from l2v.errors import RecipeError, UserError
from l2v.evaluation.local_tasks import BUILD, Built
from l2v.evaluation.rows import digest

MANIFEST = "eval.yaml"
_LANGUAGE = re.compile(r"[a-z]{3}-[A-Z][a-z]{3}")
_COMMON = {"name": None, "prompt": None, "limit": None, "languages": ["dan-Latn"], "only": None}
# The keys of a task of each type, with defaults; `file` is required.
FIELDS: dict[str, dict[str, Any]] = {
    "retrieval": _COMMON
    | {"query": "query", "positive": "positive", "group": "group", "groups": "relevant"}
    | {"corpus": None, "id": "id", "text": "text", "score": "score"},
    "bitext": _COMMON | {"first": "da", "second": "en"},
    "classification": _COMMON
    | {"text": "text", "label": "label", "split": None, "train": "train", "test": "test"}
    | {"least": 4, "samples_per_label": 8},
    "clustering": _COMMON | {"text": "text", "label": "label", "least": 2},
    "sts": _COMMON | {"first": "a", "second": "b", "score": "score"},
}
# Fields that are guessed by their names where a file lacks the default: the key of `l2v.data.columns` for each.
GUESSED = {
    "retrieval": {"query": "query", "positive": "positive", "score": "score"},
    "classification": {"text": "text", "label": "label"},
    "clustering": {"text": "text", "label": "label"},
    "sts": {"first": "query", "second": "positive", "score": "score"},
}
PREFIXES = {"pairs": "retrieval"} | {kind: kind for kind in FIELDS}


@dataclass
class LocalBenchmark:
    """The tasks that could be built, notes on skipped rows, and for each failed task the reason."""

    name: str
    tasks: list[AbsTask] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def local_benchmark(source: str | Path, data: str | Path | None = None) -> LocalBenchmark:
    """The benchmark of a folder, of a manifest, or of one file named by its kind.

    data: folder of the files that a manifest names (default: next to the manifest). A file that is missing or has no valid
    row fails its task only.

    Raises:
        RecipeError: if the manifest is wrong.
        UserError: if the source does not exist or has no tasks.
    """
    path = Path(source)
    manifest = path / MANIFEST if path.is_dir() else path
    if manifest.suffix in (".yaml", ".yml"):
        if manifest.is_file():
            name, entries = _manifest(manifest)
            folder = Path(data) if data else manifest.parent
        elif path.is_dir():
            name, folder = path.name, path
            entries = [_by_name(file, kind) for file in sorted(path.iterdir()) if (kind := _kind(file))]
        else:
            raise UserError(f"local:{source}: no such folder or manifest")
    elif path.is_file():
        if not (kind := _kind(path) or _by_columns(path)):
            raise UserError(
                f"{path}: cannot tell its task type: it has no columns of question and answer, and its name does not begin with "
                f"{', '.join(PREFIXES)}; rename it, or write {MANIFEST}"
            )
        name, folder, entries = path.name.split(".")[0], path.parent, [_by_name(path, kind)]
    else:
        raise UserError(f"local:{source}: no such folder or manifest")
    if not entries:
        raise UserError(f"{path}: has no {MANIFEST} and no file called {', '.join(PREFIXES)}* ({READABLE})")
    out = LocalBenchmark(name)
    for entry in entries:
        full = f"{name}-{entry['name']}"
        try:
            guessed = _guess_fields(folder, entry)
            built = BUILD[entry["type"]](full, folder, entry, _revision(folder, entry))
        except RecipeError:
            raise
        except UserError as error:
            out.failed[full] = str(error)
            continue
        out.tasks.append(_loaded(built))
        out.notes += [f"{full}: {note}" for note in [*guessed, *built.notes]]
    if len({task.metadata.name for task in out.tasks}) < len(out.tasks):
        raise RecipeError(f"{manifest}: two tasks have the same name; give each its own 'name'")
    return out


def _guess_fields(folder: Path, entry: dict[str, Any]) -> list[str]:
    """Replace default fields that the file lacks by fields with a common name; returns a sentence about them."""
    file, kind = folder / entry["file"], entry["type"]
    if not file.is_file() or not is_readable(file):
        return []
    names, _ = raw.columns(file, str(file))
    chosen: dict[str, str] = {}
    for key, as_key in GUESSED.get(kind, {}).items():
        if entry[key] == FIELDS[kind][key] and entry[key] not in names:
            taken = {*chosen.values(), *(entry[other] for other in GUESSED[kind] if other != key)}
            if column := guess(as_key, [name for name in names if name not in taken]):
                chosen[key] = column
    entry |= chosen
    said = ", ".join(f"{key}: {column}" for key, column in chosen.items())
    return [f"{entry['file']}: columns guessed by their names: {said}"] if said else []


def _loaded(built: Built) -> AbsTask:
    task = built.task
    task.dataset, task.data_loaded = built.dataset, True
    return task


def _revision(folder: Path, entry: dict[str, Any]) -> str:
    files = [folder / entry["file"], *([folder / entry["corpus"]] if entry.get("corpus") else [])]
    return digest([file for file in files if file.is_file()], entry)


def _kind(file: Path) -> str | None:
    if not is_readable(file):
        return None
    return next((kind for prefix, kind in PREFIXES.items() if file.name.lower().startswith(prefix)), None)


def _by_columns(file: Path) -> str | None:
    """retrieval for a file with columns of queries and answers."""
    if not is_readable(file):
        return None
    names, _ = raw.columns(file, str(file))
    query = guess("query", names)
    return "retrieval" if query and guess("positive", [name for name in names if name != query]) else None


def _by_name(file: Path, kind: str) -> dict[str, Any]:
    ending = len(Path(plain_name(file)).suffix) + len(file.name) - len(plain_name(file))
    return FIELDS[kind] | {"type": kind, "file": file.name, "name": file.name[:-ending]}


def _manifest(path: Path) -> tuple[str, list[dict[str, Any]]]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("tasks"), list):
        raise RecipeError(f"{path}: must have 'tasks', a list of tasks with type and file")
    return str(tree.get("name", path.parent.resolve().name)), [
        _entry(path, at, given) for at, given in enumerate(tree["tasks"], 1)
    ]


def _entry(path: Path, at: int, given: Any) -> dict[str, Any]:
    where = f"{path}: task {at}"
    if not isinstance(given, dict) or given.get("type") not in FIELDS:
        raise RecipeError(f"{where}: needs a type: {', '.join(FIELDS)}")
    known = FIELDS[given["type"]]
    for key in given:
        if key not in known and key not in ("type", "file"):
            raise RecipeError(f"{where}: a {given['type']} task has no '{key}'; it may have file, {', '.join(known)}")
    if not isinstance(given.get("file"), str):
        raise RecipeError(f"{where}: needs a file")
    entry = known | given
    entry["name"] = str(entry["name"] or f"{entry['type']}-{Path(entry['file']).name.split('.')[0]}").replace("/", "-")
    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        "limit": (lambda v: v is None or (isinstance(v, int) and v >= 1), "a whole number of at least 1"),
        "least": (lambda v: isinstance(v, int) and v >= 2, "a whole number of at least 2"),
        "samples_per_label": (lambda v: isinstance(v, int) and v >= 1, "a whole number of at least 1"),
        "groups": (lambda v: v in ("relevant", "exclude", "ignore"), "relevant, exclude or ignore"),
        "only": (lambda v: v is None or isinstance(v, dict), "a mapping of fields to values"),
        "languages": (lambda v: isinstance(v, list) and all(_LANGUAGE.fullmatch(str(x)) for x in v), "like [dan-Latn]"),
        "prompt": (lambda v: v is None or isinstance(v, (str, dict)), "a text, or query and document"),
    }
    for key, (good, text) in checks.items():
        if key in entry and not good(entry[key]):
            raise RecipeError(f"{where}: {key} is {entry[key]!r}; it must be {text}")
    return entry
