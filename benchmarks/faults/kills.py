"""Kill a training run again and again, at seeded instants, and see that it ends with the bits of the run that was not killed.

l2v bench kills [--kills 50] [--damages 200] [--seed 0] [--out FOLDER]

A small Llama without weights on the Danish sample, every stage, on one rank and on two, with a checkpoint every other step.
A kill is SIGKILL, to all ranks or to one of two (then the watchdog has to end the other), at a random moment between two
steps or inside the write of a checkpoint: there the writer's unfinished folder is still on the disk afterwards. Each kill is
followed by a start of the same command. Counted: runs whose adapter equals the undisturbed one bit for bit, checkpoints that
were reported as saved and are gone, and, on copies of a finished run, damaged checkpoints that are noticed. Processes are
forked from one that has imported everything, so that a start costs a second and not ten.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

from benchmarks.command import Benchmark
from benchmarks.harness import device_facts, free_port
from benchmarks.pages import write

STEPS, SAVE_EVERY = 40, 2
STAGES = ("mntp", "simcse", "supervised")
ADAPTER = "adapter/adapter_model.safetensors"


def recipe(folder: Path) -> Path:
    """A run of seconds: three stages from the base, LoRA wide enough that writing a checkpoint takes a while."""
    common = {
        "data": "sample:da/train",
        "steps": STEPS,
        "save_every": SAVE_EVERY,
        "length": 32,
        "micro_tokens": 512,
        "lr": 1e-3,
    }
    tree = {
        "name": "kills",
        "base": {
            "model": "smollm2-135m-instruct",
            "init": "random",
            "precision": "fp32",
            "overrides": {
                "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2,
            },
        },
        "lora": {"r": 64, "alpha": 64},
        "zero": {"stage": 2},
        "tracking": {"tensorboard": False},
        "stages": {name: {"objective": name, "batch": 8, **common} for name in STAGES},
    }  # fmt: skip
    path = folder / "kills.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return path


def rank_process(environment: dict[str, str], arguments: list[str], log: str) -> None:
    """One rank, in a process that was forked for it."""
    os.environ |= environment
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(out, number)
    sys.stdout = io.TextIOWrapper(open(1, "wb", 0, closefd=False), write_through=True)  # noqa: SIM115
    sys.stderr = io.TextIOWrapper(open(2, "wb", 0, closefd=False), write_through=True)  # noqa: SIM115
    from l2v.train import main as train

    sys.exit(train(arguments))


class Job:
    """The ranks of one start."""

    def __init__(self, context, arguments: list[str], world: int, log: Path) -> None:
        self.log, shared = log, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
        log.unlink(missing_ok=True)
        self.ranks = [
            context.Process(
                target=rank_process, args=(shared | {"RANK": str(r), "LOCAL_RANK": str(r)}, arguments, str(log))
            )
            for r in range(world)
        ]
        for rank in self.ranks:
            rank.start()

    @property
    def over(self) -> bool:
        return not any(rank.is_alive() for rank in self.ranks)

    def wait(self, seconds: float = 300) -> list[int]:
        """Exit codes; those that do not end in time are a failure of what is measured."""
        deadline = time.monotonic() + seconds
        for rank in self.ranks:
            rank.join(max(0.1, deadline - time.monotonic()))
        if not self.over:
            for rank in self.ranks:
                rank.kill()
            raise SystemExit(f"ranks hang after {seconds:.0f} s:\n{self.log.read_text()}")
        return [rank.exitcode for rank in self.ranks]

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.is_file() else ""


def newest_step(stage: Path) -> int:
    """By this package's own search, in silence."""
    from l2v.training.checkpoint import newest

    found = newest(stage / "checkpoints", log=None)
    return found.step if found else 0


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def strike(job: Job, stage: Path, step: int, inside: bool, draw: random.Random) -> bool | None:
    """Kill at about that step; None if the run ended before, else whether a checkpoint was half written."""
    folder = stage / "checkpoints"
    while not job.over:
        if not inside and lines(stage / "metrics.jsonl") >= step:
            time.sleep(draw.uniform(0, 0.06))
            break
        if inside and lines(stage / "metrics.jsonl") >= step - SAVE_EVERY and list(folder.glob(".step-*.partial")):
            time.sleep(draw.uniform(0, 0.001))
            break
        time.sleep(0.0003 if inside else 0.005)
    if job.over:
        return None
    victims = job.ranks if draw.random() < 0.7 else [draw.choice(job.ranks)]
    for rank in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank.pid, signal.SIGKILL)
    unfinished = list(folder.glob(".step-*.partial"))
    codes = job.wait(60)
    if all(code == 0 for code in codes):
        return None
    return bool(unfinished and list(folder.glob(".step-*.partial")))


def damage(folder: Path, draw: random.Random) -> str:
    """Do something to a checkpoint that a disk or a kill may do; returns what."""
    how = draw.choice(["flip a bit", "cut short", "empty", "remove"])
    file = draw.choice(sorted(folder.iterdir()))
    content = bytearray(file.read_bytes())
    if how == "flip a bit":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
    elif how == "cut short":
        file.write_bytes(content[: draw.randrange(len(content))])
    elif how == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
    return how


def damages(run: Path, count: int, draw: random.Random, work: Path) -> dict[str, list[int]]:
    """Of `count` damaged newest checkpoints of a run, how many were noticed and skipped: {how: [noticed, all]}."""
    table: dict[str, list[int]] = {}
    saved = sorted((run / "checkpoints").glob("step-*"))
    for _ in range(count):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(run / "checkpoints", work)
        how = damage(work / saved[-1].name, draw)
        row = table.setdefault(how, [0, 0])
        row[1] += 1
        from l2v.training.checkpoint import newest

        heard: list[str] = []
        found = newest(work, log=heard.append)
        before = int(saved[-2].name.split("-")[1])
        row[0] += found is not None and found.step == before and len(heard) == 1 and saved[-1].name in heard[0]
    return table


def run(options: argparse.Namespace) -> int:
    """Kill, count, write; the exit code is 1 where anything was lost."""
    options.kills = options.kills or (4 if options.quick else 50)
    options.damages = options.damages or (20 if options.quick else 200)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["l2v.train", "deepspeed", "transformers.models.llama.modeling_llama"])
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="l2v-kills-") as name:
        rows, table = campaign(context, Path(name), options, draw)
    facts = device_facts(torch.device("cpu"))
    data = {
        "facts": facts,
        "seed": options.seed,
        "steps": STEPS,
        "save_every": SAVE_EVERY,
        "runs": rows,
        "damages": table,
    }
    text = page(data)
    print(text)
    if options.out:
        write(options.out, "kills", data, text)
    fine = all(row["equal"] and not row["lost"] for row in rows) and all(a == b for a, b in table.values())
    return 0 if fine else 1


def undisturbed(context, recipe: Path, stage: str, world: int, folder: Path) -> Path:
    """The stage's folder of a run that is not killed."""
    out = folder / f"whole-{world}"
    job = Job(context, [str(recipe), "--stage", stage, f"out={out}"], world, folder / "log.txt")
    if any(job.wait()):
        raise SystemExit(job.output())
    return out / stage


def disturbed(
    context, arguments: list[str], stage: Path, world: int, steps: list[int], draw: random.Random, bar: tqdm
) -> dict[str, int]:
    """A run that is killed at about these steps and resumed after each: its counts."""
    log = stage.parents[1] / "log.txt"
    row = {"kills": 0, "inside_a_write": 0, "lost": 0}
    for step in steps:
        job = Job(context, arguments, world, log)
        struck = strike(job, stage, step, draw.random() < 0.5, draw)
        if struck is None:
            return row
        saved = [int(n) for n in re.findall(r"step (\d+) is saved", job.output())]
        row["lost"] += bool(saved) and newest_step(stage) < max(saved)
        row["kills"] += 1
        row["inside_a_write"] += struck
        bar.update(1)
    job = Job(context, arguments, world, log)
    if any(job.wait()):
        raise SystemExit(job.output())
    return row


def campaign(context, folder: Path, options: argparse.Namespace, draw: random.Random) -> tuple[list[dict], dict]:
    """Undisturbed runs, then disturbed ones in turns over stages and numbers of ranks until there were enough kills."""
    path, whole, rows, at = recipe(folder), {}, [], 0
    kinds = [(stage, world) for world in (1, 2) for stage in STAGES]
    with tqdm(total=options.kills, desc="kills", unit="kill") as bar:
        while bar.n < options.kills:
            stage, world = kinds[at % len(kinds)]
            at += 1
            if (stage, world) not in whole:
                whole[stage, world] = undisturbed(context, path, stage, world, folder)
            out = folder / f"run-{at}"
            steps = sorted(draw.sample(range(1, STEPS), min(options.kills - bar.n, 5 if world == 1 else 3)))
            arguments = [str(path), "--stage", stage, f"out={out}"]
            row = {"stage": stage, "ranks": world}
            row |= disturbed(context, arguments, out / stage, world, steps, draw, bar)
            row["equal"] = (out / stage / ADAPTER).read_bytes() == (whole[stage, world] / ADAPTER).read_bytes()
            rows.append(row)
            shutil.rmtree(out)
    return rows, damages(whole["mntp", 1], options.damages, draw, folder / "damaged")


def page(data: dict) -> str:
    """Markdown."""
    rows = data["runs"]
    out = [
        f"# Killed {sum(r['kills'] for r in rows)} times", "",
        f"Runs of {data['steps']} steps, a checkpoint every {data['save_every']}; seed {data['seed']}; "
        f"{data['facts']['device']}, torch {data['facts']['torch']}.", "",
        "| stage | ranks | runs | kills | inside a write | reported as saved, and lost | runs equal, bit for bit |",
        "|-|-:|-:|-:|-:|-:|-:|",
    ]  # fmt: skip
    for stage, world in dict.fromkeys((r["stage"], r["ranks"]) for r in rows):
        of = [r for r in rows if (r["stage"], r["ranks"]) == (stage, world)]
        sums = [sum(r[key] for r in of) for key in ("kills", "inside_a_write", "lost", "equal")]
        out.append(f"| {stage} | {world} | {len(of)} | {sums[0]} | {sums[1]} | {sums[2]} | {sums[3]} |")
    sums = [sum(r[key] for r in rows) for key in ("kills", "inside_a_write", "lost", "equal")]
    out.append(f"| all | | {len(rows)} | {sums[0]} | {sums[1]} | {sums[2]} | {sums[3]} |")
    out += ["", "| damage to the newest checkpoint | noticed, named and skipped | of |", "|-|-:|-:|"]
    out += [f"| {how} | {noticed} | {of} |" for how, (noticed, of) in sorted(data["damages"].items())]
    return "\n".join(out) + "\n"


BENCHMARK = Benchmark(
    name="kills",
    doc=__doc__,
    quick="4 kills and 20 damages, a check of the benchmark itself",
    options={
        "--kills": {"type": int, "help": "default: 50"},
        "--damages": {"type": int, "help": "default: 200"},
        "--seed": {"type": int, "default": 0},
    },
    any_device=False,
    run=run,
)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
