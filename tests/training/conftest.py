"""What several tests of training share."""

import importlib
import sys

import pytest
import torch
from support.processes import free_port

from l2v.training.engine import start_distributed


@pytest.fixture(scope="module")
def one_rank():
    """This process as the one rank of a launcher."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in (place | {"MASTER_PORT": str(free_port())}).items():
            patch.setenv(key, value)
        start_distributed()
        yield
        torch.distributed.destroy_process_group()
    importlib.reload(sys.modules["deepspeed.utils.groups"])  # it keeps the groups of the process group that is gone
