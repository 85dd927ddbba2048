"""Answers, written to disk as they arrive: they cost time or money, so no question is asked twice."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from l2v.mining.shards import writing


@dataclass(frozen=True)
class Answer:
    """A query, or why there is none (refused, malformed), with tokens and tries."""

    query: str | None
    why: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    tries: int = 1


class Journal:
    """A file of answers by question, one a line; a line truncated by a kill is ignored."""

    def __init__(self, folder: Path) -> None:
        self.path, self.answers, self._lock = folder / "answers.jsonl", {}, threading.Lock()
        if self.path.is_file():
            whole = 0
            for line in self.path.read_bytes().splitlines(keepends=True):
                try:
                    if not line.endswith(b"\n"):
                        break
                    row = json.loads(line)
                    question = row.pop("question")
                    self.answers[question] = Answer(**row)
                except (ValueError, KeyError, TypeError):
                    break
                whole += len(line)
            with writing(self.path), self.path.open("r+b") as file:
                file.truncate(whole)
        with writing(self.path):
            self._file = self.path.open("a", encoding="utf-8")

    def add(self, question: str, answer: Answer) -> None:
        """Append an answer; thread-safe."""
        line = json.dumps({"question": question} | asdict(answer), ensure_ascii=False)
        with self._lock, writing(self.path):
            self._file.write(line + "\n")
            self._file.flush()
            self.answers[question] = answer

    def close(self) -> None:
        """Close the file."""
        self._file.close()
