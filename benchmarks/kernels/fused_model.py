"""A training step's forward and backward of a whole model: fused layers against its plain ones.

l2v bench fused_model [--quick] [--model gemma3-270m|smollm2-135m|mini] [--dtype fp32|bf16] [--threads N] [--out FOLDER]

Plain layers are those of transformers with PEFT's LoRA, on the same packed texts, with the same attention of l2v and the same
head: what differs is the layers alone. Weights are random and shared by both; LoRA of rank 16 with dropout .05 on all linears.
The supervised step pools vectors (no head); MNTP's reads the frozen head. The two take turns, in another order each round. On a
CPU the processor's own seconds are measured next to the clock's: other programs change the latter.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np
import torch

from benchmarks.command import Benchmark
from benchmarks.harness import Result, Target, device_facts, synchronize
from benchmarks.pages import markdown, targets_table, work_headline, write
from l2v.batch import PackedBatch, Segment, pack
from l2v.machine import processor
from l2v.model.load import dtype_of, inner_model, load_model, output_head
from l2v.model.lora import add_lora, trainable
from l2v.model.packed import PackedDecoder
from l2v.objectives.contrastive import Groups, contrastive_loss
from l2v.objectives.mntp import mntp_loss_of_hidden
from l2v.recipe import Base, Lora

_SPECIAL = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "tie_word_embeddings": True}
MODELS = {
    "gemma3-270m": _SPECIAL | {
        "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048,
        "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
        "query_pre_attn_scalar": 256, "max_position_embeddings": 32768,
    },
    "smollm2-135m": _SPECIAL | {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    },
    "mini": _SPECIAL | {
        "model_type": "gemma3_text", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
}  # fmt: skip
"""Shapes; that of Gemma 3 270M has five local layers before each global one."""
LORA = Lora(r=16, alpha=32, dropout=0.05)
QUERY, DOCUMENT = 16, 112
"""Tokens of a question and of a passage of an example, which has one positive."""
MASKED = 0.2
AT_LEAST = 1.3
PROVIDERS = ("plain", "fused")


def batches(vocabulary: int, examples: int) -> dict[str, PackedBatch]:
    """The texts of both workloads."""
    generator = np.random.default_rng(0)
    lengths = [n for _ in range(examples) for n in (QUERY, DOCUMENT)]
    texts = [generator.integers(3, vocabulary, n) for n in lengths]
    pairs = [Segment(ids, min(4, len(ids) - 1), example=i // 2, column=i % 2) for i, ids in enumerate(texts)]
    where = np.flatnonzero(generator.random(sum(lengths)) < MASKED)
    labels = generator.integers(3, vocabulary, len(where))
    masked = [Segment(ids, example=i) for i, ids in enumerate(texts)]
    return {
        "supervised": pack(pairs, seed=1),
        "mntp": pack(masked, seed=1, label_index=where.tolist(), labels=labels.tolist()),
    }


def step_of(model: PackedDecoder, batch: PackedBatch, workload: str) -> Callable[[], dict[str, torch.Tensor]]:
    """Forward, loss and backward; returns the gradients."""
    parameters = trainable(model)

    def run() -> dict[str, torch.Tensor]:
        if workload == "mntp":
            loss, _ = model(batch, "loss", functools.partial(mntp_loss_of_hidden, count=len(batch.labels_L)))
        else:
            groups = Groups.from_columns(batch.columns_S, batch.text_keys_S)
            loss = contrastive_loss(model(batch), groups, scale=20.0)
        return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))

    return run


def models_of(config: dict, device: torch.device, dtype: torch.dtype) -> dict[str, PackedDecoder]:
    """Both, on the same modules."""
    model = load_model(Base(model="benchmark", init="random", config=config), head=True, dtype=dtype)
    decoder = add_lora(inner_model(model), LORA, base_name="benchmark", seed=0)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    head = output_head(model)
    fused = PackedDecoder(decoder, head=head, layers="fused").to(device)
    assert fused.fused is not None
    fused.fused.stack_weights()
    # Last, since it puts the keys of its own batches into the adapters' dropout; the fused layers take theirs as arguments.
    return {"fused": fused.train(), "plain": PackedDecoder(decoder, head=head, layers="plain").to(device).train()}


def error_of(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], dtype: torch.dtype) -> float:
    """Largest difference of gradients, over the largest gradient. Raises: ValueError if it is more than rounding."""
    scale = max(float(x.abs().max()) for x in wanted.values())
    error = max(float((found[k].float() - wanted[k].float()).abs().max()) for k in wanted) / scale
    if not error <= (1e-4 if dtype == torch.float32 else 0.1):
        raise ValueError(f"gradients of fused and plain layers differ by {error:.1e} of the largest")
    return error


def measure(
    steps: dict[str, Callable], rounds: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of the clock and of the processor, one of each a provider and round, in turns."""
    clock: dict[str, list[float]] = {name: [] for name in steps}
    busy: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        for name in list(steps)[:: 1 if number % 2 else -1]:
            synchronize(device)
            start, used = time.perf_counter(), time.process_time()
            steps[name]()
            synchronize(device)
            clock[name].append(time.perf_counter() - start)
            busy[name].append(time.process_time() - used)
    return clock, busy


def compare(config: dict, options: argparse.Namespace, dtype: torch.dtype) -> list[Result]:
    """Both workloads by both."""
    models, results = models_of(config, options.device, dtype), []
    for workload, batch in batches(config["vocab_size"], options.examples).items():
        batch = batch.to(options.device)
        steps = {name: step_of(models[name], batch, workload) for name in PROVIDERS}
        error = error_of(*(steps[name]() for name in ("fused", "plain")), dtype)
        clock, busy = measure(steps, options.rounds, options.device)
        for name in PROVIDERS:
            times = clock[name]
            facts = {"tokens": batch.tokens, "times": times, "processor_times": busy[name]}
            facts["processor"] = statistics.median(busy[name])
            results.append(Result(
                workload, name, "forward + backward", statistics.median(times), min(times), max(times),
                error=error if name == "fused" else None, facts=facts,
            ))  # fmt: skip
        print(page_table(results[-2:]), flush=True)
    return results


def speedup(results: Sequence[Result], workload: str, on_cpu: bool) -> float | None:
    """Median time of plain layers over that of fused ones: of the processor on a CPU, else of the clock."""
    found = {x.provider: x.facts["processor"] if on_cpu else x.median for x in results if x.workload == workload}
    return found["plain"] / found["fused"] if len(found) == len(PROVIDERS) else None


def page_table(results: Sequence[Result]) -> str:
    """Markdown: a row a workload and provider."""
    rows = [
        [x.workload, x.provider, str(x.facts["tokens"]), f"{x.median or 0:.3f}", f"{x.low or 0:.3f}",
         f"{x.facts['processor']:.3f}", "" if x.error is None else f"{x.error:.1e}"]
        for x in results
    ]  # fmt: skip
    head = ["workload", "layers", "tokens", "median s", "least s", "median processor s", "gradients' difference"]
    return markdown(head, rows)


def targets(results: Sequence[Result], facts: dict) -> list[Target]:
    """The supervised step's is a target; MNTP's, whose head is the same for both, is only stated."""
    on_cpu = facts.get("cuda") is None
    value = None if facts["smoke"] else speedup(results, "supervised", on_cpu)
    return [Target(f"{facts['model']}: supervised, plain / fused", AT_LEAST, value, at_least=True)]


def run_all(options: argparse.Namespace) -> int:
    """Prints and writes the tables."""
    name = "mini" if options.quick else options.model
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(options.dtype) or dtype_of("auto")
    facts = device_facts(options.device) | {"model": name, "smoke": name == "mini", "processor": processor()}
    facts |= {"threads": torch.get_num_threads(), "dtype": str(dtype), "rounds": options.rounds}
    results = compare(MODELS[name], options, dtype)
    on_cpu = facts.get("cuda") is None
    ratios = {x: speedup(results, x, on_cpu) for x in ("supervised", "mntp")}
    lines = [f"{x}: fused layers take {1 / r:.2f} of the time of plain ones ({r:.2f}x)" for x, r in ratios.items() if r]
    found = targets(results, facts)
    text = "\n\n".join([
        work_headline(facts), f"{name}, {dtype}, {facts['threads']} threads, {facts['processor']}.", page_table(results),
        "\n".join(lines), targets_table(found),
    ])  # fmt: skip
    print(text)
    if options.out:
        data = {"facts": facts, "targets": [x.row() for x in found], "results": [asdict(x) for x in results]}
        write(options.out, "fused_model", data, text)
    return 0


BENCHMARK = Benchmark(
    name="fused_model",
    doc=__doc__,
    quick="the mini model, a check of the benchmark itself",
    options={
        "--model": {"choices": tuple(MODELS), "default": "gemma3-270m", "help": "default: gemma3-270m"},
        "--dtype": {"choices": ("fp32", "bf16"), "help": "default: as base.precision: auto"},
        "--threads": {"type": int, "help": "default: as torch chooses"},
        "--examples": {"type": int, "default": 8, "help": "questions with a passage, 128 tokens each (default: 8)"},
        "--rounds": {"type": int, "default": 7, "help": "times that each runs (default: 7)"},
    },
    run=run_all,
)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
