"""Takes the results of a stay on a GPU apart: a JSON and a page for each benchmark, as `--out` would have written them.

python -m benchmarks.gpu.publish FOLDER benchmarks/results/DEVICE
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.keep import Results
from benchmarks.gpu.plan import steps
from l2v.files import replace_text


def publish(results: Results, target: Path) -> list[str]:
    """Writes NAME.json and NAME.md; returns a line for each benchmark that is not published, with the reason.

    A result that a later step continued is part of that step's.
    """
    plan = [step for step in steps() if "--out" in step.arguments and step.part != "tests"]
    continued = {
        name for step in plan if "result" in results.of(step.name) for name in step.continues if name != step.name
    }
    missing = []
    target.mkdir(parents=True, exist_ok=True)
    for step in plan:
        found = results.of(step.name)
        if step.name in continued:
            continue
        facts = (found.get("result") or {}).get("facts", {})
        if "result" not in found:
            why = found.get("reason") or found.get("state") or "not run"
        elif facts.get("smoke") or facts.get("cuda") is None:
            why = "a rehearsal without a GPU"
        elif "warning" in found:
            why = found["warning"]
        else:
            replace_text(target / f"{step.name}.json", json.dumps(found["result"], indent=1) + "\n")
            if "page" in found:
                replace_text(target / f"{step.name}.md", found["page"])
            continue
        missing.append(f"{step.name}: not published: {why}")
    return missing


def main(argv: Sequence[str]) -> int:
    """Exit code 1 if something was not published."""
    if len(argv) != 2:
        print((__doc__ or "").splitlines()[2], file=sys.stderr)
        return 2
    missing = publish(Results(Path(argv[0])), Path(argv[1]))
    print("\n".join(missing))
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
