"""The Triton kernels of InfoNCE under the interpreter, in fp32 and fp16 (it gets bf16 matmuls wrong)."""

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.info_nce_cases import VARIANTS, assert_close, options, ours, problem

pytest.importorskip("triton")

from l2v_kernels.info_nce import config, engine, launch, paths, quantize
from l2v_kernels.info_nce.config import Config

# A zero vector's norm: the interpreter computes both sides of a tl.where, and NumPy warns of the one not taken.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
PATHS = {"chunked": paths.Chunked, "fused": paths.Fused}
# Several programs a row and a column at the sizes of these tests, and blocks that their sides do not divide.
SMALL = (Config(2, 16, 0, 4, 1), Config(4, 8, 0, 4, 1))
SMALL_FUSED = (Config(16, 16, 16, 4, 1), Config(16, 16, 16, 4, 1))


def run(path, tensors, targets, chosen, workspace=1 << 20):
    """`ours` on the kernels of a path; every buffer starts as NaN, so what is not written shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(make):
        def inner(*a, **kw):
            x = make(*a, **kw)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return inner

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths.Chunked, "min_rows", 4)
        patch.setattr(engine, "choose", lambda *_: PATHS[path]())
        patch.setattr(torch, "empty", poisoned(empty))
        patch.setattr(torch, "empty_like", poisoned(empty_like))
        patch.setattr(config, "elementwise", lambda _: SMALL)
        patch.setattr(config, "fused", lambda *_: SMALL_FUSED)
        patch.setattr(config, "GROUP", 2)
        patch.setattr(launch, "_multiprocessors", lambda _: 2)
        return ours(tensors, targets, chosen, workspace=workspace)


def test_the_kernels_in_the_interpreter(run_interpreted):
    run_interpreted(__file__)


# Each path has half of the variants in fp32 and the others in fp16; all of them in both only where time is given.
OPTIONS = [
    (variant, dtype, path)
    for at, variant in enumerate(VARIANTS)
    for i, dtype in enumerate([torch.float32, torch.float16])
    for j, path in enumerate(PATHS)
    if (at + i + j) % 2 == 0 or variant == "everything" or os.environ.get("L2V_SLOW") == "1"
]


@pytest.mark.parametrize(("variant", "dtype", "path"), OPTIONS)
def test_interpreted_options(path, dtype, variant):
    given_ = problem(7, 21, 33, dtype=dtype, **VARIANTS[variant])
    assert_close(run(path, *given_), *given_)


@pytest.mark.parametrize("kind", ["int8", "binary"])
def test_interpreted_codes_are_those_of_the_definition(kind):
    """Also of rows without a direction, with NaN and Inf, of a view, and of half precision; bit for bit."""
    x = torch.randn(70, 150, generator=torch.Generator().manual_seed(1))[:, 3:140]
    x[4] = 0
    x[9, 7], x[11, 2] = torch.nan, torch.inf
    for rows in (x, x.half()):
        inverse = quantize.inverse_steps(rows, kind, 100)
        found, want = launch.codes(rows, inverse, kind), quantize.codes(rows, inverse, kind)
        assert found.dtype == rows.dtype and torch.equal(found.nan_to_num(9e3), want.nan_to_num(9e3))
        assert want[9].isnan().all() if kind == "binary" else want[9, 7].isnan()
        assert want[11].isnan().any() and not want[4].any()


@pytest.mark.parametrize(("workspace", "rows"), [(1 << 20, 0), (2_100, 6), (600, 0)], ids=["kept", "one-pass", "two"])
def test_interpreted_scores_of_a_small_workspace(monkeypatch, workspace, rows):
    """Scores that are kept, made once with a few rows at a time, or made twice."""
    taken, real = [], engine.Pass.one_pass_rows
    monkeypatch.setattr(engine.Pass, "one_pass_rows", lambda self: taken.append(real(self)) or taken[-1])
    given_ = problem(12, 21, 17)
    assert_close(run("chunked", *given_, workspace=workspace), *given_)
    assert set(taken) == {rows}


def check(data):
    path = data.draw(st.sampled_from(list(PATHS)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float32, torch.float16]))
    N, E = data.draw(st.integers(1, 12)), data.draw(st.integers(17, 40))
    M = max(2, N + data.draw(st.integers(-3, 16)))
    # Scores that are kept, seen once a few rows at a time, or made twice.
    workspace = data.draw(st.sampled_from([1 << 20, 4_000, 1_500]))
    given_ = problem(N, M, E, seed=N * M, dtype=dtype, **data.draw(options()))
    assert_close(run(path, *given_, workspace=workspace), *given_)


RANDOM = {"phases": [Phase.generate], "deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@seed(0)
@hypothesis_settings(max_examples=15, **RANDOM)
@given(st.data())
def test_interpreted_random_problems(data):
    check(data)


if os.environ.get("L2V_SLOW") == "1":

    @seed(1)
    @hypothesis_settings(max_examples=300, **RANDOM)
    @given(st.data())
    def test_interpreted_many_random_problems(data):
        check(data)
