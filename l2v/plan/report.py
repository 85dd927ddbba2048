"""The plan as tables in the terminal and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from l2v.model.embedded import EMBEDDED
from l2v.plan import counts
from l2v.plan.estimate import Relief, Speed, StagePlan
from l2v.plan.gpus import Gpu
from l2v.plan.memory import MARGIN_BYTES, MARGIN_SHARE
from l2v.recipe import Contrastive, Recipe

GIB = 2**30
NOT_CALIBRATED = "roofline, not calibrated by a run on this GPU"
BY_RATES = "roofline, by the rates that l2v doctor measured on this CPU"


def device_word(facts: dict[str, Any]) -> str:
    """What a rank runs on, in words of the tables."""
    return "process" if facts["gpu"] == "cpu" else "GPU"


def _gib(value: float) -> str:
    return f"{value / GIB:.2f}"


def _time(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 2 else f"{hours:.1f} h"


def calibrated(speed: Speed, cpu: bool = False) -> str:
    """Whether a speed is calibrated by a measurement, as a phrase."""
    if cpu:
        return BY_RATES
    return f"roofline times {speed.factor:.2f}, as measured on this GPU" if speed.factor else NOT_CALIBRATED


def tree(facts: dict[str, Any], plans: Sequence[StagePlan]) -> dict[str, Any]:
    """The plan as a JSON-serialisable dictionary. Units: bytes, seconds, tokens per second."""
    hours = sum(plan.hours for plan in plans) if facts["timed"] else None
    return facts | {"stages": {plan.name: _stage(plan, facts) for plan in plans}, "hours": hours}


def _stage(plan: StagePlan, facts: dict[str, Any]) -> dict[str, Any]:
    memory = plan.memory
    return {
        "objective": plan.stage.objective,
        "steps": plan.stage.steps,
        "layers": "fused" if plan.model.fused else f"plain: {plan.model.unfused_reason}",
        "lengths": "of the data" if plan.lengths.real else "the longest that the stage allows",
        "data": _data(plan),
        "memory": {
            "fits": memory.fits,
            "capacity": memory.capacity,
            "total": memory.total,
            "margin": memory.margin,
            "tensors_at_peak": memory.tensors,
            "micro_batch_tokens": memory.tokens,
            "micro_tokens": plan.micro_tokens,
            "recompute": memory.recompute,
            "standing": memory.standing,
            "moving": memory.moving,
            "largest_micro_tokens": memory.largest,
        },
        "speed": _rates(plan, facts) if facts["timed"] else None,
        "wire": [
            {
                "what": each.what,
                "collective": each.op,
                "bytes": each.bytes,
                "times": each.times,
                "sent_by_a_rank": each.sent(plan.world),
            }
            for each in plan.exchanged
        ],
        "scaling": [asdict(each) for each in plan.scaling] if facts["timed"] else [],
        "other_ways": {
            how: {"micro_batch_tokens": tokens}
            | ({"tokens_per_second": found.tokens_per_second} if facts["timed"] else {})
            for how, (tokens, found) in plan.others.items()
        },
    }


def _data(plan: StagePlan) -> dict[str, Any] | None:
    """What training would read; None if the data was not read."""
    if plan.steps_per_epoch is None:
        return None
    return {
        "examples": len(plan.lengths),
        "examples_an_epoch": plan.lengths.an_epoch,
        "epochs": plan.epochs,
        "notes": list(plan.lengths.notes),
    }


def _rates(plan: StagePlan, facts: dict[str, Any]) -> dict[str, Any]:
    speed = plan.speed
    return {
        "tokens_per_second": speed.tokens_per_second,
        "tokens_per_second_per_gpu": speed.tokens_per_second / plan.world,
        "mfu": plan.mfu,
        "step_seconds": speed.step_seconds,
        "step_tokens": speed.step_tokens,
        "micro_batches": speed.micros,
        "hours": plan.hours,
        "seconds_by_kind": speed.seconds,
        "balance": speed.balance,
        "device_share": speed.device_share,
        "device_seconds": speed.device,
        "host_seconds": speed.host,
        "ranks_without_work": speed.idle,
        "as_fast": asdict(plan.relief) if plan.relief else None,
        "calibration": calibrated(speed, facts["gpu"] == "cpu"),
    }


def render(facts: dict[str, Any], gpu: Gpu, plans: Sequence[StagePlan]) -> None:
    """Print tables."""
    console = Console(highlight=False)
    word = device_word(facts)
    many = f"{facts['gpus']} x {gpu.key}" if word == "GPU" else f"this CPU, {_processes(facts['gpus'])}"
    console.print(
        f"[bold]{facts['recipe']}[/] on {many}, {facts['dtype']}, ZeRO {facts['zero_stage']}; "
        f"{facts['base']}: shape from {facts['shape_from']}"
    )
    console.print(f"rates of {gpu.key}: {gpu.source}", soft_wrap=True)
    tables = [(f"memory of a {word}, GiB", _memory(plans))]
    if facts["timed"]:
        tables.append(("speed, predicted", _speed(plans, word)))
        title = "largest micro_tokens that fits, and tokens/s with as much of it as a step can use"
        tables.append((title, _others(plans)))
    else:
        tables.append(("largest micro_tokens that fits", _others(plans, timed=False)))
    if any(plan.exchanged for plan in plans):
        tables.append(("sent by each rank per step, MB", _wire(plans)))
    if facts["timed"] and any(plan.scaling for plan in plans):
        tables.append(("speed per GPU as a share of a single GPU's, predicted", scaling_table(plans)))
    for title, table in tables:
        console.print(f"\n[bold]{title}[/]", soft_wrap=True)
        console.print(table)
    console.print()
    for line in _notes(facts, plans):
        console.print(f"- {line}", soft_wrap=True)


def _table(*columns: str) -> Table:
    table = Table(header_style="", pad_edge=False, box=None)
    for at, column in enumerate(columns):
        table.add_column(column, justify="right" if at else "left", no_wrap=True)
    return table


def _memory(plans: Sequence[StagePlan]) -> Table:
    table = _table("", *(plan.name for plan in plans))
    parts = [Counter(plan.memory.standing) + Counter(plan.memory.moving) for plan in plans]  # some names are in both
    for name in dict.fromkeys(name for part in parts for name in part):
        if any(part.get(name) for part in parts):
            table.add_row(name, *(_gib(part[name]) if part.get(name) else "" for part in parts))
    table.add_section()
    table.add_row("total", *(_gib(plan.memory.total) for plan in plans), style="bold")
    table.add_row("margin", *(_gib(plan.memory.margin) for plan in plans))
    table.add_row("of", *(_gib(plan.memory.capacity) for plan in plans))
    table.add_row("fits", *("yes" if plan.memory.fits else "[bold red]no[/]" for plan in plans))
    table.add_row("recompute", *(plan.memory.recompute for plan in plans))
    if any(plan.micro_tokens < plan.stage.micro_tokens for plan in plans):
        table.add_row("micro_tokens", *(f"{plan.micro_tokens:,}" for plan in plans))
    table.add_row("tokens of a micro-batch", *(f"{plan.memory.tokens:,}" for plan in plans))
    return table


def _speed(plans: Sequence[StagePlan], word: str) -> Table:
    table = _table("", *(plan.name for plan in plans), *(["all stages"] if len(plans) > 1 else []))
    kinds = dict.fromkeys(kind for plan in plans for kind in plan.speed.seconds)
    for kind in kinds:
        table.add_row(f"ms a step: {kind}", *(f"{1e3 * plan.speed.seconds.get(kind, 0):.1f}" for plan in plans))
    table.add_section()
    table.add_row("ms a step", *(f"{1e3 * plan.speed.step_seconds:.1f}" for plan in plans))
    table.add_row("tokens a step", *(f"{plan.speed.step_tokens:,.0f}" for plan in plans))
    table.add_row("micro-batches a step", *(str(plan.speed.micros) for plan in plans))
    table.add_row("tokens/s", *(f"{plan.speed.tokens_per_second:,.0f}" for plan in plans), style="bold")
    table.add_row(f"tokens/s and {word}", *(f"{plan.speed.tokens_per_second / plan.world:,.0f}" for plan in plans))
    if any(plan.world > 1 for plan in plans):
        table.add_row("balance of ranks", *(f"{plan.speed.balance:.2f}" for plan in plans))
    if any(plan.speed.host for plan in plans):
        table.add_row("ms a step: host", *(f"{1e3 * plan.speed.host:.1f}" for plan in plans))
        table.add_row("device share", *(f"{plan.speed.device_share:.2f}" for plan in plans))
    counted = sorted({plan.model.flops_of_weight for plan in plans})
    table.add_row(f"MFU ({' or '.join(f'{n}N' for n in counted)} a token)", *(f"{plan.mfu:.0%}" for plan in plans))
    table.add_row("steps", *(f"{plan.stage.steps:,}" for plan in plans))
    if any(plan.epochs for plan in plans):
        epochs = ("" if plan.epochs is None else f"{plan.epochs:.2g}" for plan in plans)
        table.add_row("epochs", *epochs, *([""] if len(plans) > 1 else []))
    total = [_time(sum(plan.hours for plan in plans))] if len(plans) > 1 else []
    table.add_row("time", *(_time(plan.hours) for plan in plans), *total, style="bold")
    return table


def _others(plans: Sequence[StagePlan], *, timed: bool = True) -> Table:
    table = _table("recompute")
    for plan in plans:
        table.add_column(plan.name, justify="right", no_wrap=True)
        if timed:
            table.add_column("tokens/s", justify="right", no_wrap=True)
    for how in dict.fromkeys(how for plan in plans for how in plan.memory.largest):
        cells = []
        for plan in plans:
            largest, found = plan.memory.largest.get(how, 0), plan.others.get(how)
            cells.append(f"{largest:,}" if largest else "none")
            if timed:
                cells.append(f"{found[1].tokens_per_second:,.0f}" if found else "")
        table.add_row(how, *cells)
    return table


def _wire(plans: Sequence[StagePlan]) -> Table:
    table = _table("", *(plan.name for plan in plans))
    parts = [{f"{each.what} ({each.op})": each.sent(plan.world) for each in plan.exchanged} for plan in plans]
    for name in dict.fromkeys(name for part in parts for name in part):
        table.add_row(name, *(f"{part[name] / 1e6:,.2f}" if name in part else "" for part in parts))
    table.add_section()
    table.add_row("total", *(f"{sum(part.values()) / 1e6:,.2f}" for part in parts), style="bold")
    return table


def scaling_table(plans: Sequence[StagePlan]) -> Table:
    """A row for each number of GPUs; two columns per stage."""
    table = _table("GPUs")
    for plan in plans:
        table.add_column(f"{plan.name}: grown", justify="right", no_wrap=True)
        table.add_column("fixed", justify="right", no_wrap=True)
    for rows in zip(*(plan.scaling for plan in plans), strict=True):
        table.add_row(f"{rows[0].gpus:,}", *(f"{x:.0%}" for row in rows for x in (row.grown, row.fixed)))
    return table


def _notes(facts: dict[str, Any], plans: Sequence[StagePlan]) -> list[str]:
    word, cpu = device_word(facts), facts["gpu"] == "cpu"
    notes = [
        f"fits: {MARGIN_SHARE:.0%} of the memory, at least {MARGIN_BYTES / GIB:g} GiB, stay free for what a plan cannot know"
    ]
    if facts["timed"]:
        notes += dict.fromkeys(f"tokens/s: {calibrated(plan.speed, cpu)}" for plan in plans)
        notes.append("these times do not include evaluation, checkpoints, loading and compiling")
        if not cpu:
            notes.append(
                "balance: mean over largest device time of the ranks; device share: device time over the larger of device and "
                f"host time; launches and host times: {counts.load().source}"
            )
    assumed = [plan.name for plan in plans if not plan.lengths.real]
    if assumed:
        notes.append(
            f"{', '.join(assumed)}: every text is assumed to be as long as `length` allows; the data was not read"
        )
    for plan in plans:
        if not plan.lengths.real and getattr(plan.stage, "max_negatives", None) == "auto":
            notes.append(
                f"{plan.name}: no hard negatives are assumed (max_negatives: auto); max_negatives=2 plans with two a row"
            )
    notes += [text for plan in plans for text in _data_notes(plan)]
    if because := plans[0].model.unfused_reason:
        notes.append(f"plain layers, slower than fused ones: {because}; their numbers are less exact")
    if facts["timed"] and any(plan.scaling for plan in plans):
        notes.append(
            "grown: the batch grows with the GPUs; fixed: the batch is the recipe's; nodes of "
            f"{facts['per_node']} GPUs are connected at {facts['network_gbps']:g} Gb/s, and nothing overlaps"
        )
    if named := [f"hf download {name}" for name in facts["hub"]["models"]] + [
        f"data set {name}" for name in facts["hub"]["datasets"]
    ]:
        notes.append(f"from the Hub: {', '.join(named)} (docs/deployment.md: nodes without internet)")
    for plan in plans:
        if plan.speed.idle:
            many = _processes(plan.world) if cpu else f"{plan.world} {word}s"
            notes.append(
                f"{plan.name}: a batch of {plan.stage.batch} is too small for {many}; {plan.speed.idle} are idle"
            )
        if plan.micro_tokens < plan.stage.micro_tokens:
            notes.append(
                f"{plan.name}: recompute: auto takes micro_tokens {plan.micro_tokens:,} with recompute {plan.memory.recompute}, "
                f"the fastest of at most {plan.stage.micro_tokens:,}"
            )
        if facts["timed"] and plan.speed.device_share < 1:
            notes.append(f"{plan.name}: {host_limit(plan.speed, plan.relief, plan.world)}")
        if facts["timed"] and (better := best(plan)):
            how, tokens, gain = better
            notes.append(f"{plan.name}: micro_tokens={tokens} with recompute={how} would be {gain:.2f}x as fast")
    return notes


def host_limit(speed: Speed, relief: Relief | None, world: int) -> str:
    """One sentence: the host is the limit, and what would be as fast."""
    ways = []
    if relief and relief.gpus:
        ways.append(f"{relief.gpus} GPU{'s' if relief.gpus > 1 else ''} instead of {world} would be as fast")
    if relief and relief.batch:
        ways.append(f"batch={relief.batch} would take no longer a step")
    return (
        f"the host is the limit, with {1e3 * speed.host:.0f} ms to start a step that takes the GPU {1e3 * speed.device:.0f} ms"
        + (f"; {', and '.join(ways)}" if ways else "")
    )


def _data_notes(plan: StagePlan) -> list[str]:
    """How many examples there are, and how the sources are mixed, as training logs it."""
    if plan.epochs is None:
        return []
    count, used = len(plan.lengths), plan.lengths.an_epoch
    weighted = f", {used:,} in an epoch" if used != count else ""
    said = f"{plan.name}: {count:,} examples{weighted}; {plan.stage.steps:,} steps are {plan.epochs:.2g} epochs"
    return [said, *(f"{plan.name}: {note}" for note in plan.lengths.notes)]


def _processes(count: int) -> str:
    return f"{count} process{'es' if count > 1 else ''}"


def hub_names(recipe: Recipe, stages: Sequence[str]) -> dict[str, list[str]]:
    """What training fetches from the Hub: `models` and `datasets`, for nodes that cannot reach it."""
    base = recipe.base
    models = [base.tokenizer or base.model] if base.init == "random" else [base.model, base.tokenizer or base.model]
    models = [name for name in dict.fromkeys(models) if name not in EMBEDDED and not Path(name).exists()]
    sources = [s for name in stages for s in (*recipe.stages[name].data, *recipe.stages[name].eval_data)]
    found = [s.path.removeprefix("hub:") for s in sources if s.path.startswith("hub:")]
    return {"models": models, "datasets": list(dict.fromkeys(found))}


def best(plan: StagePlan) -> tuple[str, int, float] | None:
    """(recompute, micro_tokens, gain) of the fastest setting, if it is at least 3% faster than the recipe's."""
    found = _fastest(plan)
    if found is None or not plan.memory.fits:
        return None
    rate, how, tokens = found
    gain = rate / plan.speed.tokens_per_second
    return (how, tokens, gain) if gain >= 1.03 else None


def _fastest(plan: StagePlan) -> tuple[float, str, int] | None:
    """(tokens/s, recompute, micro_tokens) of the fastest setting that fits."""
    found = [(speed.tokens_per_second, how, tokens) for how, (tokens, speed) in plan.others.items()]
    return max(found, default=None)


def remedies(plan: StagePlan, recipe: Recipe, gpu: Gpu) -> str:
    """One sentence: what does not fit, the largest micro-batch that does, and what else would help."""
    memory, stage = plan.memory, plan.stage
    how, largest = max(memory.largest.items(), key=lambda item: item[1])
    where = "this CPU's memory for a process" if gpu.cpu else f"one {gpu.key}"
    gib = {key: f"{getattr(memory, key) / GIB:.1f} GiB" for key in ("total", "margin", "capacity")}
    need = f"{gib['total']} and a margin of {gib['margin']}, of the {gib['capacity']} of {where}"
    text = (
        f"stage '{plan.name}': a micro-batch of {memory.tokens:,} tokens with recompute {memory.recompute} needs {need}"
    )
    longest = int(plan.lengths.lengths.max())
    ways = []
    if largest >= longest:
        ways.append(f"micro_tokens={largest} with recompute={how}, the largest that fits")
        if gpu.timed and (fastest := _fastest(plan)) and fastest[1] != how:
            ways.append(f"micro_tokens={fastest[2]} with recompute={fastest[1]}, the fastest that fits")
    else:
        text += f", and not even one example of {longest:,} tokens fits"
    if recipe.zero.stage < 3 and plan.world > 1 and recipe.base.base_precision == "same":
        ways.append("zero.stage=3, which shards the weights")
    if recipe.base.base_precision == "same" and recipe.zero.stage < 3:
        nf4 = "base.base_precision=nf4, a quarter of the frozen weights"
        ways.append("lora instead of lora: null" if plan.model.trained_all else nf4)
    if recipe.zero.stage == 3 and not recipe.zero.offload_optimizer:
        ways.append("zero.offload_optimizer=true")
    if largest < longest:
        ways.append("a shorter length")
    if isinstance(stage, Contrastive) and stage.negatives == "global" and largest < longest:
        ways.append("a smaller batch")
    return f"{text}; use {'; or '.join(ways or ['more memory' if gpu.cpu else 'a larger GPU'])}"
