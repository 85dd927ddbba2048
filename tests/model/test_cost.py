"""Predicted time of micro-batches by waves of tiles, against numbers worked out by hand."""

import numpy as np
import pytest

from l2v.model.cost import CALIBRATED_FILL, StepCost, wave_waste
from l2v.model.memory import LayerShape
from l2v.recipe import LLAMA_LINEARS

SHAPE = LayerShape(4096, 14336, 32, 8, 128, 32, targets=LLAMA_LINEARS)


def test_waves_by_hand():
    """4,096 outputs are 16 tiles of 256 or 32 of 128, on 132 multiprocessors."""
    assert pytest.approx(2048 / 2112) == CALIBRATED_FILL
    assert wave_waste(2048, 4096, 132) == 1  # 256 tiles, two waves, as full as those that were calibrated
    # 2,200 tokens: 18 x 16 tiles are three waves, with 2,200 x 16 / 128 of 396 places used; or 18 x 32 small ones in five.
    large, small = 396 / (2200 * 16 / 128), 660 / (2200 * 32 / 128) / 0.9
    assert wave_waste(2200, 4096, 132) == pytest.approx(min(large, small) * CALIBRATED_FILL)
    assert wave_waste(100, 4096, 132) == 1  # less than a wave
    assert (wave_waste([7, 2200], 4096, 0) == 1).all()  # no waves on a CPU


def test_more_tokens_never_take_less_time():
    cost = StepCost.of(SHAPE, 132)
    tokens = np.arange(1, 40000, 37)
    times = cost.times(tokens, np.zeros(len(tokens)))
    assert (np.diff(times) >= -1e-9 * times[1:]).all()
    plain = cost.weights(tokens, np.zeros(len(tokens)))
    assert (times >= plain * (1 - 1e-9)).all()
    # A large micro-batch is as fast as large matmuls are.
    assert 1 <= cost.times(32768, 0) / cost.weights(32768, 0) < 1.02


def test_attention_counts_by_squared_lengths():
    cost = StepCost.of(SHAPE, 132)
    short, long = cost.weights(8192, 8192 * 128), cost.weights(8192, 8192**2)
    assert short < 1.03 * cost.weights(8192, 0)
    # One text of 8,192 tokens: multiply-adds of two matmuls forward and seven backward, at 0.45 and 0.4 of the speed.
    attention = (2 / 0.45 + 7 / 0.4) * 4096 * 8192**2
    assert long - cost.weights(8192, 0) == pytest.approx(attention)
    assert cost.weights(8192, 0) == 2 * 8192 * SHAPE.linear_parameters
