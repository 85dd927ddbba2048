"""What a machine without a GPU can check of the tests that need one, and of versions on which the others cannot run."""

import ast
import itertools
import os
import re
from pathlib import Path

import pytest
from support.forked import KERNELS, output_of
from support.versions import interpreter_obstacle

FILES = sorted(Path(__file__).parent.glob("test_*_gpu.py"))
WAITS = {"cuda", "cpu", "item", "tolist", "numpy", "nonzero", "synchronize"}
"""Methods that wait for the device, or copy from pageable memory, which waits too."""


def waiting(source: str) -> list[tuple[int, str]]:
    """Line and method of every call that waits, inside a `try` after `set_sync_debug_mode("error")`, and in the functions of
    the same file that are called there."""
    tree = ast.parse(source)
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    checked, found = set(), []

    def check(nodes):
        for call in (x for node in nodes for x in ast.walk(node) if isinstance(x, ast.Call)):
            if isinstance(call.func, ast.Attribute) and call.func.attr in WAITS:
                found.append((call.lineno, call.func.attr))
            name = call.func.id if isinstance(call.func, ast.Name) else None
            if name in functions and name not in checked:
                checked.add(name)
                check(functions[name].body)

    for body in (getattr(node, "body", None) for node in ast.walk(tree)):
        for before, node in itertools.pairwise(body) if isinstance(body, list) else ():
            if isinstance(node, ast.Try) and ast.unparse(before) == "torch.cuda.set_sync_debug_mode('error')":
                check(node.body)
    return found


def test_what_must_not_wait_copies_nothing_from_the_host():
    watched = [file.name for file in FILES if "set_sync_debug_mode" in file.read_text(encoding="utf-8")]
    assert len(watched) >= 6
    assert {file.name: waiting(file.read_text(encoding="utf-8")) for file in FILES} == {file.name: [] for file in FILES}


@pytest.mark.parametrize(
    ("inside", "helper", "found"),
    [
        ("y = run()", "return x.relu()", []),
        ("y = run()", "return x.cuda()", [(4, "cuda")]),
        ("y = x.sum().item()", "return x.cpu()", [(9, "item")]),
    ],
)
def test_a_call_that_waits_is_found(inside, helper, found):
    source = f"""import torch

def run():
    {helper}

def test():
    torch.cuda.set_sync_debug_mode("error")
    try:
        {inside}
    finally:
        torch.cuda.set_sync_debug_mode("default")
    y.cpu()
"""
    assert waiting(source) == found


@pytest.mark.parametrize(
    ("triton", "numpy", "works"),
    [
        ("3.6.0", "2.4.6", False),
        ("3.6.1+cu130", "2.10.0", False),
        ("3.6.0", "2.3.5", True),
        ("3.7.1", "2.4.6", True),
        ("3.10.0", "3.0.0", True),
    ],
)
def test_versions_that_do_not_fit_are_named_with_the_way_out(triton, numpy, works):
    says = f"the interpreter of triton {triton} does not work with numpy {numpy}: pip install 'numpy<2.4', or 'triton>=3.7'"
    assert interpreter_obstacle(triton, numpy) == (None if works else says)


@pytest.mark.parametrize(("plan", "by_name"), [("{}", True), ('{"ignore_values": true}', False)])
def test_the_null_gpu_is_given_no_test_that_computes(plan, by_name):
    """They are skipped by name and counted, except where their flow alone is run (python -m tests.nullgpu gpu-tests)."""
    files = [file for file in FILES if "step_ops" in file.name or "fp8" in file.name]
    assert len(files) == 2
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)]
    said = output_of(command, os.environ | {"NULLGPU_PLAN": plan}, KERNELS)
    total = re.search(r"^(\d+) skipped", said, re.M)
    assert total and "passed" not in said, said
    assert (f"{total[1]} GPU tests skipped, device: null" in said) == by_name, said
    assert ("needs a GPU" in said) != by_name, said
