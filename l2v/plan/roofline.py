"""Time of a micro-batch and of a step by the roofline model.

An operation takes the larger of its FLOPs over the rate of large matmuls and its bytes over the rate of a copy; a matmul whose
tiles do not fill the GPU's waves takes longer (`l2v.model.cost`). A step takes the sum over its operations, or the time that the
host needs to start them if that is longer (`l2v.plan.counts`). Nothing overlaps.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from l2v.model.cost import ATTENTION_EFFICIENCY, GROUPS, wave_waste
from l2v.model.fused import Recompute
from l2v.plan import counts
from l2v.plan.gpus import Gpu
from l2v.plan.memory import Model
from l2v.recipe import Contrastive, Mntp, Stage

LOSS_LAUNCHES = 40
"""Launches of a contrastive loss, forward and backward. An assumption."""
MASK_SECONDS = 1.5e-9
"""Seconds that a CPU needs for one byte of a dropout mask (measured, see l2v_kernels.philox)."""


@dataclass
class Clock:
    """Adds up seconds by kind of work, on one GPU."""

    gpu: Gpu
    dtype: torch.dtype
    fp8: bool = False

    def __post_init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.launches, self.host, self.times = 0, 0.0, 1

    def add(
        self, kind: str, *, flops: float = 0.0, bytes_: float = 0.0, seconds: float = 0.0, rate: float | None = None,
        waste: float = 1.0,
    ) -> None:  # fmt: skip
        """Add an operation. rate: FLOP/s, default: that of large matmuls in the model's dtype. waste: factor on FLOPs."""
        took = max(flops * waste / (rate or self.rate), bytes_ / self.gpu.copy) + seconds
        self.seconds[kind] += self.times * took

    def start(self, launches: int, seconds: float | None = None) -> None:
        """Add launches and the time that the host needs for them, default: that of the driver alone."""
        self.launches += launches
        if not self.gpu.cpu:
            self.host += counts.load().launch_seconds * launches if seconds is None else seconds

    @property
    def rate(self) -> float:
        """FLOP/s of large matmuls in the model's dtype."""
        return self.gpu.flops[self.dtype]

    @contextlib.contextmanager
    def repeated(self, times: int) -> Iterator[None]:
        """Operations added inside count `times` times."""
        before, self.times = self.times, self.times * times
        try:
            yield
        finally:
            self.times = before

    def matmul(self, tokens: float, inner: float, outer: float, reads: float = 0.0) -> None:
        """Add a matmul with frozen weights [outer, inner]. reads: bytes per token in addition to input and output."""
        b = self.dtype.itemsize
        rate = self.gpu.fp8 if self.fp8 and self.gpu.fp8 else None
        moved = inner * outer * (1 if rate else b) + tokens * ((inner + outer) * b + reads)
        waste = float(wave_waste(tokens, int(outer), self.gpu.multiprocessors))
        self.add("products with weights", flops=2 * tokens * inner * outer, bytes_=moved, rate=rate, waste=waste)
        if rate:  # the input is quantised first, and LoRA's part is added in a separate pass
            self.add("passes over memory", bytes_=tokens * (inner * (b + 1) + 2 * outer * b))

    def weight_gradient(self, tokens: float, inner: float, outer: float) -> None:
        """Add the gradient of weights [outer, inner], and the engine's copy of it."""
        b = self.dtype.itemsize
        waste = float(wave_waste(outer, int(inner), self.gpu.multiprocessors))
        moved = tokens * (inner + outer) * b + 3 * inner * outer * b
        self.add("gradients of weights", flops=2 * tokens * inner * outer, bytes_=moved, waste=waste)

    @property
    def device(self) -> float:
        """Seconds of the device."""
        return sum(self.seconds.values())

    def total(self) -> float:
        """Seconds: those of the device, or of the host if it needs longer to start the work."""
        return max(self.device, self.host)


def forward(clock: Clock, model: Model, tokens: int, length: float, *, dropped: bool, read: float = 1.0) -> None:
    """Forward of all layers. length: tokens that a token attends to, on average. dropped: with LoRA dropout.

    read: share of the tokens whose last states are read; after its attention the last fused layer computes no others.
    """
    s, b, t = model.shape, clock.dtype.itemsize, tokens
    clock.start(*counts.load().micro_batch(s.layers, model.fused, "none")[0])
    for count, after in _layers(model, t, read):
        with clock.repeated(count):
            if not model.fused:
                _plain(clock, model, t)
            else:
                _norms(clock, t, s.hidden * b, passes=(2, 4, 3) if s.norms_after else (4, 4))
                clock.add("passes over memory", bytes_=t * 2 * (s.queries + s.keys) * b * (2 if s.head_norms else 1))
                clock.add("passes over memory", bytes_=after * 3 * s.ffn * b)
            for names in GROUPS:
                _group(clock, model, names, t if names == GROUPS[0] else after, dropped=dropped)
            clock.add(
                "attention", flops=4 * t * length * s.queries, bytes_=t * 2 * (s.queries + s.keys) * b,
                rate=ATTENTION_EFFICIENCY[0] * clock.rate,
            )  # fmt: skip


def backward(
    clock: Clock, model: Model, tokens: int, length: float, recompute: Recompute, *, dropped: bool, read: float = 1.0
) -> None:
    """Backward of all layers, including recomputation. Arguments are those of `forward`."""
    s, b, t = model.shape, clock.dtype.itemsize, tokens
    started = clock.launches, clock.host
    if recompute == "layer":
        forward(clock, model, tokens, length, dropped=dropped, read=read)
        clock.launches, clock.host = started  # they are part of the backward's
    clock.start(*counts.load().micro_batch(s.layers, model.fused, recompute)[1])
    for count, after in _layers(model, t, read):
        with clock.repeated(count):
            if not model.fused:
                _plain(clock, model, 1.5 * t)
            else:
                _norms(clock, t, s.hidden * b, passes=(4, 6, 3) if s.norms_after else (4, 4))
                if recompute != "none":
                    clock.add("passes over memory", bytes_=(t * 4 * s.hidden + after * 3 * s.ffn) * b)
                clock.add("passes over memory", bytes_=after * 5 * s.ffn * b)
                clock.add("passes over memory", bytes_=t * 2 * (s.queries + 2 * s.keys) * b)
            for names in GROUPS:
                _group(clock, model, names, t if names == GROUPS[0] else after, dropped=dropped, back=True)
            # Two kernels, with three and four matmuls.
            clock.add(
                "attention", flops=14 * t * length * s.queries, bytes_=t * 2 * (4 * s.queries + 4 * s.keys) * b,
                rate=ATTENTION_EFFICIENCY[1] * clock.rate,
            )  # fmt: skip


def _layers(model: Model, tokens: float, read: float) -> list[tuple[int, float]]:
    """Numbers of layers, with the tokens that they compute after their attention."""
    count = model.shape.layers
    return [(count - 1, tokens), (1, read * tokens)] if model.fused and read < 1 else [(count, tokens)]


def read_share(stage: Stage) -> float:
    """Share of the tokens whose last states are read. 1 for pooled vectors: how long headers are is not known here."""
    return stage.mask_probability if isinstance(stage, Mntp) else 1.0


def _norms(clock: Clock, tokens: float, row: float, passes: tuple[int, ...]) -> None:
    for count in passes:
        clock.add("passes over memory", bytes_=tokens * count * row)


def _group(clock: Clock, model: Model, names: tuple[str, ...], t: float, *, dropped: bool, back: bool = False) -> None:
    """Linear layers with one input: frozen matmuls and LoRA. LoRA writes the output, and the frozen matmul adds to it."""
    s, b = model.shape, clock.dtype.itemsize
    inner, outer = s.inputs[names[0]], sum(s.outputs[name] for name in names)
    adapted = [name for name in names if name in s.adapted]
    apart = model.fused and names == GROUPS[2]  # SwiGLU adds LoRA's part of gate and up when it reads them
    summed = 0 if not adapted or (apart and not back) else inner if back else outer
    clock.matmul(t, *((outer, inner) if back else (inner, outer)), reads=summed * b)
    if model.base_precision == "nf4":  # weights are dequantised for every matmul
        clock.add("passes over memory", bytes_=inner * outer * (0.5 + 2 * b))
    if back and s.trained:
        clock.weight_gradient(t, inner, outer)
    if not adapted:
        return
    out = sum(s.outputs[name] for name in adapted)
    if not back:  # LoRA's part is written, and the frozen matmul adds to it
        moved, flops = inner + (0 if apart else out), 2 * s.rank * (len(adapted) * inner + out)
    else:  # the output's gradient is read once for both matrices; the input is read, and its gradient is written
        moved, flops = out + 2 * inner, 4 * s.rank * (len(adapted) * inner + out)
    by_bytes = model.fused or clock.gpu.cpu  # on a GPU, `_plain` counts the bytes of plain layers
    clock.add("LoRA", flops=t * flops, bytes_=t * moved * b if by_bytes else 0.0)
    if clock.gpu.cpu and dropped and not back:
        clock.add("LoRA", seconds=t * len(adapted) * inner * MASK_SECONDS)


def _plain(clock: Clock, model: Model, t: float) -> None:
    """Memory traffic of an eager transformers layer with PEFT's LoRA, without its matmuls, in one direction."""
    s, b = model.shape, clock.dtype.itemsize
    norms = (4 if s.norms_after else 2) * s.hidden * (6 * 4 + 6 * b)  # to fp32 and back, op by op
    inputs, outputs = sum(s.inputs[x] for x in s.adapted), sum(s.outputs[x] for x in s.adapted)
    lora = (3 * inputs + 6 * outputs) * b  # dropout, matmul, scaling, sum
    other = (6 * s.hidden + 5 * s.ffn + 10 * (s.queries + s.keys)) * b  # residuals, SiLU times up, RoPE
    clock.add("passes over memory", bytes_=t * (norms + other))
    clock.add("LoRA", bytes_=t * lora)


def ends(clock: Clock, model: Model, stage: Stage, tokens: int) -> None:
    """Embedding and final norm, and the head with its loss; both directions."""
    s, b, t = model.shape, clock.dtype.itemsize, tokens
    clock.add("passes over memory", bytes_=t * 8 * s.hidden * b)
    if s.trained:  # the gradient of the embedding has all its rows, and the engine copies it
        clock.add("passes over memory", bytes_=3 * model.vocabulary * s.hidden * b)
    if isinstance(stage, Mntp):
        labels, v = t * stage.mask_probability, model.vocabulary
        # Logits are written in fp32, read twice, and written once in the model's dtype for the second matmul.
        clock.add("head and loss", flops=4 * labels * v * s.hidden)
        clock.add("head and loss", bytes_=labels * v * (4 + 8 + 2 * b))
        if s.trained and model.tied:
            clock.add("head and loss", flops=2 * labels * v * s.hidden, bytes_=labels * v * b + 2 * v * s.hidden * b)


def contrastive(clock: Clock, model: Model, stage: Contrastive, queries: int, candidates: int) -> None:
    """One loss: three fp32 matmuls for the scores and their gradients, and passes over the embeddings."""
    hidden, rate = model.shape.hidden, clock.gpu.flops.get(torch.float32)
    scores = queries * candidates * len(stage.directions)
    clock.add("head and loss", flops=6 * scores * hidden, bytes_=18 * scores, rate=rate)
    clock.add("head and loss", bytes_=8 * (queries + candidates) * hidden * 4)
    clock.start(LOSS_LAUNCHES)


def once_a_step(clock: Clock, model: Model, zero: int, ranks: int, exchanged: float, launches: int) -> None:
    """The optimizer, and communication. exchanged: seconds of a step's collectives; launches: their number."""
    count, b = model.trainable, clock.dtype.itemsize
    share = count / ranks if zero else count
    # Cast of gradients to fp32, their norm, clipping; weights and two moments read and written, Adam's intermediate values.
    clock.add("optimizer", bytes_=share * (b + 4 * 4 + 14 * 4 + b))
    clock.start(*counts.load().update(zero, model.shape.layers))
    if ranks > 1:
        clock.add("communication", seconds=exchanged)
        clock.start(launches)
