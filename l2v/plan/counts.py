"""Launches and host time of a step, from one committed table (counts.json).

The table was counted on a stand-in for a GPU (tests/nullgpu), so launches are exact for the versions that it names, and host
times are those of the machine that counted. No entry is a time of a GPU. Layers were counted as the difference between models
of two and of four layers.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("counts.json")


@dataclass(frozen=True)
class Counts:
    """Pairs are (forward, backward). Seconds are those of the host.

    source: where the numbers come from. layers: of the counted model. layer_launches: by kind of layer and recompute.
    other_launches: of a micro-batch outside the layers. update_launches, update_seconds: by ZeRO stage; adapters are one
    parameter, so they do not grow with the layers, but for ZeRO 3, whose are of the counted model. layer_seconds: of a fused
    layer without recompute, without the driver's `launch_seconds` for each launch.
    """

    source: str
    layers: int
    layer_launches: dict[str, dict[str, list[int]]]
    other_launches: list[int]
    update_launches: dict[str, int]
    layer_seconds: list[float]
    update_seconds: dict[str, float]
    launch_seconds: float

    def micro_batch(self, layers: int, fused: bool, recompute: str) -> tuple[tuple[int, float], tuple[int, float]]:
        """(launches, host seconds) of the forward and of the backward of a micro-batch."""
        table = self.layer_launches["fused" if fused else "plain"]
        own, reference = table.get(recompute, table["none"]), self.layer_launches["fused"]["none"]
        found = []
        for at in (0, 1):
            launches = layers * own[at] + self.other_launches[at]
            # Python's work grows with the ops that it starts.
            python = layers * self.layer_seconds[at] * own[at] / reference[at]
            found.append((launches, python + launches * self.launch_seconds))
        return found[0], found[1]

    def update(self, zero: int, layers: int) -> tuple[int, float]:
        """(launches, host seconds) of the optimizer's step. With ZeRO 3 both grow with the number of adapter tensors."""
        share = layers / self.layers if zero == 3 else 1.0
        launches = round(self.update_launches[str(zero)] * share)
        return launches, self.update_seconds[str(zero)] * share + launches * self.launch_seconds


@functools.cache
def load(path: Path = TABLE) -> Counts:
    """The table."""
    found = json.loads(path.read_text(encoding="utf-8"))
    model = found.pop("model")
    return Counts(**found, **model)
