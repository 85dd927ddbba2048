"""The full training step: `l2v train` itself against llm2vec, transformers + PEFT, Liger, sentence-transformers, NeMo.

l2v bench train_step [--out FOLDER] [--model 8b|shallow|smollm2|mini] [--minutes M] [--llm2vec PATH] [--nemo PATH]

Ours is the training program and no second loop: `l2v.train` with the recipe, as the one rank of a launcher; its numbers are
those of its metrics.jsonl. Weights are random and stored in a folder that all providers load (`base.model=FOLDER`, where
`base.init=random` would make others for each); all take the same examples in the same steps. Every run is its own process, in
turns if there are several rounds. A result is on the disk as soon as it is measured, and the same command resumes where a run
stopped.

8b: Llama-3-8B as in llama3-8b-da.yaml, for a GPU; shallow: two of its layers, which compile the same kernels. smollm2: the
quickstart's own work, for a CPU. mini: a check of all this.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.command import Benchmark
from benchmarks.harness import busy_cores, device_facts
from benchmarks.train_step.report import Run, comparison, disagreement, page, save, targets
from benchmarks.train_step.runs import ELSEWHERE, Runner
from benchmarks.train_step.work import MODELS, Model, Work
from l2v.machine import processor

PEERS = ("llm2vec", "transformers_peft", "liger", "sentence_transformers", "nemo")
MIN_SECONDS_LEFT = 20


@dataclass(frozen=True)
class Cell:
    """One thing to run: a workload by a provider, which is a peer, or `l2v` or a rung of its ladder."""

    workload: str
    provider: str


def rungs(model: Model) -> dict[str, list[str]]:
    """The ladder that begins at the padded peer: what each further step changes, as keys of the recipe (STAGE is the stage).

    Padding removed (and with it all logits but those of labelled positions, which the training program never makes), fused
    layers, less and less computed twice, an fp8 base.
    """
    start = "layer" if model.checkpointing else "none"
    plain, fused = ([f"base.layers={layers}", f"stages.STAGE.recompute={start}"] for layers in ("plain", "fused"))
    out = {"packed": plain, "fused": fused}
    if model.checkpointing:
        out |= {how: ["base.layers=fused", f"stages.STAGE.recompute={how}"] for how in ("cheap", "none")}
        out["fp8"] = ["base.base_precision=fp8"]
    return out


def cells(model: Model, workloads: Sequence[str], providers: Sequence[str], ladder: Sequence[str]) -> list[Cell]:
    """What to run in a round, in the order in which a machine lent for minutes should answer.

    First a workload by plain and by fused layers, whose losses must agree; llm2vec; the ladder; then the others.
    """
    out: list[Cell] = []
    for workload in workloads:
        steps = [x for x in rungs(model) if x != "fp8"] if workload in ladder else []
        ours = [x for x in ("l2v",) if x in providers]
        first = [x for x in ("llm2vec",) if x in providers]
        rest = [x for x in PEERS if x in providers and x not in first]
        out += [Cell(workload, x) for x in [*steps[:1], *ours, *first, *steps[1:], *rest]]
    return out + [Cell(x, "fp8") for x in workloads if x in ladder and "fp8" in rungs(model)]


class Campaign:
    """All runs of one call: those that an earlier call left, and the new ones; written after each."""

    def __init__(self, model: Model, options: argparse.Namespace, facts: dict, runner: Runner) -> None:
        self.model, self.out, self.facts, self.runner = model, options.out, facts, runner
        self.name = "train_step_mini" if model.name == "mini" else "train_step"
        self.end = time.monotonic() + 60 * options.minutes if options.minutes else None
        known = [] if options.fresh or not self.out else earlier(self.out / f"{self.name}.json", facts)
        self.runs = [x for x in known if x.lasting and x.round < facts["rounds"]]

    def show(self, draw: bool = False) -> int:
        """Write what there is; returns how many workloads ours has no time for."""
        found = comparison(self.runs, self.model, self.facts)
        if self.out:
            data = {"facts": self.facts, "targets": [x.row() for x in targets(self.runs, found, self.facts)]}
            data |= {"results": [asdict(x) for x in found], "runs": [asdict(x) for x in self.runs]}
            save(self.out, self.name, data, self.runs, found, self.facts, draw)
        return sum(x.provider == "l2v" and x.median is None for x in found)

    def run(self, todo: Sequence[Cell]) -> str:
        """Whatever has not run; returns how fused and plain layers disagree, after which nothing else is run, or ""."""
        done = {(x.workload, x.provider, x.round) for x in self.runs}
        for number in range(self.facts["rounds"]):
            for cell in todo:
                if (cell.workload, cell.provider, number) in done:
                    continue
                left = None if self.end is None else self.end - time.monotonic()
                if left is not None and left < MIN_SECONDS_LEFT:
                    new = [Run(cell.workload, cell.provider, number, skipped="no time was left")]
                else:
                    new = self.runner.run(cell.workload, cell.provider, number, left)
                self.runs += new
                print("\n".join(x.line() for x in new), flush=True)
                self.show()
                if wrong := disagreement(self.runs, self.facts):
                    return wrong
        return ""


def run_all(options: argparse.Namespace) -> int:
    """Prints and writes the tables; the exit code is 1 if ours did not run, or fused and plain layers disagree."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    device = options.device
    model = MODELS["mini" if options.quick else options.model or ("8b" if device.type == "cuda" else "mini")]
    rounds = options.rounds or (3 if model.name == "smollm2" else 1)
    todo = cells(model, *(_names(x) for x in (options.workloads, options.providers, options.ladder)))
    facts = device_facts(device) | {"model": model.name, "cores": len(os.sched_getaffinity(0)), "rounds": rounds}
    facts |= {"smoke": model.name == "mini", "processor": processor(), "busy": options.busy}
    with (
        tempfile.TemporaryDirectory(prefix="l2v-train-step-", ignore_cleanup_errors=True) as temporary,
        busy_cores(options.busy),
    ):
        work = Work(model, options.work or Path(temporary), options.tokenizer)
        runner = Runner(work, device, rungs(model), {name: getattr(options, name) for name in ELSEWHERE})
        facts |= runner.prepare()
        campaign = Campaign(model, options, facts, runner)
        if wrong := campaign.run(todo):
            print(f"train_step: {wrong}; nothing else is timed", file=sys.stderr)
            return 1
        missing = campaign.show(draw=True)
        print(page(campaign.runs, comparison(campaign.runs, model, facts), facts), flush=True)
    return int(missing > 0)


def earlier(file: Path, facts: dict) -> list[Run]:
    """The runs in a result of the same work on the same device with the same torch."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    same = ("model", "device", "torch", "dtype", "work", "busy", "threads")
    if any(data["facts"].get(key) != facts.get(key) for key in same):
        return []
    return [Run(**x) for x in data["runs"]]


def _names(text: str) -> list[str]:
    return [x for x in text.split(",") if x]


BENCHMARK = Benchmark(
    name="train_step",
    doc=__doc__,
    quick="the mini model, a check of the benchmark itself",
    options={
        "--model": {"choices": tuple(MODELS), "help": "default: 8b on a GPU, mini on a CPU"},
        "--workloads": {"default": "mntp,simcse,supervised"},
        "--providers": {"default": ",".join(("l2v", *PEERS))},
        "--ladder": {"default": "mntp", "metavar": "WORKLOADS", "help": "default: mntp; empty for none"},
        "--rounds": {"type": int, "help": "runs of everything, in turns (default: 3 for smollm2, else 1)"},
        "--minutes": {"type": float, "help": "start nothing that would end later"},
        "--llm2vec": {
            "metavar": "PATH",
            "help": "a Python that has the llm2vec package, or a folder of packages to run it with",
        },
        "--nemo": {"metavar": "PATH", "help": "the same for nemo-automodel"},
        "--tokenizer": {"help": "a folder or hub name, in place of one token a word"},
        "--work": {"type": Path, "help": "keep weights and texts in this folder"},
        "--busy": {"type": int, "default": 0, "help": "so many processes compute beside it"},
        "--fresh": {"action": "store_true", "help": "forget what an earlier run left in --out"},
    },
    run=run_all,
)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
