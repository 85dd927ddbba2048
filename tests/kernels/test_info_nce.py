"""InfoNCE on the CPU: the definition against loops, the tiled path against the definition in float64, and bad input."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.info_nce_cases import VARIANTS, assert_close, options, ours, plain, problem

from l2v_kernels import info_nce
from l2v_kernels.info_nce.paths import OnCpu
from l2v_kernels.info_nce.settings import DIRECTIONS

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def small(row, chosen, last):
    """The row as `quantize` compares it, number by number; rounding to the nearest, half up."""
    numbers = row.tolist()
    if chosen.get("quantize") == "binary":
        return [1 if x > 0 else -1 for x in numbers]
    if chosen.get("quantize") == "int8":
        step = max(abs(x) for x in numbers[:last]) / 127
        return [math.floor(x / step + 0.5) for x in numbers]
    return numbers


def loops(tensors, targets, chosen, length):
    """The mean loss over a prefix, score by score, as a reader of the docstring would compute it by hand."""
    queries, candidates = tensors[0], tensors[1]
    everyone = tensors[2] if len(tensors) == 3 else queries
    scale, offset, margin = chosen["scale"], chosen["query_offset"], chosen.get("false_negative_margin")
    ids = chosen.get("candidate_ids")
    query_ids, all_ids = chosen.get("query_ids"), chosen.get("all_query_ids", chosen.get("query_ids"))
    owners, restricted = chosen.get("owners_M"), chosen.get("restricted_M")

    def cos(x, y):
        last = chosen.get("prefixes", (len(x),))[-1]
        x, y = (small(row, chosen, last)[:length] for row in (x, y))
        dot, xx, yy = (sum(a * b for a, b in zip(u, v, strict=True)) for u, v in ((x, y), (x, x), (y, y)))
        return dot / math.sqrt(xx * yy)

    total = 0.0
    for i, target in enumerate(targets.tolist()):
        number, positive = i + offset, candidates[target]
        pair = cos(queries[i], positive)

        def seen(cosine, other_ids, i=i, pair=pair):
            if other_ids is not None and any(
                a == b >= 0 for a, b in zip(query_ids[i].tolist(), other_ids, strict=True)
            ):
                return False
            return margin is None or cosine <= pair + margin

        terms = {}
        for direction in chosen["directions"]:
            left = positive if direction.startswith("doc") else queries[i]
            found = []
            for j, other in enumerate(candidates if direction.endswith("doc") else everyone):
                value = cos(left, other)
                if direction.endswith("doc"):
                    own, theirs = j == target, None if ids is None else ids[j].tolist()
                    if direction == "doc_to_doc" and (own or (owners is not None and owners[j] == number)):
                        continue
                    foreign = restricted is not None and bool(restricted[j]) and owners[j] != number
                else:
                    own, theirs, foreign = j == number, None if all_ids is None else all_ids[j].tolist(), False
                    if direction == "query_to_query" and own:
                        continue
                if own or (not foreign and seen(value, theirs)):
                    found.append(math.exp(scale * value))
            terms[direction] = sum(found)
        if chosen["partition"] == "joint":
            log_z = math.log(sum(terms.values()))
        else:
            log_z = sum(math.log(z) for z in terms.values()) / len(terms)
        total += log_z - scale * pair
    return total / len(targets)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "everything"])
def test_the_definition_says_what_the_docstring_says(variant):
    tensors, targets, chosen = problem(5, 11, 17, dtype=torch.float64, **VARIANTS[variant])
    prefixes, weights = chosen.get("prefixes", (17,)), chosen.get("prefix_weights", [1.0])
    want = sum(w * loops(tensors, targets, chosen, p) for p, w in zip(prefixes, weights, strict=True))
    assert plain(tensors, targets, chosen)[0].item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("workspace", [1 << 29, 4000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_options(variant, dtype, workspace):
    given_ = problem(7, 12, 17, dtype=dtype, **VARIANTS[variant])
    assert given_[0][0].dtype == dtype and plain(*given_)[0] > 0.1
    assert_close(ours(*given_, workspace=workspace), *given_)


def check(data):
    dtype = data.draw(st.sampled_from(DTYPES[1:]))
    N, E = data.draw(st.integers(1, 150)), data.draw(st.integers(17, 300))
    M = max(2, N + data.draw(st.integers(-5, 200)))
    workspace = data.draw(st.sampled_from([1 << 29, 200_000, 5_000]))
    given_ = problem(N, M, E, seed=N * M, dtype=dtype, **data.draw(options()))
    assert_close(ours(*given_, workspace=workspace), *given_)


RANDOM = {"phases": [Phase.generate], "deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@seed(0)
@hypothesis_settings(max_examples=60, **RANDOM)
@given(st.data())
def test_random_problems(data):
    check(data)


if os.environ.get("L2V_SLOW") == "1":

    @seed(1)
    @hypothesis_settings(max_examples=600, **RANDOM)
    @given(st.data())
    def test_many_random_problems(data):
        check(data)


@pytest.mark.parametrize("scale", [1.0, 20.0, 200.0])
def test_no_scale_overflows(scale):
    """Vectors that are equal and opposite, so that scores reach plus and minus the scale."""
    x = torch.eye(4, 8)
    x = torch.cat([x, -x])
    for candidates in (x, x.flip(0)):
        leaves = [y.clone().requires_grad_() for y in (x, candidates)]
        loss = info_nce(*leaves, torch.arange(8), scale=scale)
        loss.backward()
        want = plain((x, candidates), torch.arange(8), {"scale": scale, "directions": DIRECTIONS[:1], "partition": "joint",
                     "query_offset": 0})  # fmt: skip
        torch.testing.assert_close(loss.double(), want[0], rtol=1e-5, atol=1e-6)
        assert all(y.grad.isfinite().all() for y in leaves)


def test_matryoshka_is_the_sum_of_the_losses_of_its_prefixes():
    tensors, targets, _ = problem(20, 31, 64)
    prefixes, weights = (8, 24, 64), (0.5, 1.0, 2.0)
    leaves = [x.clone().requires_grad_() for x in tensors]
    loss = info_nce(*leaves, targets, scale=20, prefixes=prefixes, prefix_weights=weights)
    loss.backward()
    apart = [x.clone().requires_grad_() for x in tensors]
    parts = [info_nce(*(x[:, :p] for x in apart), targets, scale=20) for p in prefixes]
    sum(w * part for w, part in zip(weights, parts, strict=True)).backward()
    for x, y in zip(leaves, apart, strict=True):
        assert (x.grad - y.grad).abs().max() <= 1e-5 * y.grad.abs().max()
    each = info_nce(*tensors, targets, scale=20, prefixes=prefixes, reduction="none")
    torch.testing.assert_close(each.mean(1), torch.stack([p.detach() for p in parts]))


def test_what_lies_beyond_the_last_prefix_plays_no_part():
    tensors, targets, _ = problem(6, 9, 20)
    leaves = [x.clone().requires_grad_() for x in tensors]
    for x in leaves:
        x.data[:, 12:] = float("nan")
    info_nce(*leaves, targets, scale=20, prefixes=(5, 12)).backward()
    assert all(x.grad[:, 12:].abs().max() == 0 and x.grad[:, :12].abs().max() > 0 for x in leaves)


@pytest.mark.parametrize("directions", [DIRECTIONS[:1], DIRECTIONS])
def test_shares_of_the_queries_add_up_to_the_whole(directions):
    """What ranks do: each its own queries, all candidates; losses and gradients add up to those of one process."""
    tensors, targets, chosen = problem(13, 29, 24, ids=1, owners=True, restricted=True, directions=directions)
    chosen |= {"reduction": "sum"}
    whole = [x.clone().requires_grad_() for x in tensors]
    total = info_nce(*whole, targets, **chosen)
    total.backward()
    leaves, parts, begin = [x.clone().requires_grad_() for x in tensors], [], 0
    for n in (4, 0, 9):
        share = slice(begin, begin + n)
        mine = chosen | {"query_ids": chosen["query_ids"][share], "query_offset": begin}
        mine |= {"all_queries_QE": leaves[0], "all_query_ids": chosen["query_ids"]}
        parts.append(info_nce(leaves[0][share], leaves[1], targets[share], **mine))
        begin += n
    sum(parts).backward()
    torch.testing.assert_close(sum(parts), total, rtol=1e-6, atol=1e-6)
    for x, y in zip(leaves, whole, strict=True):
        assert (x.grad - y.grad).abs().max() <= 1e-5 * y.grad.abs().max()


def test_the_same_bits_every_time_and_for_a_second_backward():
    tensors, targets, chosen = problem(40, 70, 33, **VARIANTS["everything"])
    first, second = (ours(tensors, targets, chosen, workspace=30_000) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    leaves = [x.clone().requires_grad_() for x in tensors[:2]]
    loss = info_nce(*leaves, targets % 70, scale=20)  # small enough to keep its scores
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(x, y) for x, y in zip(once, torch.autograd.grad(loss, leaves), strict=True))


def test_layouts_autocast_and_single_gradients():
    tensors, targets, chosen = problem(9, 14, 20)
    want = ours(tensors, targets, chosen)
    strided = [torch.stack([x, x], 2)[:, :, 0] for x in tensors], [x.T.contiguous().T for x in tensors]
    for other in strided:
        for x, y in zip(ours(other, targets, chosen), want, strict=True):
            torch.testing.assert_close(x, y)
    with torch.autocast("cpu", torch.bfloat16):  # would round what is multiplied
        assert all(torch.equal(x, y) for x, y in zip(ours(tensors, targets, chosen), want, strict=True))
    for i in (0, 1):
        leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate(tensors)]
        info_nce(*leaves, targets, scale=20).backward()
        torch.testing.assert_close(leaves[i].grad.double(), want[1 + i])
        assert leaves[1 - i].grad is None
    with torch.no_grad():
        assert not info_nce(*tensors, targets, scale=20).requires_grad


WAYS = {"kept": 1 << 29, "one pass": 60_000, "two passes": 9_000}
"""Workspaces that make 100 queries and 120 candidates go each way: scores wait for the backward; gradients are made while
the scores exist; scores are computed twice."""


@pytest.mark.parametrize("variant", ["plain", "gte", "matryoshka", "hard negatives of their own"])
def test_three_ways_to_the_gradient(variant, monkeypatch):
    monkeypatch.setattr(OnCpu, "min_rows", 8)
    tensors, targets, chosen = problem(100, 120, 17, **VARIANTS[variant])
    want = plain(tensors, targets, chosen)
    for way, workspace in WAYS.items():
        leaves = [x.clone().requires_grad_() for x in tensors]
        loss = info_nce(*leaves, targets, workspace=workspace, **chosen)
        run, ready = loss.grad_fn.run, loss.grad_fn.ready
        assert (run.kept is not None, ready is not None) == (way == "kept", way == "one pass"), way
        first = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
        second = torch.autograd.grad(loss, leaves)  # the gradients of the forward are spent, and recomputed
        for x, y, z in zip(first, second, want[1:3], strict=True):
            assert (x.double() - 3 * z).abs().max() <= 3e-5 * z.abs().max(), way
            assert (y.double() - z).abs().max() <= 1e-5 * z.abs().max(), way
        for i in (0, 1):
            leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate(tensors)]
            info_nce(*leaves, targets, workspace=workspace, **chosen).backward()
            assert (leaves[i].grad - want[1 + i]).abs().max() <= 1e-5 * want[1 + i].abs().max(), way


def test_fp16_waits_for_the_loss_scale(monkeypatch):
    """Its gradients are too small for fp16 until the incoming one has scaled them: they are never made in the forward."""
    tensors, targets, chosen = problem(100, 120, 17, dtype=torch.float16)
    leaves = [x.clone().requires_grad_() for x in tensors]
    monkeypatch.setattr(OnCpu, "min_rows", 8)
    loss = info_nce(*leaves, targets, workspace=WAYS["one pass"], **chosen)
    assert loss.grad_fn.ready is None and loss.grad_fn.run.kept is None
    (loss * 65536).backward()
    want = plain(tensors, targets, chosen)
    for x, y in zip(leaves, want[1:3], strict=True):
        assert (x.grad.double() / 65536 - y).norm() <= 2e-3 * y.norm()


def test_a_changed_embedding_is_noticed_before_the_backward():
    tensors, targets, _ = problem(5, 7, 18)
    leaves = [x.clone().requires_grad_() for x in tensors]
    queries = leaves[0] * 1
    loss = info_nce(queries, leaves[1], targets, scale=20)
    queries.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_zero_vector_has_cosine_zero_and_no_gradient():
    tensors, targets, _ = problem(4, 6, 18)
    leaves = [x.clone() for x in tensors]
    leaves[0][1], leaves[1][5] = 0, 0
    for x in leaves:
        x.requires_grad_()
    losses = info_nce(*leaves, targets, scale=20, reduction="none")
    assert losses[1].item() == pytest.approx(math.log(6), rel=1e-6)
    losses.sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)
    assert leaves[0].grad[1].abs().max() == 0 and leaves[1].grad[5].abs().max() == 0
    assert leaves[0].grad[0].abs().max() > 0


def test_no_queries_are_a_zero_that_is_part_of_the_graph():
    queries, candidates = torch.zeros(0, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    loss = info_nce(queries, candidates, torch.zeros(0, dtype=torch.int64), scale=20, reduction="sum")
    loss.backward()
    assert loss.item() == 0 and candidates.grad.abs().max() == 0 and queries.grad.shape == (0, 8)


def test_unchecked_bad_values_give_nan():
    tensors, targets, _ = problem(4, 6, 18)
    queries = tensors[0].clone()
    queries[2, 3] = float("inf")
    losses = info_nce(queries, tensors[1], targets, scale=20, reduction="none", check_values=False)
    assert losses.isnan().tolist() == [False, False, True, False]
    wrong = targets.clone()
    wrong[1], wrong[3] = 6, -1
    losses = info_nce(*tensors, wrong, scale=20, reduction="none", check_values=False)
    assert losses.isnan().tolist() == [False, True, False, True]


Q, C, T = torch.randn(4, 8), torch.randn(6, 8), torch.arange(4)
BAD = {
    "another E": ((Q, C[:, :7], T), {}, r"agree in E.*queries \(4, 8\), candidates \(6, 7\)"),
    "one dimension": ((Q[0], C, T), {}, r"queries \[N, E\]"),
    "two dtypes": ((Q, C.half(), T), {}, "one floating dtype, got torch.float32, torch.float16"),
    "whole numbers": ((Q.long(), C.long(), T), {}, "one floating dtype"),
    "float targets": ((Q, C, T.float()), {}, r"targets_N must be int64 \[4\].*got torch.float32"),
    "few targets": ((Q, C, T[:3]), {}, r"targets_N must be int64 \[4\].*\(3,\)"),
    "a target beyond": ((Q, C, T + 3), {}, r"targets_N\[3\] is 6 and there are 6 candidates"),
    "a negative target": ((Q, C, T - 1), {}, r"targets_N\[0\] is -1"),
    "no queries": ((Q[:0], C, T[:0]), {}, r'N = 0.*reduction="sum"'),
    "no candidates": ((Q, C[:0], T), {}, "0 candidate leaves no negatives"),
    "one candidate": ((Q[:1], C[:1], T[:1]), {}, "1 candidate leaves no negatives.*two or more"),
    "scale 0": ((Q, C, T), {"scale": 0.0}, "scale must be above 0 and finite, got 0.0"),
    "two scales": ((Q, C, T), {"scale": torch.ones(2)}, r"one element, got \(2,\)"),
    "no such direction": ((Q, C, T), {"directions": ("query_to_doc", "up")}, "directions are"),
    "no pair": ((Q, C, T), {"directions": ("doc_to_query",)}, '"query_to_doc" and any of'),
    "a direction as text": ((Q, C, T), {"directions": "query_to_doc"}, "directions are"),
    "no such partition": ((Q, C, T), {"partition": "both"}, 'partition is "joint" or "per_direction"'),
    "no positive of its own": ((Q, C, T), {"directions": DIRECTIONS, "partition": "per_direction"}, 'use "joint"'),
    "prefixes that fall": ((Q, C, T), {"prefixes": (4, 4, 8)}, r"prefixes must ascend.*\(4, 4, 8\)"),
    "a prefix beyond E": ((Q, C, T), {"prefixes": (4, 9)}, "at most E = 8"),
    "other prefix weights": ((Q, C, T), {"prefixes": (4, 8), "prefix_weights": (1,)}, "1 prefix_weights for 2 prefixes"),
    "few weights": ((Q, C, T), {"weights_N": torch.ones(3)}, r"weights_N must be \[4\]"),
    "few ids": ((Q, C, T), {"candidate_ids": torch.arange(4)}, r"candidate_ids must be int64 \[6\]"),
    "ids of queries alone": ((Q, C, T), {"query_ids": T}, "query_ids need candidate_ids"),
    "kinds of ids": ((Q, C, T), {"candidate_ids": torch.arange(6), "query_ids": T[:, None].repeat(1, 2)}, r"as many kinds"),
    "ids of all queries": (
        (Q, C, T),
        {"candidate_ids": torch.arange(6), "all_queries_QE": Q.clone(), "directions": DIRECTIONS},
        "need the ids of all queries",
    ),
    "restricted to nobody": ((Q, C, T), {"restricted_M": torch.ones(6, dtype=torch.bool)}, "needs owners_M"),
    "owners as floats": ((Q, C, T), {"owners_M": torch.ones(6)}, r"owners_M must be torch.int64 \[6\]"),
    "an offset beyond": ((Q, C, T), {"all_queries_QE": Q.clone(), "query_offset": 1}, "do not lie within all 4"),
    "no such reduction": ((Q, C, T), {"reduction": "max"}, 'reduction is "mean", "sum" or "none"'),
    "no such variant": ((Q, C, T), {"variant": "fast"}, "variant is"),
    "a workspace of nothing": ((Q, C, T), {"workspace": 0}, "workspace"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    tensors, chosen, message = BAD[name]
    with pytest.raises(ValueError, match=message) as caught:
        info_nce(*tensors, **{"scale": 20.0, **chosen})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_a_row_with_nan_or_inf_is_named(which, bad):
    tensors = [Q.clone(), C.clone()]
    tensors[which][2, 5] = bad
    name = ("queries", "candidates")[which]
    with pytest.raises(
        ValueError, match=rf"{name}: row 2 holds NaN or Inf \({bad} at 5\); rows affected: 1 of {len(tensors[which])}"
    ):
        info_nce(*tensors, T, scale=20)


def test_fused_is_for_gpus():
    with pytest.raises(NotImplementedError, match=r'"fused" needs CUDA.*\(4, 8\) torch.float32 on cpu'):
        info_nce(Q, C, T, scale=20, variant="fused")


MEASURE = """
import resource, sys, torch
from l2v_kernels import info_nce
torch.set_num_threads(1)
n = int(sys.argv[1])
def run(n):
    q, c = (torch.randn(n, 16, requires_grad=True) for _ in range(2))
    info_nce(q, c, torch.arange(n), scale=20.0).backward()
    assert q.grad.abs().max() > 0 and c.grad.isfinite().all()
run(256)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(n)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def grown(n):
    """KiB of peak memory that n queries and candidates add in a process of their own."""
    path = str(Path(__file__).resolve().parents[2] / "kernels")
    done = subprocess.run([sys.executable, "-c", MEASURE, str(n)], env=os.environ | {"PYTHONPATH": path},
                          capture_output=True, text=True, check=True)  # fmt: skip
    return int(done.stdout)


def test_memory_is_bounded():
    """8,192 x 8,192 scores are 256 MiB; a tile and what is computed from it are 32."""
    assert grown(8192) < 80 << 10


if os.environ.get("L2V_SLOW") == "1":

    def test_a_batch_of_65536_fits_on_a_cpu():
        """The scores would be 16 GiB."""
        assert grown(65536) < 200 << 10
