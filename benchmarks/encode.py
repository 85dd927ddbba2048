"""Encoding texts: `Encoder` against sentence-transformers, with the same exported model.

l2v bench encode [--quick] [--out FOLDER] [--model 8b|smollm2|mini] [--base NAME] [--threads N] [--busy N]

sentence-transformers loads the folder that `Encoder.save` wrote, sorts texts by length and pads each batch to its longest, in
its default batch of 32 and in one that suits the device better. Both have to give the same vectors before either is timed;
then they take turns in one process. Lengths of texts are log-normal around those of the train-step benchmark, and over a wide
range in `mixed`.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.command import Benchmark
from benchmarks.harness import (
    Result,
    Unavailable,
    busy_cores,
    device_facts,
    need_package,
    peak_memory,
    reason,
    time_interleaved,
)
from benchmarks.pages import bars, markdown, token_rates, work_headline, write
from benchmarks.train_step.work import MODELS, Lengths, Words, write_base
from l2v.encoder import Encoder

PROFILES = {
    "queries": (Lengths("query", 20, 64),),
    "sentences": (Lengths("sentence", 30, 128),),
    "passages": (Lengths("passage", 200, 512),),
    "mixed": (Lengths("query", 20, 64), Lengths("sentence", 60, 256), Lengths("passage", 200, 512)),
}
TEXTS = {"8b": 2048, "smollm2": 128, "mini": 64}
LONG_PROFILES = {"passages", "mixed"}
BATCHES = {"cuda": (32, 256), "cpu": (4, 8, 32)}
MAX_DISTANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
"""Of the distance between two vectors of length 1."""

BASE = "smollm2-135m-instruct"

Encode = Callable[[Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class Profile:
    """Texts, and the tokens that `Encoder` makes of them: no pads."""

    name: str
    texts: list[str]
    tokens: int


def profiles(encoder: Encoder, count: int) -> list[Profile]:
    """Texts of every length profile, the same at every call; a quarter as many of those with long texts."""
    tokenizer = encoder.tokenizer
    words = Words.counted(tokenizer.tokenizer)
    frame = len(tokenizer.embedded([words.words[0]])[0][0]) - words.tokens[0]
    out = []
    for name, kinds in PROFILES.items():
        generator = random.Random(name)
        n = max(4, count // 4) if name in LONG_PROFILES else count
        drawn = [generator.choice(kinds).draw(generator) for _ in range(n)]
        texts = [words.text(max(1, tokens - frame) + words.added, generator) for tokens in drawn]
        ids, _, _ = tokenizer.embedded(texts)
        out.append(Profile(name, texts, sum(map(len, ids))))
    return out


def export(model: str, folder: Path, device: torch.device, precision: str, base: str = BASE) -> Path:
    """The folder that both load, in this precision: random weights in the model's shape, or the embedded base."""
    target = folder / "export"
    if not target.is_dir():
        if MODELS[model].shape:
            from l2v.model.load import dtype_of

            base = str(folder / "base")
            if not (folder / "base" / "config.json").is_file():
                write_base(MODELS[model], folder / "base", device, dtype_of(precision))
        Encoder.from_pretrained(base, precision=precision).save(target)
    return target


def sentence_transformer(folder: Path, device: torch.device):
    """The exported model, loaded by sentence-transformers. Raises: Unavailable."""
    need_package("sentence_transformers", "sentence-transformers")
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device=device.type)


class Places:
    """Counts what sentence-transformers computes: tokens and pads."""

    def __init__(self, model) -> None:
        self.count = 0
        model[0].register_forward_pre_hook(self._see)

    def _see(self, module, inputs) -> None:
        self.count += inputs[0]["attention_mask"].numel()

    def of(self, call: Callable[[], np.ndarray]) -> tuple[np.ndarray, int]:
        """What a call gives, and the places that it computed."""
        self.count = 0
        return call(), self.count


def run(
    profile: Profile,
    ours: Encode,
    theirs: dict[str, Encode],
    places,
    device,
    dtype,
    rounds: int,
    clock=time.perf_counter,
) -> list[Result]:
    """All providers on one profile: vectors compared, then times."""
    reference, calls, results = ours(profile.texts), {"l2v": lambda: ours(profile.texts)}, []
    for name, encode in {"l2v": ours, **theirs}.items():
        result = Result(profile.name, name, "encode", facts={"texts": len(profile.texts), "tokens": profile.tokens})
        results.append(result)
        call = calls.setdefault(name, lambda encode=encode: encode(profile.texts))
        try:
            vectors, computed = (reference, profile.tokens) if name == "l2v" else places.of(call)
            result.error = float(np.linalg.norm(vectors - reference, axis=1).max())
            if not result.error < MAX_DISTANCE[dtype]:
                raise ValueError(f"other vectors: {result.error:.1e} apart")
            result.facts["padded"] = 1 - profile.tokens / computed
            result.memory = peak_memory(call, device) if device.type == "cuda" else None
        except (RuntimeError, ValueError) as error:
            result.skipped = reason(error)
            del calls[name]
    times = time_interleaved(
        {name: [call] for name, call in calls.items()}, device, seconds=1e-6, rounds=rounds, clock=clock
    )
    own = times.get("l2v")
    for result in results:
        if taken := times.get(result.provider):
            result.median, result.low, result.high = float(np.median(taken)), min(taken), max(taken)
            result.facts["texts_per_second"] = len(profile.texts) / result.median
            result.facts["tokens_per_second"] = profile.tokens / result.median
            result.facts["faster"] = float(np.median(np.array(taken) / np.array(own))) if own else None
    return results


def table(results: Sequence[Result]) -> str:
    """Markdown: a row a profile and provider."""
    head = ["texts", "tokens a text", "provider", "texts/s", "tokens/s", "pads"]
    head += ["peak MiB", "l2v is faster", "distance"]
    rows = []
    for x in results:
        f = x.facts
        start = [x.workload, f"{f['tokens'] / f['texts']:.0f}", x.provider]
        if x.median is None:
            rows.append([*start, x.skipped, *[""] * 5])
            continue
        memory = "" if x.memory is None else f"{x.memory / 2**20:,.0f}"
        faster = f"{f['faster']:.2f}x" if f["faster"] and x.provider != "l2v" else ""
        numbers = [f"{f['texts_per_second']:,.1f}", f"{f['tokens_per_second']:,.0f}", f"{f['padded']:.0%}"]
        rows.append([*start, *numbers, memory, faster, f"{x.error:.1e}"])
    return markdown(head, rows)


def page(results: Sequence[Result], facts: dict) -> str:
    """The Markdown page."""
    about = (
        f"{facts['model']}, {facts['dtype']}; medians of {facts['rounds']} rounds in turns, ratios taken round by round. "
        "tokens/s: real tokens, never pads. distance: the largest between two vectors of length 1 of the same text."
    )
    if facts.get("cuda") is None:
        about += f" Load of the machine at the start: {facts['load']:.1f} on {facts['cores']} cores."
        about += f" {facts['base']}, {facts['threads']} thread(s), {facts['busy']} busy process(es) beside it;"
        about += f" {facts['clock']} time."
    return f"{work_headline(facts)}.\n\n{about}\n\n{table(results)}"


def peers(folder: Path, device: torch.device) -> tuple[dict[str, Encode], Places | None]:
    """sentence-transformers in every batch size, and what counts its pads; nothing where it is not installed."""
    try:
        loaded = sentence_transformer(folder, device)
    except Unavailable as missing:
        print(f"encode: {missing}", file=sys.stderr)
        return {}, None
    sizes = BATCHES[device.type]
    found = {f"sentence_transformers, {n}": lambda texts, n=n: loaded.encode(texts, batch_size=n) for n in sizes}
    return found, Places(loaded)


def run_all(options: argparse.Namespace) -> int:
    """Prints the table and writes it; the exit code is 1 if ours did not run, or gave other vectors."""
    device = options.device
    if options.threads:
        torch.set_num_threads(options.threads)
    model = "mini" if options.quick else options.model or ("8b" if device.type == "cuda" else "mini")
    name = "encode_mini" if model == "mini" else "encode"
    facts = device_facts(device) | {"model": model, "smoke": model == "mini", "rounds": options.rounds}
    facts |= {
        "load": os.getloadavg()[0],
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "busy": options.busy,
    }
    # With one thread time is the processor's, which other programs do not change.
    own_time = device.type == "cpu" and facts["threads"] == 1
    facts["clock"] = "processor" if own_time else "wall"
    results: list[Result] = []
    with (
        tempfile.TemporaryDirectory(prefix="l2v-encode-", ignore_cleanup_errors=True) as temporary,
        busy_cores(options.busy),
    ):
        folder = export(model, options.work or Path(temporary), device, options.precision, options.base)
        facts["base"] = options.base if model == "smollm2" else "random weights"
        encoder = Encoder.from_pretrained(folder)
        dtype = encoder.model.decoder.dtype
        facts["dtype"] = str(dtype).removeprefix("torch.")
        theirs, places = peers(folder, device)
        for profile in profiles(encoder, options.texts or TEXTS[model]):
            clock = time.process_time if own_time else time.perf_counter
            part = run(profile, encoder.encode, theirs, places, device, dtype, options.rounds, clock)
            results += part
            print(table(part), flush=True)
            if options.out:
                data = {"facts": facts, "results": [asdict(x) for x in results]}
                panels = token_rates(results, facts, "encoding")
                write(options.out, name, data, page(results, facts), lambda p=panels: bars(p))
    return int(any(x.median is None for x in results if x.provider == "l2v"))


BENCHMARK = Benchmark(
    name="encode",
    doc=__doc__,
    quick="the mini model, a check of the benchmark itself",
    options={
        "--model": {"choices": tuple(MODELS), "help": "default: 8b on a GPU, mini on a CPU"},
        "--base": {"default": BASE, "help": "with --model smollm2: another embedded base, a folder or a hub name"},
        "--threads": {"type": int, "help": "of both sides, on a CPU"},
        "--busy": {"type": int, "default": 0, "help": "so many processes compute beside it"},
        "--rounds": {"type": int, "default": 5},
        "--texts": {"type": int, "help": "of a profile of short ones"},
        "--precision": {"choices": ("auto", "bf16", "fp32"), "default": "auto", "help": "of the weights"},
        "--work": {"type": Path, "help": "keep the weights in this folder"},
    },
    run=run_all,
)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
