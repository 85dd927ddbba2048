"""`l2v data build` on synthetic documents: peak memory, kills and restarts, leaks, near-duplicate recall.

l2v bench data_build [--documents 1000000] [--workers 2] [--out FOLDER]

A tenth of the documents is built twice, once undisturbed and once with kills: the shards must be the same, byte for byte. Then
all of them are built with a SIGKILL in the reading and one after it. Memory is the resident memory of all processes of the
build together, looked at ten times a second; it must not grow with the documents.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.command import Benchmark
from benchmarks.data.corpus import Corpus, Verdict, judge
from benchmarks.pages import markdown, write
from l2v.data.corpus.config import Language

MAX_MEMORY_GROWTH = 1.35
"""How much more memory ten times as many documents may take."""
REASONS = {
    "leak": "leaks",
    "copy": "next to a copy that was kept",
    "language": "refused by the language filter (random words are hard to detect), which refuses each again when asked alone",
    "lost": "LOST",
}
SETTINGS = {
    "language": {"keep": ["da"], "among": ["da", "no", "sv", "en"], "characters": 60},
    "near": {"threshold": 0.8, "permutations": 64, "words": 3},
    "chunk": 2000,
    "shard": 100_000,
}


@dataclass
class Watched:
    """Runs of one build, up to its end."""

    seconds: float = 0.0
    peak: int = 0
    peak_of_one: int = 0
    kills: list[str] = field(default_factory=list)


def memory(process: psutil.Process) -> tuple[int, int]:
    """Resident bytes of a process and all below it: together, and of the largest."""
    sizes = [0]
    try:
        for each in [process, *process.children(recursive=True)]:
            sizes.append(each.memory_info().rss)
    except psutil.NoSuchProcess:
        pass
    return sum(sizes), max(sizes)


def build(config: Path, documents: int, out: Path, workers: int, kills: list[float]) -> Watched:
    """Build to the end; SIGKILL once for each share of `kills` of the chunks (1 and more: after the reading)."""
    watched, command = (
        Watched(),
        [sys.executable, "-m", "l2v.commands.main", "data", "build", str(config), "--out", str(out)],
    )
    total = -(-documents // SETTINGS["chunk"])
    for at in [*kills, None]:
        begun = time.monotonic()
        process = subprocess.Popen([*command, "--workers", str(workers)], stderr=subprocess.DEVNULL)
        seen = psutil.Process(process.pid)
        while process.poll() is None:
            both, one = memory(seen)
            watched.peak, watched.peak_of_one = max(watched.peak, both), max(watched.peak_of_one, one)
            if at is not None and reached(out, at, total):
                below = seen.children(recursive=True)
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                psutil.wait_procs(below, timeout=30)
                watched.kills.append(f"{at:.0%} of the chunks" if at < 1 else "while duplicates were looked for")
                break
            time.sleep(0.1)
        watched.seconds += time.monotonic() - begun
        if at is None and process.returncode:
            raise SystemExit(f"the build ended with {process.returncode}")
        if at is not None and process.returncode != -signal.SIGKILL:
            raise SystemExit("the build was over before it could be killed")
    return watched


def reached(out: Path, at: float, total: int) -> bool:
    """Whether a build has come so far."""
    if at >= 1:  # the reading is over
        return (out / ".work" / "rows").is_dir() or (out / ".work" / "rows.tmp").is_dir()
    return sum(1 for _ in (out / ".work" / "chunks").glob("*.parquet")) >= at * total


def digest(out: Path) -> str:
    """Of all shards, reports and the card."""
    found = hashlib.sha256()
    for path in sorted(p for p in out.iterdir() if p.is_file()):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def row(name: str, corpus: Corpus, watched: Watched, verdict: Verdict) -> dict:
    """A line of the table."""
    return {
        "build": name, "documents": corpus.count, "kills": watched.kills, "seconds": round(watched.seconds, 1),
        "documents_per_second": round(corpus.count / watched.seconds), "peak_mib": round(watched.peak / 2**20),
        "peak_of_one_process_mib": round(watched.peak_of_one / 2**20), "twice": verdict.twice,
        "planted": dict(verdict.planted), "left": dict(verdict.left), "gone": dict(verdict.gone),
    }  # fmt: skip


def page(rows: list[dict], same: bool, facts: dict) -> str:
    """The Markdown page."""
    big = rows[-1]
    planted, left = big["planted"], big["left"]
    gone = {kind: planted[kind] - left.get(kind, 0) for kind in planted}
    near = [
        [kind.removeprefix("near "), f"{planted[kind]:,}", f"{gone[kind]:,}", f"{gone[kind] / planted[kind]:.1%}"]
        for kind in sorted(planted, reverse=True)
        if kind.startswith("near")
    ]
    heads = [
        "build",
        "documents",
        "killed at",
        "s",
        "documents/s",
        "peak MiB, all processes",
        "of the largest",
        "rows twice",
    ]
    lines = [
        [r["build"], f"{r['documents']:,}", ", ".join(r["kills"]) or "never", f"{r['seconds']:,.0f}",
         f"{r['documents_per_second']:,}", f"{r['peak_mib']:,}", f"{r['peak_of_one_process_mib']:,}", str(r["twice"])]
        for r in rows
    ]  # fmt: skip
    return "\n".join(
        [
            f"Building {big['documents']:,} synthetic documents of 40 words with {facts['workers']} workers on "
            f"{facts['cores']} cores (load {facts['load']:.1f} at the start): a build on a CPU, with all filters on.\n",
            markdown(heads, lines),
            f"\nTen times the documents take {rows[-1]['peak_mib'] / rows[0]['peak_mib']:.2f} times the memory "
            f"(at most {MAX_MEMORY_GROWTH} is asked for).",
            f"Killed and restarted against undisturbed, {rows[0]['documents']:,} documents: "
            f"{'the same bytes' if same else 'OTHER BYTES'} in every file.\n",
            f"Of {big['documents']:,}: leaks found {gone['leak']:,} of {planted['leak']:,}; exact copies found "
            f"{gone['copy']:,} of {planted['copy']:,}; documents of all kinds that were dropped: "
            + ", ".join(f"{count:,} {REASONS[why]}" for why, count in sorted(big["gone"].items()))
            + f"; {big['gone'].get('lost', 0):,} without a reason.\n",
            f"Near copies, threshold {SETTINGS['near']['threshold']}, {SETTINGS['near']['permutations']} permutations:\n",
            markdown(["similarity", "planted", "found", "share"], near),
        ]
    )


def run(options: argparse.Namespace) -> int:
    """Prints the page and writes it; the exit code is 1 if a row was lost or occurs twice, a leak stays, or memory grows."""
    count = 20_000 if options.quick else options.documents
    facts = {"workers": options.workers, "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0],
             "settings": SETTINGS, "growth_allowed": MAX_MEMORY_GROWTH}  # fmt: skip
    rows, digests = [], []
    with tempfile.TemporaryDirectory(prefix="l2v-data-build-") as temporary:
        for name, documents, kills in (
            ("undisturbed", count // 10, []),
            ("killed", count // 10, [0.3, 0.7]),
            ("killed", count, [0.2, 0.6, 1.0]),
        ):
            folder = Path(temporary) / f"{documents}"
            corpus = Corpus(documents)
            if not folder.is_dir():
                corpus.write(folder)
            out = Path(temporary) / f"out-{len(rows)}"
            watched = build(corpus.config(folder, **SETTINGS), documents, out, options.workers, kills)
            rows.append(row(name, corpus, watched, judge(corpus, out, Language(**SETTINGS["language"]))))
            digests.append(digest(out))
            print(rows[-1], flush=True)
    same = digests[0] == digests[1]
    text = page(rows, same, facts)
    print(text)
    big = rows[-1]
    ok = same and not big["left"].get("leak") and not any(r["twice"] or r["gone"].get("lost") for r in rows)
    ok &= options.quick or big["peak_mib"] <= MAX_MEMORY_GROWTH * rows[0]["peak_mib"]
    if options.out:
        write(options.out, "data_build", {"facts": facts, "builds": rows, "same_bytes": same, "ok": bool(ok)}, text)
    return int(not ok)


BENCHMARK = Benchmark(
    name="data_build",
    doc=__doc__,
    quick="20,000 documents, a check of the benchmark itself",
    options={
        "--documents": {"type": int, "default": 1_000_000},
        "--workers": {"type": int, "default": 2},
    },
    any_device=False,
    run=run,
)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
