"""Texts for the three stages of the Danish Llama-3 recipe, from the sample that comes with l2v, and Llama 3's tokenizer.

Written by Python of the environment of the null GPU, which has transformers and llama-models.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

from .place import CHECKOUT, Home, NullGpuError

SAMPLE = CHECKOUT / "l2v" / "data" / "sample_da"
READY = "ready"


def prepare(home: Home) -> Path:
    """The folder of texts and tokenizer, written at the first call."""
    folder = home.folder / "data"
    if not (folder / READY).is_file():
        command = [
            str(home.python),
            "-c",
            "import sys; from tests.nullgpu.data import write; write(sys.argv[1])",
            str(folder),
        ]
        environment = {
            key: value for key, value in home.environment().items() if key not in ("LD_PRELOAD", "NULLGPU_PLAN")
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise NullGpuError(f"texts and tokenizer could not be written to {folder}:\n{done.stderr[-2000:]}")
    return folder


def write(target: str) -> None:
    """Write documents, sentences and pairs of varying lengths, and the tokenizer."""
    from ..support.llama3 import save_tokenizer

    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    passages = {row["id"]: row["text"] for row in _rows(SAMPLE / "passages.jsonl")}
    questions = _rows(SAMPLE / "questions.jsonl")
    texts = list(passages.values())
    documents = [{"text": " ".join(draw.sample(texts, 8))} for _ in range(600)]
    sentences = [{"text": f"{i} {draw.choice(texts)[: draw.randint(40, 400)]}"} for i in range(3000)]
    pairs = []
    for i in range(3000):
        row = draw.choice(questions)
        negatives = [passages[name] for name in row["negatives"]][:1]
        pairs.append(
            {"query": f"{i} {row['query']}", "positive": f"{i} {passages[row['positive']]}", "negatives": negatives}
        )
    for name, rows in (("documents", documents), ("sentences", sentences), ("pairs", pairs)):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    if not save_tokenizer(folder / "tokenizer"):
        sys.exit("llama-models is not installed: pip install llama-models==0.3.0")
    (folder / READY).write_text("")


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
