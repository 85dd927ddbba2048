"""The update of a step under DeepSpeed: no launch and no wait that nobody needs, and no NaN or Inf applied."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from l2v.recipe import Mntp, Source, Zero
from l2v.training.engine import deepspeed_config, initialize
from l2v.training.faults import broken_gradients, discard

STAGE = Mntp(data=[Source("x")], batch=4, steps=10, lr=1e-2)
LAYERS = 12


pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture
def engine_of():
    """engine_of(zero stage, dtype, **changes of the configuration) -> an engine over 12 small linears."""
    engines = []

    def build(zero: int, dtype: torch.dtype, **changes):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(LAYERS))).to(dtype)
        config = deepspeed_config(STAGE, Zero(stage=zero), dtype, LAYERS * 64)
        for key, value in changes.items():
            config[key] |= value
        engines.append(initialize(model, config, STAGE))
        return engines[-1]

    yield build
    for engine in engines:
        engine.destroy()


def backward(engine, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, 8, generator=generator).to(next(engine.module.parameters()).dtype)
    engine.backward((3 * engine(x)).float().square().mean())


def weights(engine) -> list[torch.Tensor]:
    return [p.detach().clone() for p in engine.module.parameters()]


class Ops(TorchDispatchMode):
    """Counts the ops that run."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function.overloadpacket)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("zero", [1, 2])
def test_nan_and_inf_are_looked_for_in_all_gradients_at_once(engine_of, zero):
    """The same weights to the bit as with DeepSpeed's search for them, and several ops a tensor fewer."""
    found = {}
    for searches in (True, False):
        changes = {"bf16": {"check_grad_overflow": True}} if searches else {}
        engine = engine_of(zero, torch.bfloat16, **changes)
        for step in range(4):
            backward(engine, step)
            with Ops() as ops:
                broken = broken_gradients(engine)
                engine.step()
            assert (broken is None) if searches else not broken
            assert engine.was_step_applied() and float(engine.get_global_grad_norm()) > 0
        found[searches] = (ops.counts.total(), weights(engine), float(engine.get_global_grad_norm()))
    print(
        f"ops of an update of {LAYERS} tensors under ZeRO {zero}: {found[True][0]}, without the search {found[False][0]}"
    )
    assert found[False][0] <= found[True][0] - 6 * LAYERS
    assert found[False][2] == found[True][2]
    for mine, other in zip(found[False][1], found[True][1], strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("zero", [1, 2])
def test_one_bad_number_is_found_and_its_step_moves_nothing(engine_of, zero, dtype, value):
    engine = engine_of(zero, dtype)
    backward(engine, 0)
    assert not broken_gradients(engine)
    engine.step()
    before = weights(engine)
    backward(engine, 1)
    [gradients] = engine.optimizer.averaged_gradients.values()
    gradients[7].view(-1)[5] = value
    assert broken_gradients(engine)
    discard(engine)
    assert not engine.was_step_applied() and all(map(torch.equal, weights(engine), before))
    backward(engine, 2)
    assert not broken_gradients(engine), "what was accumulated is gone"
    engine.step()
    assert engine.was_step_applied() and not any(map(torch.equal, weights(engine), before))


@pytest.mark.parametrize("zero", [0, 3])
def test_where_deepspeed_or_another_check_looks_there_is_no_second_look(engine_of, zero):
    engine = engine_of(zero, torch.bfloat16)
    backward(engine, 0)
    assert broken_gradients(engine) is None


@pytest.mark.parametrize("clip", [1e-7, 1e3, 0.0])
@pytest.mark.parametrize("zero", [1, 2])
def test_norm_and_clipping_read_nothing_on_the_host(engine_of, zero, clip):
    """A value that is read waits for the device. DeepSpeed's own norm and factor, bit for bit."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Theirs

    engine = engine_of(zero, torch.bfloat16)
    optimizer = engine.optimizer
    optimizer.clip_grad = clip
    backward(engine, 0)
    [gradients] = optimizer.averaged_gradients.values()
    mine, theirs = ([g.float() for g in gradients] for _ in range(2))
    with Ops() as ops:
        norm = optimizer.scaled_global_norm()
        optimizer.unscale_and_clip_grads(mine, norm)
    assert ops.counts["aten._local_scalar_dense"] == 0
    with Ops() as ops:
        Theirs.unscale_and_clip_grads(optimizer, theirs, Theirs.scaled_global_norm(optimizer))
    assert ops.counts["aten._local_scalar_dense"] > 0 or not clip
    assert norm == Theirs.scaled_global_norm(optimizer) > 0
    for one, other, before in zip(mine, theirs, gradients, strict=True):
        assert torch.equal(one, other) and torch.equal(one, before.float()) == (clip != 1e-7)


@pytest.mark.parametrize("timed", [False, True])
def test_no_forward_waits_for_the_device(engine_of, monkeypatch, timed):
    """DeepSpeed's throughput timer would, from its third step on."""
    from deepspeed.accelerator import get_accelerator

    waits = []
    monkeypatch.setattr(get_accelerator(), "synchronize", lambda *_: waits.append(1))
    changes = {"timers": {"throughput": {"enabled": True}}} if timed else {}
    engine = engine_of(1, torch.bfloat16, **changes)
    waits.clear()
    for step in range(5):
        backward(engine, step)
        engine.step()
    assert (len(waits) >= 3) == timed and (timed or not waits)
