"""The order in which ZeRO 2 gets gradients does not depend on the order in which the backward yields them."""

import itertools

import torch

from l2v.training.order import GradientOrder


def test_any_order_of_arrival_gives_one_order():
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (3, 1, 2, 1)]
    for arrival in itertools.permutations(range(4)):
        found = []
        order = GradientOrder(parameters, lambda parameter, group, found=found: found.append((parameter, group)))
        for _ in range(2):  # a second backward starts over
            for at in arrival:
                order.add(parameters[at], at % 2)
        wanted = [(parameters[at], at % 2) for at in (3, 2, 1, 0)] * 2
        assert all(a is c and b == d for (a, b), (c, d) in zip(found, wanted, strict=True))


def test_an_unfinished_backward_is_forgotten():
    parameters, found = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)], []
    order = GradientOrder(parameters, lambda parameter, group: found.append(group))
    order.add(parameters[2], 2)
    order.add(parameters[0], 0)
    order.clear()
    assert found == [2]
    for at in (0, 1, 2):
        order.add(parameters[at], at)
    assert found == [2, 2, 1, 0]
