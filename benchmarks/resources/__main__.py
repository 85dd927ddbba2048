"""Registers, spills and issued instructions of every kernel, from ahead-of-time builds: no GPU is needed.

python -m benchmarks.resources                       registers, shared memory and spills, as a table
python -m benchmarks.resources --issue --out FOLDER  also the instructions of the main loop against tensor-core clocks
python -m benchmarks.resources --check LIBRARY       the predictions' error on FlashAttention-2 in a libtorch_cuda.so
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import triton

from benchmarks.resources import predict, published
from benchmarks.resources.cases import ARCHITECTURES, MATMULS, Case, attention, info_nce, others
from benchmarks.resources.count import Count, count
from benchmarks.resources.machine import MACHINES

OPS = {"attention": attention, "info_nce": info_nce, "others": others}
HEAD = ("op", "kernel", "variant", "sm", "tile", "registers", "shared KB", "spills B", "blocks")
ISSUE = ("instructions", "tensor", "issue/tensor", "limit", "target")
INFO_NCE_STEPS = 4096 // 64
"""Steps of InfoNCE's main loop for embeddings of 4,096 numbers."""


def examine(case: Case, issue: bool) -> dict[str, object]:
    """One row: what the build uses and, with issue, what its main loop issues.

    Raises: whatever Triton, ptxas or nvdisasm raise.
    """
    used = case.build()
    row: dict[str, object] = {
        "op": case.op, "kernel": case.kernel, "variant": case.variant, "sm": case.arch, "tile": case.tile,
        "registers": used.registers, "shared": used.shared, "spills": used.stack, "target": case.target,
    }  # fmt: skip
    found = count(used, case.arch, case.warps, case.step_flops, case.step_bytes) if issue else None
    if found is not None:
        row["loop"] = found.row()
        if case.op == "info_nce" and found.ratio is not None:
            row["issue_over_tensor_of_a_tile"] = round(found.tile_ratio(INFO_NCE_STEPS) or 0.0, 3)
        if case.config is not None:
            row["relative"] = _packs(case, found)
    return row


def misses(row: dict) -> list[str]:
    """Why a row is not as it has to be: spills, or a ratio above its target."""
    found = [f"spills {row['spills']} bytes a thread"] if row["spills"] else []
    ratio = row.get("issue_over_tensor_of_a_tile", row.get("loop", {}).get("issue_over_tensor"))
    if row["target"] and ratio is not None and ratio > row["target"]:
        found.append(f"issue/tensor {ratio} is above {row['target']}")
    return found


def _packs(case: Case, found: Count):
    """By segment length, for a pack of 16,384 tokens: predicted time in times of a GEMM of the useful FLOPs, which ranks
    tiles and is no rate; waste and waves of the tiles."""
    assert case.config is not None
    rows = {}
    for length in predict.LENGTHS:
        work, config = predict.Workload(length), case.config
        made = predict.predict(case.kernel, config.block_m, config.block_n, MATMULS[case.kernel], found, work)
        rows[length] = {
            "time_over_gemm": round(MACHINES[case.arch].gemm_tflops / made.tflops, 2),
            "scores_computed_over_needed": round(made.waste, 2),
            "waves": round(made.waves, 1),
        }
    return rows


def ranking(rows: Iterable[dict]) -> Iterator[str]:
    """A Markdown table of the predicted times of attention's tiles, in times of a GEMM, by segment length."""
    yield f"| kernel | variant | tile | {' | '.join(map(str, predict.LENGTHS))} |"
    yield f"|{'---|' * (3 + len(predict.LENGTHS))}"
    for row in rows:
        if "relative" in row:
            times = [f"{row['relative'][length]['time_over_gemm']:.2f}" for length in predict.LENGTHS]
            yield f"| {row['kernel']} | {row['variant']} | {row['tile']} | {' | '.join(times)} |"


def table(rows: Iterable[dict], issue: bool) -> Iterator[str]:
    """A Markdown table, line by line."""
    columns = (*HEAD, *ISSUE) if issue else HEAD
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for row in rows:
        loop = row.get("loop", {})
        cells = [row["op"], row["kernel"], row["variant"], row["sm"], row["tile"], row["registers"]]
        cells += [f"{row['shared'] / 1024:.0f}", row["spills"], loop.get("blocks", "")]
        if issue:
            ratio = row.get("issue_over_tensor_of_a_tile", loop.get("issue_over_tensor"))
            cells += [loop.get("instructions", ""), f"{loop['tensor']:.0f}" if loop else ""]
            cells += ["" if ratio is None else f"{ratio:.2f}", loop.get("limit", ""), row["target"] or ""]
        yield f"| {' | '.join(map(str, cells))} |"


def check(library: Path, out: Path | None) -> int:
    """Prints and stores the error of every prediction whose answer is published."""
    rows = list(published.checks(library))
    print("| kernel | length | published TFLOP/s | predicted | error |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {row.kernel} | {row.length} | {row.published:.0f} | {row.predicted:.0f} | {row.error:+.0%} |")
    errors = [row.error for row in rows]
    low, high = min(errors), max(errors)
    trusted = max(-low, high) <= published.MAX_ERROR
    verdict = (
        f"rates may be quoted with an error of {low:+.0%} to {high:+.0%}"
        if trusted
        else f"the error of {low:+.0%} to {high:+.0%} is above {published.MAX_ERROR:.0%}: only rankings are predicted, no rate"
    )
    print(f"\n{verdict}")
    if out:
        stored = [vars(row) | {"error": round(row.error, 3), "predicted": round(row.predicted, 1)} for row in rows]
        _write(out / "check.json", {"rows": stored, "rates_may_be_quoted": trusted, "verdict": verdict})
    return 0


def _page(arch, rows, issue):
    command = f"python -m benchmarks.resources {'--issue ' * issue}--arch {arch}"
    yield from (
        "# Kernels as compiled",
        "",
        f"`{command}`, Triton {triton.__version__}. No GPU: nothing here is measured.",
        "",
    )
    yield from (*table(rows, issue), "")
    if any("relative" in row for row in rows):
        yield from ("## Ranking of attention's tiles, predicted", "")
        yield "Time of a pack of 16,384 tokens by segment length, in times of a GEMM of the useful FLOPs."
        yield "It ranks tiles and predicts no rate: the error of predictions on published rates is in [check.json](check.json)."
        yield ""
        yield from (*ranking(rows), "")


def _write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _with_others(path: Path, rows: list[dict], ops: Sequence[str]) -> list[dict]:
    """The rows, and those of other ops that the file has from this Triton, in the order of OPS."""

    def table(row: dict) -> str:
        return row["op"] if row["op"] in OPS else "others"

    facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if facts.get("triton") == triton.__version__:
        kept = [row for row in facts["rows"] if table(row) not in ops]
        for row in kept:
            if "relative" in row:  # JSON has no numbers as keys
                row["relative"] = {int(length): found for length, found in row["relative"].items()}
        rows = [*rows, *kept]
    return sorted(rows, key=lambda row: list(OPS).index(table(row)))


def main(argv: list[str] | None = None) -> int:
    """The exit code is 1 if a build spills or misses its target."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=__doc__.split("\n")[0])
    parser.add_argument("--issue", action="store_true", help="count the instructions of the main loop")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--op", nargs="+", default=tuple(OPS), choices=tuple(OPS))
    parser.add_argument("--out", type=Path, help="folder for sm_ARCH.json and sm_ARCH.md; keeps other ops")
    parser.add_argument("--check", type=Path, metavar="LIBRARY", help="libtorch_cuda.so of a CUDA build of torch")
    options = parser.parse_args(argv)
    if options.check:
        return check(options.check, options.out)
    bad = 0
    for arch in options.arch:
        rows = []
        for case in (case for op in options.op for case in OPS[op]([arch])):
            row = examine(case, options.issue)
            rows.append(row)
            lines = list(table(rows, options.issue))
            print("\n".join(lines if len(rows) == 1 and arch == options.arch[0] else lines[-1:]), flush=True)
            for problem in misses(row):
                bad += 1
                print(f"  ^ {problem}", file=sys.stderr)
        if options.out:
            rows = _with_others(options.out / f"sm_{arch}.json", rows, options.op)
            facts = {"triton": triton.__version__, "sm": arch, "measured": False, "rows": rows}
            _write(options.out / f"sm_{arch}.json", facts)
            text = "\n".join(_page(arch, rows, options.issue))
            (options.out / f"sm_{arch}.md").write_text(text, encoding="utf-8")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
