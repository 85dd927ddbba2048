"""Ranks and other processes that tests start: their environment, their start, and their end."""

import json
import os
import socket
import subprocess
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from support.forked import Process, start

ROOT = Path(__file__).resolve().parents[2]
NULL_GPU = "device: null, which computes nothing"
"""Why a test of compiled kernels is skipped on the GPU of tests/nullgpu."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def hide_gpus(arguments: Sequence[str]) -> None:
    """Hide the GPUs from this process and all it starts, unless every argument of pytest is a file test_*_gpu.py.

    Every other test is one of the CPU: on a machine with a GPU it would train there, or give NCCL tensors of the CPU.
    """
    files = [Path(argument.partition("::")[0]).name for argument in arguments]
    if not files or not all(map(is_gpu_test, files)):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def is_gpu_test(name: str) -> bool:
    """Whether a file of this name holds tests that compute on a GPU."""
    return fnmatch(name, "test_*_gpu.py")


def on_null_gpu() -> bool:
    """Whether this is a process of tests/nullgpu in which values are compared, hidden GPU or not."""
    plan = os.environ.get("NULLGPU_PLAN")
    return plan is not None and not json.loads(plan).get("ignore_values", False)


def training_environment() -> dict[str, str]:
    """The environment of a training process on the CPU, with a port of its own and no rank.

    The deepspeed launcher shows a rank the GPUs that it finds, hidden or not; l2v hides them again (L2V_VISIBLE_DEVICES).
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    path = [str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    on_cpu = {"CUDA_VISIBLE_DEVICES": "", "L2V_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return environment | on_cpu | {"MASTER_PORT": str(free_port())}


def run_ranks(function: Callable, arguments: tuple, world: int) -> None:
    """function(rank, *arguments) on so many ranks, forked from one process that has loaded torch; it has to be importable."""
    import multiprocessing

    import torch

    multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "l2v.objectives.contrastive"])
    torch.multiprocessing.start_processes(function, arguments, nprocs=world, start_method="forkserver")


def start_ranks(arguments: Sequence[Sequence[object]], folders: Sequence[Path] | None = None) -> list[Process]:
    """Ranks as a launcher starts them, without its twenty seconds: one `python -m l2v.train` for each list of arguments.

    With `folders`, each rank works in a folder of its own, as on a node of its own.
    """
    environment = training_environment() | {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(len(arguments))}
    return [
        start(
            ["-m", "l2v.train", *map(str, own)],
            environment | {"RANK": str(rank), "LOCAL_RANK": "0" if folders else str(rank)},
            folders[rank] if folders else None,
        )
        for rank, own in enumerate(arguments)
    ]


def finish(processes: list[Process | subprocess.Popen], expect: int = 0, timeout: float = 600) -> list[str]:
    """What each rank said, once all have ended with that exit code; none is left behind."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [expect] * len(processes), "\n".join(outputs)
    return outputs
