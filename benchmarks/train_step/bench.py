"""The full training step: `l2v train` itself against the reference package, transformers + PEFT, Liger, sentence-transformers.

l2v bench train_step [--out FOLDER] [--model 8b|smollm2|mini] [--minutes M] [--llm2vec PATH]

Ours is the training program and no second loop: `l2v.train` with the recipe, as the one rank of a launcher; its numbers are
those of its metrics.jsonl. Weights are random and lie in a folder that all providers load (`base.model=FOLDER`, where
`base.init=random` would make others for each); all take the same examples in the same steps. Every run is a process of its
own, in turns if there are several rounds; a result is on the disk as soon as it is there, and the same command goes on where
a run stopped.

8b: Llama-3-8B as in llama3-8b-da.yaml, for a GPU. smollm2: the quickstart's own work, for a CPU. mini: a check of all this.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.harness import arguments, device_facts
from benchmarks.train_step.report import Run, comparison, disagreement, page, save, targets
from benchmarks.train_step.runs import Runner
from benchmarks.train_step.work import MODELS, Model, Work
from l2v.machine import processor

PEERS = ("llm2vec", "transformers_peft", "liger", "sentence_transformers")
LEAST_SECONDS = 20


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

    First a workload by plain and by fused layers, whose losses must agree; the reference; the ladder; then the others.
    """
    out: list[Cell] = []
    for workload in workloads:
        steps = [x for x in rungs(model) if x != "fp8"] if workload in ladder else []
        ours = [x for x in ("l2v",) if x in providers]
        first = [x for x in ("llm2vec",) if x in providers]
        rest = [x for x in PEERS if x in providers and x not in first]
        out += [Cell(workload, x) for x in [*steps[:1], *ours, *first, *steps[1:], *rest]]
    return out + [Cell(x, "fp8") for x in workloads if x in ladder and "fp8" in rungs(model)]


def main(argv: list[str] | None = None) -> int:
    """Prints and writes the tables; the exit code is 1 if ours did not run, or fused and plain layers disagree."""
    parser = arguments("train_step", __doc__, quick="the mini model, a check of the benchmark itself")
    parser.add_argument("--model", choices=tuple(MODELS), help="default: 8b on a GPU, mini on a CPU")
    parser.add_argument("--workloads", default="mntp,simcse,supervised")
    parser.add_argument("--providers", default=",".join(("l2v", *PEERS)))
    parser.add_argument("--ladder", default=None, metavar="WORKLOADS", help="default: mntp; empty for none")
    parser.add_argument(
        "--rounds", type=int, default=None, help="runs of everything, in turns (default: 3 for smollm2, else 1)"
    )
    parser.add_argument("--minutes", type=float, default=None, help="start nothing that would end later")
    parser.add_argument(
        "--llm2vec",
        metavar="PATH",
        help="a Python that has the reference package, or a folder of packages to run it with",
    )
    parser.add_argument("--tokenizer", help="a folder or hub name, in place of one token a word")
    parser.add_argument("--work", type=Path, help="keep weights and texts in this folder")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run left in --out")
    options = parser.parse_args(argv)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    device = torch.empty(0, device=options.device).device
    gpu = device.type == "cuda"
    model = MODELS["mini" if options.quick else options.model or ("8b" if gpu else "mini")]
    rounds = options.rounds or (3 if model.name == "smollm2" else 1)
    ladder = options.ladder if options.ladder is not None else "mntp"
    todo = cells(model, *(_names(x) for x in (options.workloads, options.providers, ladder)))
    name = "train_step_mini" if model.name == "mini" else "train_step"
    end = time.monotonic() + 60 * options.minutes if options.minutes else None
    facts = device_facts(device) | {"model": model.name, "cores": len(os.sched_getaffinity(0)), "rounds": rounds}
    facts |= {"smoke": model.name == "mini", "processor": processor()}
    with tempfile.TemporaryDirectory(prefix="l2v-train-step-", ignore_cleanup_errors=True) as temporary:
        work = Work(model, options.work or Path(temporary), options.tokenizer)
        runner = Runner(work, device, rungs(model), options.llm2vec)
        facts |= runner.prepare()
        runs = [] if options.fresh or not options.out else earlier(options.out / f"{name}.json", facts)

        def show(draw: bool = False) -> int:
            found = comparison(runs, model, facts)
            if options.out:
                data = {"facts": facts, "targets": [x.row() for x in targets(runs, found, facts)]}
                data |= {"results": [asdict(x) for x in found], "runs": [asdict(x) for x in runs]}
                save(options.out, name, data, runs, found, facts, draw)
            return sum(x.provider == "l2v" and x.median is None for x in found)

        runs[:] = [x for x in runs if x.lasting and x.round < rounds]
        done = {(x.workload, x.provider, x.round) for x in runs}
        for number in range(rounds):
            for cell in todo:
                if (cell.workload, cell.provider, number) in done:
                    continue
                left = None if end is None else end - time.monotonic()
                if left is not None and left < LEAST_SECONDS:
                    new = [Run(cell.workload, cell.provider, number, skipped="no time was left")]
                else:
                    new = runner.run(cell.workload, cell.provider, number, left)
                runs += new
                print("\n".join(x.line() for x in new), flush=True)
                show()
                if wrong := disagreement(runs, facts):
                    print(f"train_step: {wrong}; nothing else is timed", file=sys.stderr)
                    return 1
        missing = show(draw=True)
        print(page(runs, comparison(runs, model, facts), facts), flush=True)
    return int(missing > 0)


def earlier(file: Path, facts: dict) -> list[Run]:
    """The runs in a result of the same work on the same device with the same torch."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    same = ("model", "device", "torch", "dtype", "work")
    if any(data["facts"].get(key) != facts[key] for key in same):
        return []
    return [Run(**x) for x in data["runs"]]


def _names(text: str) -> list[str]:
    return [x for x in text.split(",") if x]


if __name__ == "__main__":
    sys.exit(main())
