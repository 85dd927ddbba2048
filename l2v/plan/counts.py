"""Launches and host time of a step, from one committed table (counts.json), and how the allocator fragments.

The table was counted on a stand-in for a GPU, so launches are exact for the versions that it names, and host times are
those of the machine that counted. No entry is a time of a GPU. Plain layers under `layer` and ZeRO 2 and 3 were not counted:
they stand in the table with the value of their nearest neighbour (the forward again; ZeRO 1).
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

    source: where the numbers come from. layers, adapters: layers and adapter tensors of the counted model. layer_launches: by
    kind of layer and recompute. other_launches: of a micro-batch outside the layers. layer_seconds: of a fused layer without
    recompute, without the driver's `launch_seconds` for each launch. reserved_over_allocated: by objective, with lengths
    that vary.
    """

    source: str
    layers: int
    adapters: int
    layer_launches: dict[str, dict[str, list[int]]]
    other_launches: list[int]
    update_launches: dict[str, int]
    layer_seconds: list[float]
    update_seconds: float
    launch_seconds: float
    reserved_over_allocated: dict[str, float]

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
        """(launches, host seconds) of the optimizer's step; both grow with the number of adapter tensors."""
        share = layers / self.layers
        launches = round(self.update_launches[str(zero)] * share)
        return launches, self.update_seconds * share + launches * self.launch_seconds


@functools.cache
def load(path: Path = TABLE) -> Counts:
    """The table."""
    found = json.loads(path.read_text(encoding="utf-8"))
    model = found.pop("model")
    return Counts(**found, **model)
