"""The configuration of a launch: the default, or with L2V_AUTOTUNE=1 the fastest of several, cached on disk."""

import functools
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from l2v_kernels.attention.config import Config, Kind, candidates, default, is_medium, is_short
from l2v_kernels.launching import architecture


def choose(
    kind: Kind,
    q_THD: torch.Tensor,
    n_segments: int,
    group: int,
    variant: str,
    tma: bool,
    launch: Callable[[Config], None],
) -> Config:
    """The configuration to launch with, from what the host knows: without a sync with the device.

    Args:
        kind: which kernel.
        q_THD: queries [T, H, D]; gives lengths, head dimension, dtype and device.
        n_segments: S.
        group: how many query heads share a tile.
        variant: names what else is compiled in, "plain" for nothing.
        tma: whether tensor descriptors can describe the kernel's tensors.
        launch: runs the kernel once; may be called any number of times.
    """
    T, _, D = q_THD.shape
    mean = T / max(n_segments, 1)
    arch = architecture(*_capability(q_THD.device)) if q_THD.device.type == "cuda" else 80
    short, plain, tma = is_short(mean, group), variant == "plain", tma and arch >= 90
    both = {"window", "dropout"} <= set(variant.split())
    fallback = default(kind, arch, D, q_THD.element_size(), short, plain, tma, group, is_medium(mean), both)
    if os.environ.get("L2V_AUTOTUNE") != "1":
        return fallback
    # Lengths are rounded to powers of two; otherwise nearly every batch would start a search.
    key = f"{kind} {q_THD.dtype} D{D} group{group} {variant} mean{2 ** max(0, round(mean) - 1).bit_length()}{' tma' * tma}"
    cache = Cache.of(q_THD.device)
    if key not in cache.known:
        best = fastest(candidates(kind, arch, D, q_THD.element_size(), plain, tma), launch)
        cache.add(key, best or fallback)
    return cache.known[key]


def fastest(configs: list[Config], launch: Callable[[Config], None], time: Callable | None = None) -> Config | None:
    """The configuration of the least median time; None if none runs. Those that do not fit the device are skipped."""
    time = time or (lambda call: triton.testing.do_bench(call, warmup=5, rep=20, return_mode="median"))
    best = None
    for config in configs:
        try:
            took = time(functools.partial(launch, config))
        except (triton.runtime.errors.OutOfResources, triton.compiler.CompilationError, RuntimeError):
            continue
        if best is None or took < best[0]:
            best = (took, config)
    return best and best[1]


class Cache:
    """Configurations found on one device with one version of Triton and of the kernels: one JSON file."""

    def __init__(self, path: Path) -> None:
        self.path, self.known = path, {}
        try:
            self.known = {key: Config(**value) for key, value in json.loads(path.read_text()).items()}
        except (OSError, ValueError, TypeError, AttributeError):
            # No file yet, or one of another format: search from scratch.
            self.known = {}

    @classmethod
    def of(cls, device: torch.device) -> "Cache":
        """The cache of a device, under L2V_CACHE, or l2v/ in the user's cache folder."""
        folder = Path(
            os.environ.get("L2V_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "l2v"
        )
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        name = re.sub(r"\W+", "-", f"{name} triton {triton.__version__} torch {torch.__version__} {_source()}")
        return _cache(folder / "attention" / f"{name}.json")

    def add(self, key: str, config: Config) -> None:
        """Stores a configuration and writes the file, which is replaced atomically, so that ranks may write at once."""
        self.known[key] = config
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({key: vars(value) for key, value in self.known.items()}, indent=1)
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        partial.write_text(text, encoding="utf-8")  # unlike a file of tempfile, readable for others by the umask
        os.replace(partial, self.path)


_cache = functools.cache(Cache)


@functools.cache
def _capability(device):
    return torch.cuda.get_device_capability(device)


@functools.cache
def _source():
    """Hash of the kernels' source: another source is another cache."""
    files = sorted(Path(__file__).parent.glob("kernel_*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
