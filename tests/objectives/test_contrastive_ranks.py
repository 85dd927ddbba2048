"""The loss over several processes equals one process that holds everything, whatever each rank holds: also nothing."""

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.processes import free_port, run_ranks

from l2v.objectives.contrastive import Groups, contrastive_loss
from l2v.objectives.gather import gather_labels, gather_rows

GTE = ["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
CASES = {
    "plain": {},
    "duplicates-stay": {"mask_duplicates": False},
    "groups": {"mask_groups": True},
    "groups-duplicates-stay": {"mask_groups": True, "mask_duplicates": False},
    "query-to-query": {"directions": ["query_to_doc", "query_to_query"]},
    "all-directions": {"directions": GTE},
    "all-directions-duplicates-stay": {"directions": GTE, "mask_duplicates": False},
    "per-direction": {"directions": ["query_to_doc", "doc_to_query"], "partition": "per_direction"},
    "own-negatives": {"own_negatives": True},
    "margin": {"false_negative_margin": 0.1},
    "matryoshka": {"prefixes": [4, 16, 24], "prefix_weights": [0.5, 2, 1]},
    "int8": {"quantize": "int8", "directions": GTE},
    "binary": {"quantize": "binary", "prefixes": [4, 16], "own_negatives": True},
    "everything": {
        "directions": GTE,
        "own_negatives": True,
        "mask_groups": True,
        "false_negative_margin": 0.1,
        "prefixes": [4, 16, 24],
        "prefix_weights": [0.5, 2, 1],
    },
}
# Negatives of each example, rank by rank: unequal numbers of both, and a rank with nothing.
SHARES = {
    2: {"uneven": [[1, 0, 2], [3]], "one rank alone": [[], [0, 1, 2]], "one candidate": [[], [0]]},
    3: {"uneven": [[0, 1], [], [2, 0, 1]], "equal": [[1], [1], [1]]},
}
WIDTH = 24


def data(shares: list[list[int]], dtype: torch.dtype):
    """Embeddings, columns, text keys and groups of every rank; some stand twice, also across ranks."""
    generator = torch.Generator().manual_seed(5)
    parts = []
    for share in shares:
        columns = [column for negatives in share for column in range(2 + negatives)] or [-1]
        rows = torch.randn(len(columns), WIDTH, generator=generator, dtype=torch.float64)
        # One direction in common, as embeddings have it, so that some negatives come near the positive.
        keys = torch.randint(0, 12, (len(columns),), generator=generator)
        # One in two examples is of no group.
        own = torch.randint(-3, 3, (len(columns),), generator=generator).clamp(-1)[
            torch.tensor(columns).eq(0).cumsum(0) - 1
        ]
        parts.append(((rows + 1.0).to(dtype), torch.tensor(columns), keys, own))
    return parts


def whole(parts, options):
    """Loss and gradients, rank by rank, of one process."""
    leaves = [rows.clone().requires_grad_() for rows, *_ in parts]
    groups = Groups.from_columns(*(torch.cat(labels) for labels in list(zip(*parts, strict=True))[1:]))
    loss = contrastive_loss(torch.cat(leaves), groups, scale=10, **options)
    return loss.detach(), torch.autograd.grad(loss, leaves)


def compare(rank: int, world: int, shares: list[list[int]], options, dtype: torch.dtype) -> dict[str, float]:
    parts = data(shares, dtype)
    expected, gradients = whole(parts, options)
    rows, *labels = parts[rank]
    queries, counts = ([len(s) for s in shares], [sum(s) + len(s) for s in shares])
    groups = Groups.from_columns(*labels, query_counts=queries, counts=counts, rank=rank)
    leaf = rows.clone().requires_grad_()
    loss = contrastive_loss(leaf, groups, scale=10, **options)
    (gradient,) = torch.autograd.grad(loss, leaf)
    total = loss.detach().clone()
    dist.all_reduce(total)
    largest = max(float(g.abs().max()) for g in gradients)
    off = float((gradient - gradients[rank]).abs().max())
    return {
        "loss": abs(float(total - expected)) / max(abs(float(expected)), 1e-30) if expected else abs(float(total)),
        "gradient": off / largest if largest else off,
        "largest": largest,
        "expected": float(expected),
    }


def work(rank: int, world: int, port: int, folder: str) -> None:
    """What one process does: every case, its differences written to a file."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    found = {}
    for (name, options), (share, shares) in itertools.product(CASES.items(), SHARES[world].items()):
        for dtype in (torch.float32, torch.float64):
            found[f"{name}, {share}, {dtype}"] = compare(rank, world, shares, options, dtype)
    found["gather"] = gathered(rank, world)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def gathered(rank: int, world: int) -> dict:
    """Rows and labels of all, and the gradient that comes home where every rank weighs the rows differently."""
    a, b = [2, 0, 1][:world], [1, 3, 0][:world]
    first = torch.full((a[rank], 2), float(rank), requires_grad=True)
    second = torch.full((b[rank], 2), 10.0 + rank, requires_grad=True)
    rows, more = gather_rows([first, second], [a, b])
    ((rank + 1) * rows.sum() + (rank + 1) * 10 * (more * torch.arange(len(more)).unsqueeze(1)).sum()).backward()
    ids, pairs = gather_labels([torch.full((a[rank],), rank), torch.full((b[rank], 2), rank)], [a, b])
    try:
        gather_rows([first[:0]], [[1] * world])
        error = ""
    except ValueError as caught:
        error = str(caught)
    return {
        "rows": rows[:, 0].tolist(), "more": more[:, 1].tolist(), "ids": ids.tolist(), "pairs": pairs.tolist(),
        "first": first.grad.tolist(), "second": second.grad.tolist(), "error": error,
    }  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """found(world) -> what each rank saw, run when it is first asked for."""
    ready = {}

    def run(world: int) -> list[dict]:
        if world not in ready:
            folder = tmp_path_factory.mktemp(f"ranks{world}")
            run_ranks(work, (world, free_port(), str(folder)), world)
            ready[world] = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
        return ready[world]

    return run


@pytest.mark.parametrize(("world", "share"), [(w, share) for w, shares in SHARES.items() for share in shares])
@pytest.mark.parametrize("name", CASES)
def test_several_processes_equal_one(found, name, world, share):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        for rank, seen in enumerate(found(world)):
            off = seen[f"{name}, {share}, {dtype}"]
            assert max(off["loss"], off["gradient"]) <= tolerance, (rank, off)
            if share == "one candidate":
                assert off["expected"] == 0 and off["largest"] == 0
            else:
                assert off["expected"] > 0.01 and off["largest"] > 1e-3


@pytest.mark.parametrize("world", SHARES)
def test_rows_go_out_and_gradients_come_home(found, world):
    a, b = [2, 0, 1][:world], [1, 3, 0][:world]
    weight = sum(range(1, world + 1))  # every rank says rank + 1 of a row
    for rank, all_seen in enumerate(found(world)):
        seen = all_seen["gather"]
        assert seen["rows"] == [float(r) for r in range(world) for _ in range(a[r])]
        assert seen["more"] == [10.0 + r for r in range(world) for _ in range(b[r])]
        assert seen["ids"] == [r for r in range(world) for _ in range(a[r])]
        assert seen["pairs"] == [[r, r] for r in range(world) for _ in range(b[r])]
        assert seen["first"] == [[float(weight)] * 2] * a[rank]
        before = sum(b[:rank])
        assert seen["second"] == [[10.0 * weight * (before + i)] * 2 for i in range(b[rank])]
        assert (f"rank {rank} holds 0 rows and was announced with 1") in seen["error"]


def test_the_options_change_the_loss():
    """Or a test of parity would compare the same with the same."""
    parts = data(SHARES[3]["uneven"], torch.float64)
    losses = {name: float(whole(parts, options)[0]) for name, options in CASES.items()}
    assert len({round(loss, 9) for loss in losses.values()}) == len(CASES), losses
