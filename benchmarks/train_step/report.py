"""Results of the train-step benchmark: from runs to medians, ratios, targets, tables and figure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import Result, Target
from benchmarks.pages import bars, markdown, targets_table, token_rates, work_headline, write
from benchmarks.train_step.record import Setting

LADDER = {
    "transformers_peft": "padded, plain layers, all logits",
    "packed": "+ padding removed, logits of labelled positions only",
    "fused": "+ fused layers",
    "cheap": "+ nothing recomputed but norms and elementwise ops",
    "none": "+ nothing recomputed",
    "fp8": "+ fp8 base",
}
# Of the first loss against ours. Adapters start at zero, so LoRA's dropout plays no part in it: supervised is the same sum in
# another order; MNTP differs where masks are drawn differently or blocks are read across documents, SimCSE in the attention
# dropout.
SAME_LOSS = {"supervised": 0.02, "mntp": 0.15, "simcse": 0.5}
POOLS_BOS = {"sentence_transformers": 0.2}
LLM2VEC_TARGETS = {"mntp": 4.0, "simcse": 8.0, "supervised": 6.0}


@dataclass
class Run:
    """One process's steps of one workload in one setting; rows as `record.Recorder` writes them."""

    workload: str
    provider: str
    round: int
    setting: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: str = ""
    load: float | None = None
    """Of the machine when the run began, programs of others among it."""

    @property
    def timed(self) -> list[dict[str, Any]]:
        """Rows after the warm-up."""
        return [] if self.skipped else [row for row in self.rows if not row["warmup"]]

    @property
    def lasting(self) -> bool:
        """Whether another try would measure nothing new."""
        return bool(self.timed) or self.skipped == "out of memory"

    def median(self, value: Callable[[dict[str, Any]], float]) -> float | None:
        """Over the timed rows; None where there is none."""
        return statistics.median(map(value, self.timed)) if self.timed else None

    @property
    def rate(self) -> float | None:
        """Real tokens a second."""
        return self.median(lambda row: row["tokens"] / row["seconds"])

    def line(self) -> str:
        """For the screen."""
        text = f"{self.rate:,.0f} tokens/s" if self.timed else self.skipped or "no step was timed"
        setting = f" ({self.setting})" if self.setting else ""
        return f"{self.workload} {self.provider}{setting}: {text}"


def _best(runs: Sequence[Run], workload: str, provider: str) -> list[Run]:
    """The runs of a provider's fastest setting, a run a round."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        if (run.workload, run.provider) == (workload, provider) and run.timed:
            found.setdefault(run.setting, []).append(run)
    return max(found.values(), key=lambda part: statistics.median(x.rate for x in part), default=[])


def _ratios(ours: Sequence[Run], theirs: Sequence[Run]) -> list[float]:
    """How many times faster, round by round: what slows the machine slows both."""
    rates = {run.round: run.rate for run in theirs}
    return [run.rate / rates[run.round] for run in ours if run.round in rates]


def other_work(run: Run, ours: Run, stage: str) -> str:
    """How a run's tokens or first loss differ from ours; empty if they do not."""
    for step, (a, b) in enumerate(zip(run.rows, ours.rows, strict=False), start=1):
        if a["tokens"] != b["tokens"]:
            return f"step {step} has {a['tokens']} tokens, ours {b['tokens']}"
    first, own = run.rows[0]["loss"], ours.rows[0]["loss"]
    # A loss of nothing (random weights tell views of one text apart from all others) has no relative error.
    bar = max(SAME_LOSS[stage], POOLS_BOS.get(run.provider, 0.0))
    if abs(first - own) > bar * max(abs(own), 0.1):
        return f"its first loss is {first:.4f}, ours {own:.4f}"
    return ""


def comparison(runs: Sequence[Run], model, facts: dict[str, Any]) -> list[Result]:
    """A result for every workload and provider that was tried. Median, low and high: seconds a step, of rounds."""
    out = []
    for workload, provider in dict.fromkeys((x.workload, x.provider) for x in runs):
        best, ours = _best(runs, workload, provider), _best(runs, workload, "l2v")
        result = Result(workload, provider, "step")
        out.append(result)
        if not best:
            reasons = [x.skipped for x in runs if (x.workload, x.provider) == (workload, provider) and x.skipped]
            result.skipped = reasons[0] if reasons else "no step was timed"
            continue
        if ours and (difference := other_work(best[0], ours[0], model.workloads[workload].stage)):
            result.skipped = f"not the same work: {difference}"
            continue
        rows = [row for run in best for row in run.timed]
        times = [run.median(lambda row: row["seconds"]) for run in best]
        rate = statistics.median(run.rate for run in best)
        result.median, result.low, result.high = statistics.median(times), min(times), max(times)
        result.memory = max(row["peak"] for row in rows)
        faster = _ratios(ours, best)
        result.facts = {
            "tokens_per_second": rate,
            "padded": 1 - sum(row["tokens"] for row in rows) / sum(row["places"] for row in rows),
            "tokens": statistics.mean(row["tokens"] for row in rows),
            "mfu": mfu(rate, facts),
            "faster": statistics.median(faster) if faster else None,
            "faster_range": [min(faster), max(faster)] if faster else None,
            "first_loss": best[0].rows[0]["loss"],
            "setting": best[0].setting,
            "rounds": len(best),
        }
    return out


def disagreement(runs: Sequence[Run], facts: dict[str, Any]) -> str:
    """How plain and fused layers differ in their losses, if they do beyond rounding; their dropout masks are the same."""
    bar = 1e-4 if facts["dtype"] == "float32" else 1e-2
    for plain in (x for x in runs if x.provider == "packed" and x.rows):
        for other in runs:
            same = (other.workload, other.round) == (plain.workload, plain.round)
            if not same or other.provider not in ("l2v", "fused", "cheap", "none") or "fused" not in other.setting:
                continue
            for step, (a, b) in enumerate(zip(plain.rows, other.rows, strict=False), start=1):
                if abs(a["loss"] - b["loss"]) > bar * abs(a["loss"]):
                    return (
                        f"{plain.workload}, step {step}: the loss is {a['loss']:.5f} with plain layers and "
                        f"{b['loss']:.5f} with {other.setting}"
                    )
    return ""


def targets(runs: Sequence[Run], results: Sequence[Result], facts: dict[str, Any]) -> list[Target]:
    """What has to be reached; each model has its own targets."""
    found = {(x.workload, x.provider): x for x in results if x.median}
    if facts["model"] == "smollm2":
        return [
            Target("the quickstart's steps on a CPU, against transformers + PEFT", 1.5, quickstart(runs, facts), True)
        ]
    real = facts["model"] == "8b" and facts.get("cuda") is not None
    ours = found.get(("mntp", "l2v")) if real else None
    out = [
        Target("MNTP, 16k tokens a step, bf16", 21, ours and ours.facts["tokens_per_second"] / 1e3, True, "k tokens/s"),
        Target("MNTP, 16k tokens a step: peak memory", 100, ours and ours.memory / 1e9, unit="GB"),
    ]
    for workload, limit in LLM2VEC_TARGETS.items():
        peer = found.get((workload, "llm2vec")) if real else None
        out.append(Target(f"{workload} against llm2vec", limit, peer and peer.facts["faster"], True))
    return out


def quickstart(runs: Sequence[Run], facts: dict[str, Any]) -> float | None:
    """Time of all the quickstart's steps by transformers + PEFT over ours: the median of the rounds that have both."""
    times: dict[int, list[float]] = {}
    rounds = {x.round for x in runs}
    for number in sorted(rounds):
        total = [0.0, 0.0]
        for stage, steps in facts["quickstart_steps"].items():
            for at, provider in enumerate(("transformers_peft", "l2v")):
                run = next((x for x in _best(runs, stage, provider) if x.round == number), None)
                took = run.median(lambda row: row["seconds"]) if run else float("nan")
                total[at] += steps * took
        times[number] = total
    found = [a / b for a, b in times.values() if a == a and b == b]
    return statistics.median(found) if found else None


def table(results: Sequence[Result]) -> str:
    """Markdown: a row a workload and provider; rungs of the ladder are in their own table."""
    head = [
        "workload",
        "provider",
        "tokens/s",
        "ms a step",
        "pads",
        "MFU",
        "peak GiB",
        "l2v is faster",
        "first loss",
        "",
    ]
    rows = []
    for x in results:
        if x.provider in LADDER and x.provider != "transformers_peft":
            continue
        if x.median is None:
            rows.append([x.workload, x.provider, *[""] * 7, x.skipped])
            continue
        f = x.facts
        low, high = f["faster_range"] or (None, None)
        spread = f" ({low:.2f} to {high:.2f})" if f["rounds"] > 1 and low is not None else ""
        faster = f"{f['faster']:.2f}x{spread}" if f["faster"] and x.provider != "l2v" else ""
        mfu = f"{f['mfu']:.1%}" if f["mfu"] else ""
        numbers = [f"{f['tokens_per_second']:,.0f}", f"{x.median * 1e3:,.0f}", f"{f['padded']:.0%}", mfu]
        numbers += [f"{x.memory / 2**30:.1f}", faster, f"{f['first_loss']:.4f}"]
        rows.append([x.workload, x.provider, *numbers, f["setting"]])
    return markdown(head, rows)


def ladder(results: Sequence[Result], runs: Sequence[Run], facts: dict[str, Any]) -> str:
    """Markdown: what each step of the ladder adds; empty where none was run.

    It starts at the padded peer that recomputes what the next step recomputes, so that a step changes one thing.
    """
    found, rows = {(x.workload, x.provider): x for x in results}, []
    for workload in dict.fromkeys(x.workload for x in results if x.provider in ("packed", "fused")):
        before = first = None
        again = found.get((workload, "packed"), Result("", "", "")).facts.get("setting", "").endswith("layer")
        for provider, text in LADDER.items():
            part = _best(runs, workload, provider)
            if provider == "transformers_peft":
                wanted = str(Setting(checkpointing=again))
                part = [
                    x for x in runs if (x.workload, x.provider, x.setting) == (workload, provider, wanted) and x.timed
                ]
            if not part:
                if (workload, provider) in found and provider != "transformers_peft":
                    rows.append([workload, text, *[""] * 5, found[workload, provider].skipped])
                continue
            rate = statistics.median(x.rate for x in part)
            first = first or rate
            step = f"{rate / before:.2f}x" if before else ""
            peak = max(row["peak"] for x in part for row in x.timed) / 2**30
            share = f"{x:.1%}" if (x := mfu(rate, facts)) else ""
            numbers = [f"{rate:,.0f}", step, f"{rate / first:.2f}x", share, f"{peak:.1f}"]
            rows.append([workload, text, *numbers, part[0].setting])
            before = rate
    head = ["workload", "", "tokens/s", "this step", "in all", "MFU", "peak GiB", ""]
    return markdown(head, rows) if rows else ""


def mfu(rate: float, facts: dict[str, Any]) -> float | None:
    """Share of the measured rate of a large matmul, as in the training program's log."""
    rates = facts.get("rates")
    return 4 * facts["linear_parameters"] * rate / rates["gemm_flops"] if rates else None


def page(runs: Sequence[Run], results: Sequence[Result], facts: dict[str, Any]) -> str:
    """The Markdown page."""
    loads = [x.load for x in runs if x.load is not None and not x.skipped]
    lines = [
        f"{work_headline(facts)}, {facts['dtype']}.",
        "",
        f"{facts['model']}, {facts['rounds']} round(s) in turns; medians. tokens/s: real tokens, never pads. MFU: 4N FLOPs a "
        "token against the measured rate of a large matmul. Peak: of tensors on a GPU, of the process on a CPU.",
    ]
    if loads and facts.get("cuda") is None:
        lines.append(
            f"{facts['processor']}, {facts['threads']} thread(s). Load of the machine when a run began: {min(loads):.1f} to "
            f"{max(loads):.1f} on {facts['cores']} cores; other programs slow all providers alike, so ratios, taken round by "
            "round, are more reliable than rates."
        )
        if facts["clock"] == "processor":
            lines.append(
                "Seconds are the processor's own for one thread, so that waiting for others has no part in them."
            )
    if known := targets(runs, results, facts):
        lines += ["", "## Targets", "", targets_table(known)]
    lines += ["", "## Steps", "", table(results)]
    if steps := ladder(results, runs, facts):
        lines += ["", "## The ladder", "", steps]
    return "\n".join(lines)


def figure(results: Sequence[Result], facts: dict[str, Any]):
    """Real tokens a second: providers by workload."""
    return bars(token_rates([x for x in results if x.median], facts, "training step"))


def save(
    folder: Path, name: str, data: dict, runs: Sequence[Run], results: Sequence[Result], facts: dict, draw: bool
) -> None:
    """JSON, Markdown and, where `draw` asks for it and something was timed, the figure."""
    drawn = (lambda: figure(results, facts)) if draw and any(x.median for x in results) else None
    write(folder, name, data, page(runs, results, facts), drawn)
