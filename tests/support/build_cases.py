"""What the tests of a build share: a configuration in a folder, a build in this process, and what it left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from l2v.data.corpus.config import load_config
from l2v.data.corpus.run import Run

FILES = Path(__file__).resolve().parents[1] / "data" / "build_files"
WHO = ("hunden", "katten", "min nabo", "en gammel fisker", "den lille pige", "læreren", "vores postbud", "en træt kok")
DOES = ("løber gennem", "drømmer om", "maler billeder af", "skriver breve om", "cykler forbi", "synger sange om")
WHAT = (
    "skoven ved Silkeborg",
    "den røde låge",
    "havnen i Ærøskøbing",
    "byens bibliotek",
    "en stille å",
    "det gamle tårn",
)
MORE = (
    "mens regnen siler ned",
    "før solen står op",
    "når klokken slår tolv",
    "selv om det er koldt",
    "uden at sige et ord",
)


def danish(number: int) -> str:
    """Danish documents, all different, of three sentences."""
    parts = []
    for i in range(3):
        n = number * 7 + i * 13 + number // 11
        who, does = WHO[n % 8], DOES[(n // 3) % 6]
        parts.append(f"{who.capitalize()} {does} {WHAT[(n // 5) % 6]} {MORE[(number + i) % 5]} for {number + i}. gang.")
    return " ".join(parts)


def write_lines(path: Path, rows: list[Any]) -> Path:
    """JSON lines; bytes and text go in as they are."""
    lines = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def source(path: str, **keys: Any) -> dict[str, Any]:
    """A source of a configuration."""
    return {"path": path, "licence": "cc0-1.0", **keys}


def configure(folder: Path, kind: str, sources: list[dict[str, Any]], **keys: Any) -> Path:
    """A configuration file whose sources lie beside it."""
    tree = {"name": "prøve", "kind": kind, "folder": str(folder), "sources": sources, **keys}
    path = folder / "build.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    return path


def make(config: Path, out: Path, workers: int = 1, overrides: tuple[str, ...] = (), **keys: Any) -> dict[str, Any]:
    """Build in this process (and its workers); the report."""
    return Run(load_config(str(config), overrides), out, workers).build(**keys)


def rows(out: Path, split: str = "train") -> list[dict[str, Any]]:
    """The rows of a split."""
    return [row for path in sorted(out.glob(f"{split}-*.parquet")) for row in pq.read_table(path).to_pylist()]


def files(out: Path) -> dict[str, bytes]:
    """Everything that a build leaves for its user."""
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file()}
