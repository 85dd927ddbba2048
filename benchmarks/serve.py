"""The server at saturation against `Encoder.encode` on the same core: model thread on one core, HTTP and clients on the other.

l2v bench serve [--quick] [--out FOLDER] [--model smollm2|mini] [--texts N] [--rounds N]

The server runs in a process of its own, its model thread pinned to the first core and all its other threads to the second, where
the clients of the package openai run too. `encode` has the first core to itself in its turns; the server is idle then. Both have
to give the same vectors. Times of the clock suffer from other work on the machine; processor times hardly do, so both are given.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.command import Benchmark
from benchmarks.encode import export, profiles
from benchmarks.harness import Target, Unavailable, device_facts, need_package
from benchmarks.pages import markdown, targets_table, write
from l2v.encoder import Encoder

CLIENTS = 8
INPUTS = 16  # texts of a request
TICKS = os.sysconf("SC_CLK_TCK")
TARGET = 0.9


@dataclass(frozen=True)
class Turn:
    """One turn: seconds of the clock, of the model's thread, and of everything that is not the model's thread of the server."""

    provider: str
    seconds: float
    model_seconds: float
    other_seconds: float = 0.0


class Server:
    """The child process and its client."""

    def __init__(self, folder: Path, cores: Sequence[int]) -> None:
        import openai

        code = f"from benchmarks.serve import child; child({str(folder)!r}, {list(cores)!r})"
        self.process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        lines = [self.process.stdout.readline() for _ in range(2)]  # in any order
        address = next((line.partition(" at ")[2].strip() for line in lines if "http" in line), None)
        thread = next((line for line in lines if line.strip().isdecimal()), None)
        if address is None or thread is None:
            self.close()
            raise Unavailable(f"the server did not start: {lines}")
        self.thread = int(thread)
        self.client = openai.OpenAI(base_url=address, api_key="none", timeout=3600)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of the texts, requests of `INPUTS` by `CLIENTS` clients."""
        import base64

        def ask(part: Sequence[str]) -> list[np.ndarray]:
            reply = self.client.embeddings.create(input=list(part), model="served", encoding_format="base64")
            rows = [row.embedding for row in reply.data]
            return [np.frombuffer(base64.b64decode(row), "<f4") if isinstance(row, str) else row for row in rows]

        parts = [texts[at : at + INPUTS] for at in range(0, len(texts), INPUTS)]
        with ThreadPoolExecutor(CLIENTS) as pool:
            return np.array([row for rows in pool.map(ask, parts) for row in rows], np.float32)

    def processor(self) -> tuple[float, float]:
        """Processor seconds of the model's thread, and of the whole process."""
        pid = self.process.pid
        return _ticks(f"/proc/{pid}/task/{self.thread}/stat"), _ticks(f"/proc/{pid}/stat")

    def close(self) -> None:
        """End it, and wait."""
        self.process.terminate()
        self.process.wait(60)


def _ticks(path: str) -> float:
    fields = Path(path).read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def child(folder: str, cores: Sequence[int]) -> None:
    """The server's process: prints its address, then the number of the model's thread."""
    from l2v.serving.server import Settings, bound, serve

    model_core, http_core = cores
    os.sched_setaffinity(0, {http_core})

    def pin() -> None:
        while not (found := [t for t in threading.enumerate() if t.name == "l2v model"]):
            time.sleep(0.01)
        os.sched_setaffinity(found[0].native_id or 0, {model_core})
        print(found[0].native_id, flush=True)

    threading.Thread(target=pin, daemon=True).start()
    serve(Encoder.from_pretrained(folder), bound("127.0.0.1", 0), Settings("served", threads=1))


def turns(encoder: Encoder, server: Server, texts: list[str], cores: Sequence[int], rounds: int) -> list[Turn]:
    """Both providers in turns, after one turn each that is not counted and in which their vectors are compared."""
    model_core, http_core = cores
    torch.set_num_threads(1)

    def ours() -> np.ndarray:
        os.sched_setaffinity(0, {model_core})
        return encoder.encode(texts)

    def theirs() -> np.ndarray:
        os.sched_setaffinity(0, {http_core})
        return server.encode(texts)

    distance = float(np.abs(ours() - theirs()).max())
    if not distance < 1e-5:
        raise ValueError(f"the server gives other vectors: {distance:.1e} apart")
    found = []
    for _ in range(rounds):
        found += [_turn("encode", ours, server), _turn("serve", theirs, server)]
    return found


def _turn(name: str, call: Callable[[], object], server: Server) -> Turn:
    model, process = server.processor()
    own, begun = time.process_time(), time.perf_counter()
    call()
    seconds, own = time.perf_counter() - begun, time.process_time() - own
    if name == "encode":
        return Turn(name, seconds, own)
    after_model, after_process = server.processor()
    return Turn(name, seconds, after_model - model, own + (after_process - process) - (after_model - model))


def run_all(options: argparse.Namespace) -> int:
    """Prints and writes the page; the exit code is 1 if the vectors differ."""
    need_package("openai", "openai")
    need_package("uvicorn", "l2v[serve]")
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise Unavailable("needs two cores")
    model = "mini" if options.quick else options.model
    facts = device_facts(options.device, ("fastapi", "uvicorn", "openai"))
    facts |= {"model": model, "rounds": options.rounds, "load": os.getloadavg()[0], "smoke": options.quick}
    with tempfile.TemporaryDirectory(prefix="l2v-serve-", ignore_cleanup_errors=True) as temporary:
        encoder = Encoder.from_pretrained(export(model, Path(temporary), options.device, "fp32"))
        texts = next(p.texts for p in profiles(encoder, options.texts) if p.name == "sentences")
        server = Server(Path(temporary) / "export", cores)
        try:
            found = turns(encoder, server, texts, cores, options.rounds)
        except ValueError as error:
            print(f"serve: {error}", file=sys.stderr)
            return 1
        finally:
            server.close()
            os.sched_setaffinity(0, cores)
    text = page(found, len(texts), facts)
    print(text)
    if options.out:
        data = {"facts": facts, "texts": len(texts), "turns": [asdict(turn) for turn in found]}
        write(options.out, "serve", data, text)
    return 0


def page(found: Sequence[Turn], texts: int, facts: dict) -> str:
    """The Markdown page: medians, and the two ratios round by round."""
    of = {name: [turn for turn in found if turn.provider == name] for name in ("encode", "serve")}
    rows = []
    for name, own in of.items():
        wall, model, other = (
            statistics.median(getattr(turn, key) for turn in own)
            for key in ("seconds", "model_seconds", "other_seconds")
        )
        thousand = 1000 / texts
        rows.append([name, f"{texts / wall:,.1f}", f"{model * thousand:,.2f}", f"{other * thousand:,.2f}"])
    pairs = list(zip(of["encode"], of["serve"], strict=True))
    wall = statistics.median(ours.seconds / theirs.seconds for ours, theirs in pairs)
    work = statistics.median(ours.model_seconds / theirs.model_seconds for ours, theirs in pairs)
    targets = [
        Target("texts a second of the server at saturation, as a share of encode on the same core", TARGET, wall, True),
        Target("the same by processor seconds of the model's thread", TARGET, work, True),
    ]
    about = (
        f"{facts['model']}, fp32, {texts} texts a turn, {CLIENTS} clients with requests of {INPUTS} texts in base64; medians of "
        f"{facts['rounds']} rounds in turns. Model thread on one core, HTTP and clients on the other. Load of the machine at the "
        f"start: {facts['load']:.1f} on {os.cpu_count()} cores."
    )
    head = ["provider", "texts/s", "processor seconds of the model for 1,000 texts", "of HTTP and clients"]
    return f"{about}\n\n{markdown(head, rows)}\n\n{targets_table(targets)}"


OPTIONS = {
    "--model": {"choices": ["smollm2", "mini"], "default": "smollm2", "help": "default: smollm2"},
    "--texts": {"type": int, "default": 1024, "help": "texts of a turn (default: 1024)"},
    "--rounds": {"type": int, "default": 5, "help": "default: 5"},
}
BENCHMARK = Benchmark(name="serve", doc=__doc__ or "", quick="a mini model", options=OPTIONS, run=run_all)
main = BENCHMARK.main

if __name__ == "__main__":
    sys.exit(main())
