"""The tables, pages and figures of results, and the files that they go to."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.harness import Result, Target, Unavailable
from l2v.files import replace_text

SMOKE = "SMOKE TEST on a CPU: these times say nothing about a GPU."
NULL = "NULL GPU: kernels were counted and not run; these times say nothing."
CPU = "Work on a CPU: these numbers say nothing about a GPU."


def table(results: list[Result]) -> str:
    """Markdown: a row a provider and workload; memory and error where any was measured."""
    columns = {
        "workload": lambda x: x.workload,
        "direction": lambda x: x.direction,
        "provider": lambda x: x.provider,
        "median us": lambda x: x.skipped if x.median is None else f"{x.median * 1e6:.1f}",
        "spread": lambda x: "" if x.median is None else f"{(x.high - x.low) / x.median:.1%}",
        "TFLOP/s": lambda x: "" if x.tflops is None else f"{x.tflops:.1f}",
        "of roofline": lambda x: "" if x.roofline is None else f"{x.roofline:.0%}",
    }
    if any(x.memory is not None for x in results):
        columns["peak MiB"] = lambda x: "" if x.memory is None else f"{x.memory / 2**20:.1f}"
    if any(x.error is not None for x in results):
        columns["error"] = lambda x: "" if x.error is None else f"{x.error:.1e}"
    return markdown(list(columns), [[show(x) for show in columns.values()] for x in results])


def targets_table(targets: list[Target]) -> str:
    """Markdown: what was to be reached, and whether it was."""
    rows = []
    for x in targets:
        sign = ">=" if x.at_least else "<="
        value = "" if x.value is None else f"{x.value:.3g} {x.unit}"
        rows.append([x.name, f"{sign} {x.limit:.4g} {x.unit}", value, x.verdict])
    return markdown(["target", "limit", "measured", ""], rows)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, *rows]).replace("\n", f"\n|{'---|' * len(head)}\n", 1)


def headline(facts: dict) -> str:
    """The line above every table."""
    head = f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}"
    label = NULL if facts["device"] == "null" else SMOKE if facts["smoke"] else ""
    return f"{label} {head}".strip()


def work_headline(facts: dict) -> str:
    """The first line of a page of real work, which may be a CPU's."""
    label = SMOKE if facts["smoke"] else CPU if facts.get("cuda") is None else ""
    return f"{label} {headline(facts | {'smoke': False})}".strip()


Panel = tuple[str, str, dict[str, dict[str, float]]]
"""Title, unit, and provider -> workload -> value."""


def tflops_panels(results: list[Result], title: Callable[[Result], str]) -> list[Panel]:
    """A panel a title, of TFLOP/s."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for x in results:
        found.setdefault(title(x), {}).setdefault(x.provider, {})[x.workload] = x.tflops or 0.0
    return [(name, "TFLOP/s", found[name]) for name in sorted(found)]


def token_rates(results: Sequence[Result], facts: dict, title: str) -> list[Panel]:
    """A panel of real tokens a second."""
    label = " (CPU smoke test)" if facts["smoke"] else " (CPU)" if facts.get("cuda") is None else ""
    values: dict[str, dict[str, float]] = {}
    for x in results:
        values.setdefault(x.provider, {})[x.workload] = x.facts.get("tokens_per_second", 0.0)
    return [(f"{title}, real tokens a second{label}", "tokens/s", values)]


def bars(panels: list[Panel]):
    """A figure of grouped bars; Unavailable without matplotlib."""
    pyplot = plotting()
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(10, 3.5 * len(panels)), squeeze=False)
    for axis, (title, unit, values) in zip(axes[:, 0], panels, strict=True):
        workloads = list(dict.fromkeys(w for found in values.values() for w in found))
        for i, (provider, found) in enumerate(values.items()):
            places = [j + (i - len(values) / 2) * 0.8 / len(values) for j in range(len(workloads))]
            axis.bar(places, [found.get(w, 0.0) for w in workloads], 0.8 / len(values), label=provider)
        axis.set_xticks(range(len(workloads)), workloads, fontsize=7)
        axis.set_ylabel(unit)
        axis.set_title(title)
        axis.legend(fontsize=6)
    return figure


def plotting():
    """matplotlib's pyplot, without a screen; Unavailable where it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise Unavailable("matplotlib is not installed") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def write(folder: Path, name: str, data: dict, text: str, figure: Callable[[], object] | None = None) -> None:
    """NAME.json and NAME.md, and NAME.png where matplotlib is installed. `data` holds Results and Targets as rows."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / f"{name}.json", json.dumps(data, indent=1) + "\n")
    replace_text(folder / f"{name}.md", text.rstrip("\n") + "\n")
    if figure is None:
        return
    try:
        drawn = figure()
    except Unavailable:
        return
    drawn.tight_layout()
    drawn.savefig(folder / f"{name}.png", dpi=120)
    plotting().close(drawn)
