"""The learning rate of every step, by the words of the recipe and by the numbers of old recipes."""

import math

import pytest

from l2v.recipe import Mntp
from l2v.training.schedule import changed_curve, hardly_falls, learning_rate


def stage(steps=10, lr=2.0, **keys):
    return Mntp(data=[], batch=1, steps=steps, lr=lr, **keys)


def rates(of, per_epoch=100):
    return [learning_rate(of, step, per_epoch) for step in range(of.steps)]


def old_rate(lr, step, steps, warmup, decay_epochs, decay_steps, per_epoch):
    """The rule of version 0.1.0, as it stood there."""
    if step < warmup:
        return lr * step / warmup
    if decay_steps is not None:
        end = decay_steps
    elif decay_epochs is not None:
        end = math.ceil(decay_epochs * per_epoch)
    else:
        return lr
    end = max(end, steps)
    return lr * max(0.0, (end - step) / max(1, end - warmup))


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize(("epochs", "number"), [(3.0, None), (0.05, None), (None, None), (None, 1), (3.0, 25)])
def test_recipes_without_the_words_keep_every_bit(warmup, epochs, number):
    of = stage(lr=5e-4, warmup=warmup, decay_epochs=epochs, decay_steps=number)
    assert rates(of) == [old_rate(5e-4, step, 10, warmup, epochs, number, 100) for step in range(10)]


def test_the_end_is_the_last_step():
    linear = rates(stage(warmup=2, decay_steps="end"))
    assert linear == pytest.approx([0, 1, 2, 1.75, 1.5, 1.25, 1, 0.75, 0.5, 0.25])
    assert linear == rates(stage(warmup=2, decay_steps=1)), "what a number below `steps` always meant"
    cosine = rates(stage(warmup=2, decay="cosine", decay_steps="end"))
    assert cosine[:3] == linear[:3] and cosine[6] == pytest.approx(1)
    assert cosine[4] == pytest.approx(1 + math.cos(math.pi / 4)) and cosine[9] == pytest.approx(
        1 - math.cos(math.pi / 8)
    )
    assert rates(stage(warmup=2, decay="none", decay_steps="end")) == [0, 1] + 8 * [2]


def test_a_decay_that_hardly_moves_is_said():
    line = hardly_falls(stage(decay_epochs=3), 100)
    assert "hardly falls: at the last step it is 97% of lr, because the decay ends at step 300 of 10;" in line
    assert hardly_falls(stage(decay_steps=100), 1) is not None  # 91% at the last step
    for keys in (
        {"decay_steps": "end"},
        {"decay": "none"},
        {"decay_epochs": None},
        {"decay_steps": 80},
        {"warmup": 10},
    ):
        assert hardly_falls(stage(**keys), 100) is None, keys


def test_more_steps_change_the_curve_only_where_it_ends_with_them():
    same = [{"decay": "none"}, {"decay_steps": 40}, {"decay_epochs": 1}, {"decay_steps": "end", "warmup": 5}]
    assert [changed_curve(stage(5, **keys), stage(20, **keys), 5, 100) for keys in same] == [None] * 4
    line = changed_curve(stage(5, decay_steps="end"), stage(20, decay_steps="end"), 5, 100)
    assert "the first 5 steps fell towards step 5, and from now on it falls towards step 20" in line
    assert line.endswith("so the result differs from 20 steps at once")
