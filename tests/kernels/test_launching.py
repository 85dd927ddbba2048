"""The GPU on which kernels are launched: that of their tensors, whichever is current."""

import ast
import contextlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from l2v_kernels.launching import on_device

PACKAGE = Path(__file__).resolve().parents[2] / "kernels" / "l2v_kernels"


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, of which the list's last one is current."""
    current = [0]

    @contextlib.contextmanager
    def device(index):
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    return current


def on_gpu(index):
    return SimpleNamespace(get_device=lambda: index)


def test_a_kernel_runs_on_the_gpu_of_its_tensors(gpus):
    @on_device
    def launch(x, add, *, more=0):
        return gpus[-1], add + more

    assert launch(on_gpu(0), 5) == (0, 5)
    assert launch(on_gpu(1), 5, more=2) == (1, 7), "a model on cuda:1 while cuda:0 is current"
    gpus.append(1)
    assert launch(on_gpu(0), 1) == (0, 1) and gpus == [0, 1], "the current device is as it was"


def test_the_tensor_may_be_another_argument_and_an_error_leaves_the_device(gpus):
    def fail(tile, x):
        raise ValueError(f"{tile} on {gpus[-1]}")

    with pytest.raises(ValueError, match="a tile on 1"):
        on_device(fail, at=1)("a tile", on_gpu(1))


def test_a_cpu_asks_no_driver(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("asked CUDA"))
    assert on_device(lambda x: x)(torch.ones(3)).sum() == 3


def test_every_kernel_is_launched_inside_the_guard():
    """By the source: `kernel[grid](...)` stands in a decorated launcher, or in a helper that only these call."""
    guarded, helpers = Counter(), {}
    for file in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        decorated = {f.name for f in functions if any("on_device" in ast.unparse(d) for d in f.decorator_list)}
        for function in functions:
            calls = [x.func for x in ast.walk(function) if isinstance(x, ast.Call)]
            launches = sum(isinstance(x, ast.Subscript) and "kernel" in ast.unparse(x.value) for x in calls)
            if launches and function.name in decorated:
                guarded[file.relative_to(PACKAGE).parts[0]] += launches
            elif launches:
                helpers[function.name] = {
                    f.name for f in functions if function.name in {getattr(x, "id", None) for x in names(f)}
                } - decorated
    assert not helpers
    assert guarded == {
        "attention": 3, "dropout": 1, "fp8": 2, "info_nce": 7, "linear_cross_entropy": 1, "lora_linear": 5, "rms_norm": 3,
        "rope": 2, "sandwich_norm": 2, "segment_pool": 3, "swiglu": 2,
    }  # fmt: skip


def names(function):
    return (x for x in ast.walk(function) if isinstance(x, ast.Name))
