"""The files of a stay on a GPU: one JSON a part, with what each of its steps gave, and one log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import LOG, Step
from l2v.files import replace_text

LOG_BYTES = 200_000
"""Of a step's output that are logged: as many at its start, and as many at its end."""
DONE, FAILED, STOPPED, RED = "done", "failed", "stopped", "tests fail"


def read(file: Path) -> Any:
    """A JSON file; None where it is missing or not whole."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


class Results:
    """What the steps of all calls gave, in a folder of flat files.

    earlier: a folder with the files of an earlier call, for a machine on which that call's own folder is gone.
    """

    def __init__(self, folder: Path, earlier: Path | None = None) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.steps: dict[str, dict[str, dict[str, Any]]] = {}
        for source in filter(None, (earlier, folder)):
            for file in sorted(source.glob("*.json")):
                data = read(file)
                if isinstance(data, dict) and isinstance(data.get("steps"), dict):
                    self.steps.setdefault(file.stem, {}).update(data["steps"])
        for part in self.steps:
            self._write(part)

    def of(self, name: str) -> dict[str, Any]:
        """What a step gave: state, seconds, result and page; empty where it never ran."""
        return next((found[name] for found in self.steps.values() if name in found), {})

    def keep(self, step: Step, **facts: Any) -> None:
        """Add to what a step gave, and write its part's file."""
        self.steps.setdefault(step.part, {}).setdefault(step.name, {}).update(facts)
        self._write(step.part)

    def begin(self, step: Step, red: list[str]) -> None:
        """A step starts. What an earlier attempt measured stays until there is something newer.

        red: ops whose tests fail, which is said beside the numbers.
        """
        old = self.steps.setdefault(step.part, {}).get(step.name, {})
        self.steps[step.part][step.name] = {key: old[key] for key in ("result", "page") if key in old}
        self.keep(step, state="running", **({"warning": f"{RED}: {', '.join(red)}"} if red else {}))

    def collect(self, step: Step, scratch: Path) -> None:
        """The result and the page that a step has written so far."""
        if step.result and (result := read(scratch / step.result)) is not None:
            page = (scratch / step.result).with_suffix(".md")
            text = page.read_text(encoding="utf-8", errors="replace") if page.is_file() else None
            self.keep(step, result=result, **({"page": text} if text else {}))

    def restore(self, step: Step, scratch: Path) -> None:
        """Before a step starts: the newest result that it continues."""
        if step.continues:
            found = (self.of(name).get("result") for name in step.continues)
            if (result := next(filter(None, found), None)) is not None:
                replace_text(scratch / step.result, json.dumps(result))

    def red(self, ops: tuple[str, ...]) -> list[str]:
        """The ops of which a test failed. Tests that did not finish are not red: benchmarks check results themselves."""
        return [op for op in ops if (self.of(f"tests-{op}").get("result") or {}).get("failed")]

    def log(self, text: str) -> None:
        """Append to the log."""
        with open(self.folder / LOG, "a", encoding="utf-8") as file:
            file.write(text)

    def _write(self, part: str) -> None:
        replace_text(self.folder / f"{part}.json", json.dumps({"part": part, "steps": self.steps[part]}, indent=1))


def logged(output: Path) -> str:
    """A step's output, without its middle where it is long."""
    content = output.read_bytes() if output.is_file() else b""
    if (left_out := len(content) - 2 * LOG_BYTES) > 0:
        middle = f"\n[{left_out:,} bytes are not logged]\n".encode()
        content = content[:LOG_BYTES] + middle + content[-LOG_BYTES:]
    return content.decode("utf-8", "replace")
