"""Predicted time of a micro-batch by the waves of its GEMMs and the lengths of its texts: what ranks are balanced by.

A GEMM runs in tiles, as many at a time as the GPU has multiprocessors. The last wave of tiles is rarely full: on 132
multiprocessors 2,048 tokens by 4,096 outputs are 256 tiles and fill 97% of two waves, 2,200 tokens fill 73% of three. A library
has several tiles to choose from, so two are assumed here, and a GEMM of less than a wave is taken to be split along its inner
size. Arithmetic alone: which tiles a library takes on which GPU was not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from l2v.model.memory import LayerShape

TILES = ((128, 256, 1.0), (128, 128, 0.9))
"""Tokens and outputs of a tile, and the speed of a full wave of them. 0.9 is an assumption."""
CALIBRATED_FILL = 2048 / (16 * 132)
"""How full the waves of the GEMM are whose rate is taken as that of large matmuls: 8,192 cubed on 132 multiprocessors."""
ATTENTION_EFFICIENCY = (0.45, 0.4)
"""Share of the rate of large matmuls that attention kernels reach, forward and backward. An assumption: 75% of the published
values of the best kernels at 512 tokens on Hopper."""
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Linear layers that run as one GEMM, because they have one input."""


def wave_waste(tokens: Any, outputs: int, multiprocessors: int) -> np.ndarray:
    """Time of a GEMM as a multiple of the time at the rate of a large one, at least 1; float64 of the shape of `tokens`.

    multiprocessors: 0 if work does not run in waves, as on a CPU.
    """
    tokens = np.maximum(np.asarray(tokens, dtype=np.float64), 1.0)
    if not multiprocessors:
        return np.ones_like(tokens)
    found = np.full_like(tokens, np.inf)
    for height, width, speed in TILES:
        tiles = np.ceil(tokens / height) * np.ceil(outputs / width)
        waves = np.ceil(tiles / multiprocessors)
        full = waves * multiprocessors * height * width / (tokens * outputs) * CALIBRATED_FILL
        found = np.minimum(found, np.where(tiles <= multiprocessors, 1.0, full) / speed)
    return np.maximum(found, 1.0)


@dataclass(frozen=True)
class StepCost:
    """Predicted time of forward and backward of a micro-batch, in multiply-adds of one layer at the rate of large GEMMs.

    gemms: inputs and outputs of the GEMMs of a layer, forward and backward. attention: for each squared token of a text.
    """

    gemms: tuple[tuple[int, int], ...]
    attention: float
    multiprocessors: int

    @classmethod
    def of(cls, shape: LayerShape, multiprocessors: int) -> StepCost:
        """For layers of a shape on a GPU with so many multiprocessors."""
        forward = [(shape.inputs[names[0]], sum(shape.outputs[name] for name in names)) for names in GROUPS]
        both = (*forward, *((outer, inner) for inner, outer in forward))
        if shape.trained:  # the gradients of weights grow with the tokens as the other GEMMs do
            both = (*both, *forward)
        ahead, back = ATTENTION_EFFICIENCY
        # Two matmuls of queries by keys forward, seven in the two kernels of the backward.
        return cls(both, shape.queries * (2 / ahead + 7 / back), multiprocessors)

    def weights(self, tokens_N: np.ndarray, squares_N: np.ndarray) -> np.ndarray:
        """Of examples, without waves: float64 [N]. squares_N: sums of the squared lengths of their texts."""
        return sum(inner * outer for inner, outer in self.gemms) * tokens_N + self.attention * squares_N

    def times(self, tokens_N: np.ndarray, squares_N: np.ndarray) -> np.ndarray:
        """Of micro-batches, in waves: float64 of the shape of `tokens_N`."""
        tokens_N = np.asarray(tokens_N, dtype=np.float64)
        waves = sum(i * o * wave_waste(tokens_N, o, self.multiprocessors) for i, o in self.gemms)
        return waves * tokens_N + self.attention * squares_N
