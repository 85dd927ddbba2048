"""`python count_bytes.py OUT ARGUMENTS`: the training program, with the bytes of every collective written to OUT.RANK.json.

l2v itself is unchanged: functions of torch.distributed are wrapped before anyone has imported them. A list of
rows [what, bytes] for each optimizer step, from one `engine.step` to the next: what an all-reduce reduces, what an all-gather
gives, what a reduce-scatter takes, what a broadcast sends. A collective made of others counts once.
"""

import functools
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

OPERATIONS = {
    "all_reduce": ("all-reduce", lambda a: a[0]),
    "all_reduce_coalesced": ("all-reduce", lambda a: a[0]),
    "reduce": ("reduce", lambda a: a[0]),
    "broadcast": ("broadcast", lambda a: a[0]),
    "all_gather": ("all-gather", lambda a: a[0]),
    "all_gather_into_tensor": ("all-gather", lambda a: a[0]),
    "all_gather_single": ("all-gather", lambda a: a[0]),
    "reduce_scatter": ("reduce-scatter", lambda a: a[1]),
    "reduce_scatter_tensor": ("reduce-scatter", lambda a: a[1]),
    "reduce_scatter_single": ("reduce-scatter", lambda a: a[1]),
    "all_gather_object": ("objects", lambda a: torch.empty(0)),
    "broadcast_object_list": ("objects", lambda a: torch.empty(0)),
}
NAMES = {"tensor": 0, "tensors": 0, "output_tensor": 0, "tensor_list": 0, "output": 0, "input_list": 1, "input": 1}
steps: list[list] = [[]]
depth = 0


def size(value) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(size, value))


def counted(function, what, chosen):
    @functools.wraps(function)
    def call(*args, **kwargs):
        global depth
        depth += 1
        try:
            result = function(*args, **kwargs)
        finally:
            depth -= 1
        if depth == 0:
            given = dict(enumerate(args)) | {NAMES[k]: v for k, v in kwargs.items() if k in NAMES}
            if "input_tensor" in kwargs:
                given[1] = kwargs["input_tensor"]
            steps[-1].append([what, size(chosen(given))])
        return result

    return call


def main() -> int:
    out, *arguments = sys.argv[1:]
    for name, (what, chosen) in OPERATIONS.items():
        if hasattr(dist, name):
            wrapped = counted(getattr(dist, name), what, chosen)
            for module in (dist, dist.distributed_c10d):
                setattr(module, name, wrapped)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    import deepspeed

    step = deepspeed.DeepSpeedEngine.step

    def counting(self, *args, **kwargs):
        steps.append([])
        return step(self, *args, **kwargs)

    deepspeed.DeepSpeedEngine.step = counting
    from l2v.train import main as train

    code = train(arguments)
    Path(f"{out}.{os.environ['RANK']}.json").write_text(json.dumps(steps))
    return code


if __name__ == "__main__":
    sys.exit(main())
