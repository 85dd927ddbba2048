"""Speed and memory of GPUs by name: measured where available, else the vendor's figures times an assumed efficiency."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from l2v.errors import UserError
from l2v.machine import calibration, device_name, peak_flops
from l2v.model.load import dtype_of
from l2v.recipe import Recipe

EFFICIENCY = 0.75
"""Share of the vendor's dense peak that large matmuls reach, without a measurement; an H200 reaches 0.80."""
COPY_EFFICIENCY = 0.88
"""Share of the vendor's bandwidth that a large copy reaches, without a measurement; an H200 reaches 0.90."""
LINK_EFFICIENCY = 0.8
"""Share of a link's bandwidth that a collective reaches. Always an assumption."""
CONTEXT_BYTES = int(0.7 * 2**30)
"""Bytes that CUDA, its libraries and NCCL allocate before the first tensor. An assumption."""
NETWORK = 50e9
"""Bytes per second between nodes: one port of 400 Gbit/s per node."""


@dataclass(frozen=True)
class Gpu:
    """Speed and memory of one device.

    memory: bytes that CUDA reports. flops: FLOP/s of matmuls by dtype. fp8: the same in FP8, None without FP8. copy: bytes
    read and written per second. link: bytes per second to the other GPUs of a node. network: the same from node to node. timed:
    whether its speed is predicted; otherwise only its memory is planned. multiprocessors: 0 on a CPU.
    """

    key: str
    memory: int
    flops: dict[torch.dtype, float]
    fp8: float | None
    copy: float
    link: float
    source: str
    measured: bool
    cpu: bool = False
    network: float = NETWORK
    timed: bool = True
    multiprocessors: int = 0

    def capacity(self, ranks_here: int) -> int:
        """Bytes for one rank: a GPU's memory, or a share of the machine's."""
        return self.memory // ranks_here if self.cpu else self.memory

    def shared(self, ranks_here: int) -> Gpu:
        """The device as one rank sees it: ranks on a CPU share its speed."""
        if not self.cpu or ranks_here == 1:
            return self
        flops = {dtype: rate / ranks_here for dtype, rate in self.flops.items()}
        return replace(self, flops=flops, copy=self.copy / ranks_here, link=self.link / ranks_here)


def _gib(value: float) -> int:
    return int(value * 2**30)


@dataclass(frozen=True)
class _Sheet:
    """A vendor's data sheet: CUDA's device name, multiprocessors, GiB, fp32 and fp8 FLOP/s, bytes per second of memory and links.

    timed: whether l2v's kernels are made for it, so that a speed can be predicted; otherwise it is planned for memory only.
    """

    name: str
    multiprocessors: int
    memory: float
    fp32: float
    fp8: float | None
    copy: float
    link: float
    timed: bool = True


# Dense bf16 peaks are in l2v.machine. Sources: NVIDIA's data sheets of A10, A100, H100, H200, L4, L40S, HGX B200 and GB200
# NVL72 (per GPU; half of a figure "with sparsity"); the architecture papers of GA102, Ada and RTX Blackwell for the GeForce
# boards (tensor rates with fp32 accumulation); for H20, which has no public sheet, the figures that its resellers print; AMD's
# Instinct MI300X data sheet. Memory is what CUDA reports, which is less than printed; where boards differ, the lower value.
# fp32 is without TF32, torch's default. Links are one-way: NVLink for SXM boards and GB200, Infinity Fabric for MI300X,
# PCIe x16 for the others (4.0; RTX 5090: 5.0), also where two RTX 3090 could have a bridge.
PCIE4, PCIE5 = 32e9, 64e9
SHEETS = {
    "h200": _Sheet("NVIDIA H200", 132, 139.8, 67e12, 1979e12, 4.8e12, 450e9),
    "h100": _Sheet("NVIDIA H100 80GB HBM3", 132, 79.1, 67e12, 1979e12, 3.35e12, 450e9),
    "h20": _Sheet("NVIDIA H20", 78, 95.0, 44e12, 296e12, 4.0e12, 450e9),
    "a100": _Sheet("NVIDIA A100-SXM4-80GB", 108, 79.1, 19.5e12, None, 2.04e12, 300e9),
    "a100-40gb": _Sheet("NVIDIA A100-SXM4-40GB", 108, 39.3, 19.5e12, None, 1.555e12, 300e9),
    "b200": _Sheet("NVIDIA B200", 148, 178.4, 75e12, 4500e12, 8e12, 900e9),
    "gb200": _Sheet("NVIDIA GB200", 152, 184.0, 80e12, 5000e12, 8e12, 900e9),
    "l40s": _Sheet("NVIDIA L40S", 142, 44.4, 91.6e12, 733e12, 0.864e12, PCIE4),
    "l4": _Sheet("NVIDIA L4", 58, 22.0, 30.3e12, 242e12, 0.3e12, PCIE4),
    "a10": _Sheet("NVIDIA A10", 72, 22.0, 31.2e12, None, 0.6e12, PCIE4),
    "rtx3090": _Sheet("NVIDIA GeForce RTX 3090", 82, 23.5, 35.6e12, None, 0.936e12, PCIE4),
    "rtx4090": _Sheet("NVIDIA GeForce RTX 4090", 128, 23.5, 82.6e12, 330e12, 1.008e12, PCIE4),
    "rtx5090": _Sheet("NVIDIA GeForce RTX 5090", 170, 31.3, 104.8e12, 419e12, 1.792e12, PCIE5),
    "mi300x": _Sheet("AMD Instinct MI300X", 304, 191.5, 163.4e12, 2614.9e12, 5.3e12, 64e9, timed=False),
}
ALIASES = {"a100-80gb": "a100", "a100-sxm4-80gb": "a100", "a100-sxm4-40gb": "a100-40gb", "mi300": "mi300x"}
MEASURED = {"h200": (788e12, 4.3e12)}
"""Measured bf16 FLOP/s on random numbers, and bytes/s of a copy, with torch 2.11."""
MEMORY_ONLY = "planned for memory only: l2v's speed on it is not predicted"


def named(key: str) -> Gpu:
    """A GPU of the table.

    Raises:
        UserError: the table does not have it; the message lists the names.
    """
    known = {_plain(name): name for name in SHEETS} | {_plain(name): to for name, to in ALIASES.items()}
    if _plain(key) not in known:
        raise UserError(
            f"--gpu {key} is not known; choose one of {', '.join(SHEETS)}, or here for the device of this machine; for "
            "another GPU, --gpu-memory GIB plans the memory"
        )
    short = known[_plain(key)]
    sheet = SHEETS[short]
    peak = peak_flops(sheet.name, torch.bfloat16)
    assert peak is not None  # l2v.machine knows every device of SHEETS
    bf16, copy = EFFICIENCY * peak, COPY_EFFICIENCY * sheet.copy
    source = f"the vendor's figures times {EFFICIENCY} (matmuls) and {COPY_EFFICIENCY} (copies), not measured"
    if short in MEASURED:
        bf16, copy = MEASURED[short]
        source = "measured: matmuls in bf16 and copies; fp32 and fp8 are the vendor's figures times 0.75"
    flops = {torch.bfloat16: bf16, torch.float32: EFFICIENCY * sheet.fp32}
    fp8 = sheet.fp8 and EFFICIENCY * sheet.fp8
    return Gpu(
        short, _gib(sheet.memory), flops, fp8, copy, LINK_EFFICIENCY * sheet.link, source if sheet.timed else MEMORY_ONLY,
        short in MEASURED, timed=sheet.timed, multiprocessors=sheet.multiprocessors,
    )  # fmt: skip


def unnamed(gib: float) -> Gpu:
    """A GPU of which only the memory is known. Its rates are an H200's and are not shown."""
    return replace(named("h200"), key="gpu", memory=_gib(gib), source=MEMORY_ONLY, measured=False, timed=False)


def _plain(key: str) -> str:
    plain = "".join(letter for letter in key.lower() if letter.isalnum())
    for maker in ("nvidia", "geforce", "amd", "instinct"):
        plain = plain.removeprefix(maker)
    return plain


def at_hand(dtype: torch.dtype) -> Gpu:
    """The device of this machine, with its calibration if there is one.

    Raises:
        UserError: a GPU that is neither in the table nor calibrated, or a CPU that is not calibrated.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    found, name = calibration(device, dtype), device_name(device)
    known = next((key for key, sheet in SHEETS.items() if sheet.name == name), None)
    if found is None and known is None:
        raise UserError(f"the speed of {name} is not known: run l2v doctor once, or name another device with --gpu")
    if device.type == "cpu":
        assert found is not None  # no processor is in SHEETS
        import psutil

        total = psutil.virtual_memory().total
        rates = {dtype: found.gemm_flops}
        return Gpu(
            "cpu",
            total,
            rates,
            None,
            found.copy_bytes,
            found.copy_bytes / 4,
            f"calibrated {found.when[:10]}",
            True,
            True,
        )
    properties = torch.cuda.get_device_properties(device)
    total = properties.total_memory
    gpu = named(known) if known else Gpu(name, total, {}, None, 0.0, LINK_EFFICIENCY * 32e9, "", True)
    gpu = replace(gpu, multiprocessors=properties.multi_processor_count)
    if found is None:
        return replace(gpu, memory=total)
    flops = gpu.flops | {dtype: found.gemm_flops}
    source = f"calibrated on this machine {found.when[:10]}"
    return replace(gpu, memory=total, flops=flops, copy=found.copy_bytes, source=source, measured=True)


def chosen(key: str | None, dtype: torch.dtype) -> Gpu:
    """The device of --gpu: a name, or `here` (also the default) for the device of this machine.

    If the named GPU is the one of this machine, its calibration is used.
    """
    if key in (None, "here"):
        return at_hand(dtype)
    gpu = named(key)
    if torch.cuda.is_available():
        here = torch.cuda.get_device_name(torch.cuda.current_device())
        if here == SHEETS[gpu.key].name and calibration(torch.device("cuda", torch.cuda.current_device()), dtype):
            return at_hand(dtype)
    return gpu


def device_and_dtype(key: str | None, recipe: Recipe, gib: float | None = None) -> tuple[Gpu, torch.dtype]:
    """The device to plan for, and the dtype that training would use on it.

    gib: the memory of a GPU instead of that of the table; without a name, of a GPU of which nothing else is known.
    """
    is_named = key not in (None, "here")
    dtype = dtype_of(recipe.base.precision, named_gpu=is_named or (key is None and gib is not None))
    if gib is None:
        return chosen(key, dtype), dtype
    gpu = chosen(key, dtype) if key is not None else unnamed(gib)
    return replace(gpu, memory=_gib(gib)), dtype
