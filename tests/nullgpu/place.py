"""Where the null GPU lives, and the environment of a process that sees it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
VARIABLE = "L2V_NULLGPU_HOME"
PLAN = "NULLGPU_PLAN"
SITE = Path(__file__).resolve().parent / "site"
SYSTEM = Path(__file__).resolve().parent / "system"
"""Device files of NVIDIA's driver, as l2v looks for them below `/`."""
CAPABILITIES = (80, 89, 90, 100, 120)


class NullGpuError(Exception):
    """A mistake of the user or of the machine, in one sentence with the way out."""


@dataclass(frozen=True)
class Plan:
    """What a process on the null GPU does besides its own work; its children inherit it.

    record: file of the recording, with the rank and the process added; None records nothing. lines: record for each launch
    the line of Python that asked for it, which makes the host's time meaningless. fault: name of a planted fault (faults.py).
    ignore_values: comparisons of values succeed, because every value is zero.
    """

    record: str | None = None
    lines: bool = True
    fault: str | None = None
    ignore_values: bool = False

    @classmethod
    def here(cls) -> Plan:
        """The plan of this process."""
        return cls(**json.loads(os.environ.get(PLAN, "{}")))


class Home:
    """A folder of the user's that holds the CUDA wheels, the stub and their caches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.python = self.folder / "venv" / "bin" / "python"
        self.stub = self.folder / "lib" / "libnullgpu.so"

    @classmethod
    def find(cls, given: str | None = None) -> Home:
        """The folder given, or that of L2V_NULLGPU_HOME.

        Raises:
            NullGpuError: neither is given, or the folder is inside the checkout.
        """
        named = given or os.environ.get(VARIABLE)
        if not named:
            raise NullGpuError(f"no folder for the null GPU: give one with --home or in {VARIABLE}")
        home = cls(Path(named))
        if home.folder.is_relative_to(CHECKOUT):
            raise NullGpuError(
                f"{home.folder} is inside the checkout: give a folder outside it, gigabytes of wheels go there"
            )
        return home

    def need(self) -> Home:
        """This folder, built.

        Raises:
            NullGpuError: it is not.
        """
        if not self.stub.is_file():
            raise NullGpuError(
                f"{self.folder} holds no null GPU: run python -m tests.nullgpu build --home {self.folder}"
            )
        return self

    def site_packages(self) -> Path | None:
        """The packages of its environment."""
        return next((self.folder / "venv" / "lib").glob("python3*/site-packages"), None)

    def environment(
        self, plan: Plan | None = None, *, capability: int = 90, devices: int = 1, gib: int = 140
    ) -> dict[str, str]:
        """Variables of a process that sees `devices` null GPUs with so much memory each; no rank of a launcher is set.

        The allocator keeps its default: expandable segments are what `l2v train` chooses where nothing is set.
        """
        inherited = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
        inherited |= {"DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", "PYTEST_CURRENT_TEST", "PYTHONPYCACHEPREFIX"}
        found = {key: value for key, value in os.environ.items() if key not in inherited}
        if plan is not None and plan.ignore_values:
            # Python drops assert statements, which compare values, and pytest does not write them out again.
            found |= {"PYTHONOPTIMIZE": "1", "PYTEST_ADDOPTS": "--assert=plain"}
        library = str(self.stub.parent)
        cache = self.folder / "cache"
        return found | {
            "LD_PRELOAD": str(self.stub),
            "LD_LIBRARY_PATH": library,
            "NULLGPU_CAPABILITY": str(capability),
            "NULLGPU_DEVICES": str(devices),
            "NULLGPU_GIB": str(gib),
            PLAN: json.dumps(asdict(plan or Plan())),
            VARIABLE: str(self.folder),
            "PYTHONPATH": os.pathsep.join(map(str, (SITE, CHECKOUT, CHECKOUT / "kernels"))),
            "PATH": os.pathsep.join([str(self.python.parent), found.get("PATH", "")]),
            "TRITON_LIBCUDA_PATH": library,
            "TRITON_CACHE_DIR": str(cache / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "TORCH_EXTENSIONS_DIR": str(cache / "extensions"),
            "L2V_CACHE": str(cache / "l2v"),
            "HF_DATASETS_CACHE": str(cache / "datasets"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
