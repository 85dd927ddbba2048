"""Versions and device, and what the device reaches: the first thing that a stay on a GPU brings back.

python -m benchmarks.gpu.versions --out FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import cores
from l2v.files import replace_text


def output(*command: str) -> str | None:
    """What a program prints; None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def main(argv: Sequence[str] | None = None) -> int:
    """Writes what needs no torch first, then torch's view of the device, then the calibration."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    file = parser.parse_args(argv).out / "versions.json"
    query = "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit,pstate,mig.mode.current"
    found: dict[str, Any] = {
        "python": sys.version, "system": platform.platform(), "cores": cores(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "commit": output("git", "rev-parse", "HEAD"), "changed": output("git", "status", "--porcelain"),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"), "nvidia-smi": output("nvidia-smi", query, "--format=csv"),
    }  # fmt: skip

    def write(**more: Any) -> None:
        found.update(more)
        replace_text(file, json.dumps(found, indent=1))

    write()
    import torch

    from benchmarks.harness import device_facts
    from l2v.machine import calibration

    gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda", 0), torch.bfloat16) if gpu else (torch.device("cpu"), torch.float32)
    write(facts=device_facts(device, ("liger-kernel", "cut-cross-entropy", "datasets", "numpy", "pytest")))
    # Kept in the cache, where the steps that follow look for it: later, beside other work, it would come out too low.
    write(calibration=asdict(calibration(device, dtype, measure=True, seconds=5 if gpu else 1)))
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
