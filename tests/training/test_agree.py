"""Ranks that exchange results, errors and facts; in a module that imports little, since three processes import it."""

import json
import os
from pathlib import Path

import torch.distributed as dist
from support.processes import free_port, run_ranks

from l2v.errors import RecipeError, UserError
from l2v.training.ranks import agree, first_on_node, on_every_rank, on_first_rank


def outcome(work) -> str:
    try:
        return f"gave {work()}"
    except UserError as error:
        return f"{type(error).__name__}: {error}"


def fail_on(bad: int, rank: int, error: type[UserError] = UserError) -> int:
    if rank == bad:
        raise error(f"rank {rank} fell over")
    return rank


def together(rank: int, world: int, port: int, folder: str) -> None:
    """What one process of three sees of the others."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank % 2)}  # nodes: 0 1 | 2
    dist.init_process_group("gloo", rank=rank, world_size=world)
    found = {
        "same": outcome(lambda: agree({"a": {"b": [1, 2]}, "c": None, "d": {}})),
        "value": outcome(lambda: agree({"a": {"b": 1, "c": [rank % 2]}, "z": rank})),
        "absent": outcome(lambda: agree({"a": {"b": 1} | ({"c": "x"} if rank == 2 else {})})),
        "first": outcome(lambda: on_first_rank(lambda: f"made by {rank}")),
        "first fails": outcome(lambda: on_first_rank(lambda: fail_on(0, rank))),
        "every": outcome(lambda: on_every_rank(lambda: rank)),
        "every fails": outcome(lambda: on_every_rank(lambda: fail_on(2, rank, RecipeError))),
        "node": outcome(lambda: first_on_node(lambda: rank)),
        "node fails": outcome(lambda: first_on_node(lambda: fail_on(1, rank))),
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_three_ranks_together(tmp_path):
    run_ranks(together, (3, free_port(), str(tmp_path)), 3)
    fix = "; all ranks need the same recipe, command line, data and run folder"
    for rank in range(3):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {
            "same": "gave None",
            "value": f"UserError: the ranks do not agree on a.c: [0] on rank 0, 2; [1] on rank 1{fix}",
            "absent": f'UserError: the ranks do not agree on a.c: null on rank 0, 1; "x" on rank 2{fix}',
            "first": "gave made by 0",
            "first fails": "UserError: rank 0 fell over",
            "every": f"gave {rank}",
            "every fails": "RecipeError: rank 2 fell over",
            "node": f"gave {rank}",
            "node fails": "UserError: rank 1 fell over",
        }
