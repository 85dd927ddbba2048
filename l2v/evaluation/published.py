"""Published SEB results of 54 models, read from the JSON files in the package `seb` 0.13.11; means are computed from cells.

The package itself is never imported (it needs library versions that conflict with l2v's): its files are read where
it is installed (`pip install --no-deps seb==0.13.11`), from an unpacked folder, or out of its wheel. Model names and
vector widths come from its sources by reading the syntax tree; numbers of parameters from mteb's registry of models.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from l2v.errors import UserError
from l2v.evaluation.seb import SEB_DA

PACKAGE = "seb==0.13.11"
# The Danish models made with LLM2Vec, in the order in which they were published.
DANISH_LLM2VEC = ("jealk/TTC-L2V-unsupervised-1", "jealk/TTC-L2V-supervised-1", "jealk/TTC-L2V-supervised-2")
# Averages that the Danish LLM2Vec poster ("Transforming Decoder-LLM to Top-Tier Danish Encoder Models Using LLM2Vec Approach")
# (Alkestrup 2024) prints of its own runs; their twelve cells are not among the published results.
POSTER_AVERAGES = {
    "Llama-3-8B-Instruct, untrained": 31.83,
    "AI-Sweden Llama-3-8B-instruct, untrained": 46.75,
    "unsupervised": 53.78,
    "supervised": 60.10,
}
# The poster's average for this row differs from the mean of its cells.
POSTER_PRINTED = {"KennethEnevoldsen/dfm-sentence-encoder-large-1": 52.16}
# Names in mteb's registry of models that SEB names differently.
_IN_MTEB = {
    "KB/bert-base-swedish-cased": "KBLab/bert-base-swedish-cased",
    "embed-multilingual-v3.0": "Cohere/Cohere-embed-multilingual-v3.0",
    "text-embedding-3-large": "openai/text-embedding-3-large",
    "text-embedding-3-small": "openai/text-embedding-3-small",
    "text-embedding-ada-002": "openai/text-embedding-ada-002",
    "voyage-multilingual-2": "voyageai/voyage-multilingual-2",
    "xlm-roberta-base": "FacebookAI/xlm-roberta-base",
    "xlm-roberta-large": "FacebookAI/xlm-roberta-large",
    "all-MiniLM-L6-v2": "sentence-transformers/all-MiniLM-L6-v2",
}
_LLAMA3_8B = 8_030_261_248  # of meta-llama/Meta-Llama-3-8B, the shape of every Danish LLM2Vec base


@dataclass(frozen=True)
class Published:
    """One model's row: scores are percent by mteb task name (None where not published), mean the mean of all twelve.

    rank: by mean, 1 is best; None if a cell is missing. size: parameters. width: numbers in a vector.
    mark: `Danish LLM2Vec` for the rows that this recipe is compared with. printed: the mean that the poster prints, if it
    is known to differ.
    """

    model: str
    scores: dict[str, float | None]
    mean: float | None
    rank: int | None
    size: int | None
    width: int | None
    mark: str | None
    printed: float | None


def published(results: str | Path | None = None) -> list[Published]:
    """The rows of all published models, best first; those with a missing cell come last.

    results: the `seb` wheel, a folder with its files, or None for the installed package.

    Raises:
        UserError: if there are no results or a file is damaged.
    """
    files = _Files.find(results)
    widths = _widths(files)
    found = []
    for folder in files.models():
        scores = {task.name: _cell(files, folder, task.file, task.metric) for task in SEB_DA}
        cells = [score for score in scores.values() if score is not None]
        name = folder.replace("__", "/")
        found.append((name, scores, sum(cells) / len(cells) if len(cells) == len(SEB_DA) else None))
    found.sort(key=lambda row: (-(row[2] if row[2] is not None else -1), row[0]))
    sizes = _sizes([name for name, *_ in found])
    return [
        Published(
            model=name,
            scores=scores,
            mean=mean,
            rank=at + 1 if mean is not None else None,
            size=sizes[name],
            width=widths.get(name),
            mark="Danish LLM2Vec" if name in DANISH_LLM2VEC else None,
            printed=POSTER_PRINTED.get(name),
        )
        for at, (name, scores, mean) in enumerate(found)
    ]


def markdown(rows: list[Published]) -> str:
    """The table in the poster's columns: rank, model, size, the mean of twelve, then every task."""
    heads = ["Rank", "Model", "Size", "Width", "Mean", *(task.column for task in SEB_DA)]
    lines = ["| " + " | ".join(heads) + " |", "|-:|-|" + "-:|" * (len(heads) - 2)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    return "\n".join([*lines, "", *notes(rows)]) + "\n"


def notes(rows: list[Published]) -> list[str]:
    """Notes below the table."""
    partial = [row for row in rows if row.mean is None]
    out = [
        f"{len(rows)} models from the results in `{PACKAGE}`; every mean is computed from its twelve cells. Scores in percent: "
        "accuracy (classification), F1 (Bornholm), nDCG@10 (DanFEVER, TV2Nord, Twitter). Bold: Danish LLM2Vec models.",
    ]
    for row in partial:
        out.append(f"{row.model} has {sum(s is not None for s in row.scores.values())} of 12 cells: no mean, no rank.")
    for row in rows:
        if row.printed is not None:
            out.append(f"{row.model}: the poster prints {row.printed:.2f}; its cells give {row.mean:.2f}.")
    averages = ", ".join(f"{name} {value:.2f}" for name, value in POSTER_AVERAGES.items())
    out.append(f"Averages that the poster prints of its own runs, without published cells: {averages}.")
    return [line for note in out for line in (note, "")][:-1]


def cells(row: Published) -> list[str]:
    """A row as text, in the order of the table."""
    name = f"**{row.model}**" if row.mark else row.model
    scores = [_number(row.scores[task.name]) for task in SEB_DA]
    return [str(row.rank or ""), name, size_text(row.size), str(row.width or ""), _number(row.mean), *scores]


def as_json(rows: list[Published]) -> dict[str, Any]:
    """The content of the table, unrounded, as JSON values."""
    return {
        "source": PACKAGE,
        "tasks": [asdict(task) for task in SEB_DA],
        "rows": [asdict(row) for row in rows],
        "poster_averages": POSTER_AVERAGES,
    }


def size_text(parameters: int | None) -> str:
    """For example 118M or 7.1B; empty if unknown."""
    if parameters is None:
        return ""
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"


def _number(score: float | None) -> str:
    return "" if score is None else f"{score:.2f}"


class _Files:
    """The package's files, by path below `seb/`, in a folder or in a wheel."""

    def __init__(self, root: Path, archive: zipfile.ZipFile | None = None) -> None:
        self.root, self.archive = root, archive
        names = archive.namelist() if archive else []
        self.names = [name.removeprefix("seb/") for name in names if name.startswith("seb/")]

    @classmethod
    def find(cls, results: str | Path | None) -> _Files:
        if results is None:
            spec = importlib.util.find_spec("seb")  # finds the folder without running the package
            if spec is None or not spec.submodule_search_locations:
                raise UserError(
                    f"the published results are not installed: pip install --no-deps {PACKAGE}, or name its wheel or an "
                    "unpacked folder with --results"
                )
            root = Path(next(iter(spec.submodule_search_locations)))
        else:
            root = Path(results)
        if root.is_file():
            try:
                files = cls(root, zipfile.ZipFile(root))
            except zipfile.BadZipFile:
                raise UserError(f"{root}: not a wheel; give the wheel of {PACKAGE} or an unpacked folder") from None
        else:
            files = cls(root / "seb" if (root / "seb" / "cache").is_dir() else root)
        if not files.models():
            raise UserError(f"{root}: no published results in it (cache/MODEL/TASK.json); give those of {PACKAGE}")
        return files

    def models(self) -> list[str]:
        if self.archive:
            return sorted({name.split("/")[1] for name in self.names if name.startswith("cache/")} - {""})
        return sorted(path.name for path in (self.root / "cache").glob("*") if path.is_dir())

    def read(self, name: str) -> str | None:
        if self.archive:
            return self.archive.read(f"seb/{name}").decode("utf-8") if name in self.names else None
        file = self.root / name
        return file.read_text(encoding="utf-8") if file.is_file() else None

    def sources(self) -> list[str]:
        if self.archive:
            names = [name for name in self.names if name.startswith("registered_models/") and name.endswith(".py")]
        else:
            names = [f"registered_models/{path.name}" for path in (self.root / "registered_models").glob("*.py")]
        return [self.read(name) or "" for name in sorted(names)]


def _cell(files: _Files, folder: str, file: str, metric: str) -> float | None:
    name = f"cache/{folder}/{file}"
    text = files.read(name)
    if text is None:
        return None
    try:
        result = json.loads(text)
        if "error" in result:
            return None
        return 100 * float(result["scores"]["da"][metric])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{files.root}: {name} is damaged (no {metric} for Danish); install {PACKAGE} again") from None


def _widths(files: _Files) -> dict[str, int]:
    """Vector widths by model name, from the calls of ModelMeta in the package's sources."""
    out: dict[str, int] = {}
    for source in files.sources():
        for function in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)):
            texts = {
                node.targets[0].id: node.value.value
                for node in ast.walk(function)
                if isinstance(node, ast.Assign)
                and isinstance(node.targets[0], ast.Name)
                and isinstance(node.value, ast.Constant)
            }
            for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
                if isinstance(call.func, ast.Name) and call.func.id == "ModelMeta":
                    facts = {word.arg: _constant(word.value, texts) for word in call.keywords}
                    name, width = facts.get("huggingface_name") or facts.get("name"), facts.get("embedding_size")
                    if isinstance(name, str) and isinstance(width, int):
                        out[name] = width
    return out


def _constant(node: ast.expr, texts: dict[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    return texts.get(node.id) if isinstance(node, ast.Name) else None


def _sizes(names: list[str]) -> dict[str, int | None]:
    """Parameters by model name, as mteb's registry has them; None for an unknown model."""
    from mteb import get_model_meta

    out: dict[str, int | None] = {}
    for name in names:
        try:
            out[name] = get_model_meta(_IN_MTEB.get(name, name)).n_parameters
        except KeyError:
            out[name] = _LLAMA3_8B if name in DANISH_LLM2VEC else None
    return out
