"""The software checks of `l2v doctor`: packages, kernels, backends, folders. A check returns the rows of a section.

Imports are inside the functions, so that a missing or broken package becomes a line of the report.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import os
import pkgutil
import platform
import shutil
import tempfile
import threading
from pathlib import Path

from l2v.doctor.report import Report, Rows, first_line

REQUIRED = ("torch", "transformers", "peft", "datasets", "safetensors", "accelerate", "deepspeed")
OPTIONAL = ("flash-attn", "liger-kernel", "bitsandbytes", "sentence-transformers", "mteb", "wandb")
FP8_CAPABILITY = (8, 9)
HUB_SECONDS = 4.0  # for the hub to answer


def versions(report: Report) -> Rows:
    """Versions of packages. Those that training needs are also imported, because an installed package may be broken."""
    rows: Rows = {"python": platform.python_version()}
    needs = requirements()
    for name in (*REQUIRED, "triton"):
        version, wanted = _version(name), needs.get(name, "")
        if version is None:
            rows[name] = (False, "not installed")
            if name != "triton":  # the PyTorch references replace its kernels
                report.problems.append(f"{name} is not installed: pip install '{name}{wanted}'")
        elif error := import_error(name):
            rows[name] = (False, f"{version}, broken")
            report.problems.append(f"{name} {version} cannot be imported: {error}")
        else:
            rows[name] = f"{version} ({_cuda()})" if name == "torch" else version
            if not _satisfies(version, wanted):
                report.problems.append(f"{name} is {version} and l2v needs {wanted}: pip install '{name}{wanted}'")
    for name in OPTIONAL:
        rows[name] = _version(name) or (False, "not installed, optional")
    return rows


def requirements() -> dict[str, str]:
    """The versions that l2v's metadata require, as `>=5.17,<6`; empty in a bare checkout."""
    with contextlib.suppress(ImportError, importlib.metadata.PackageNotFoundError):
        from packaging.requirements import Requirement

        found = map(Requirement, importlib.metadata.requires("l2v") or ())
        return {each.name: str(each.specifier) for each in found if not each.marker or each.marker.evaluate()}
    return {}


def import_error(module: str) -> str | None:
    """Why a module cannot be imported; None if it can. What it prints while importing is discarded."""
    if module == "deepspeed" and not _cuda_works():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            importlib.import_module(module)
    except Exception as error:
        return first_line(error)
    return None


def kernels(report: Report) -> Rows:
    """For every op of the kernel library, whether its Triton kernels run here, or why not."""
    import l2v_kernels
    from l2v_kernels.dispatch import has_triton

    broken = None
    if not has_triton():
        why = "PyTorch reference: Triton is not installed"
        if _cuda_works():
            report.notes.append("Triton is not installed, so a GPU runs the slow references: pip install triton")
    elif not _cuda_works():
        why = "PyTorch reference: Triton needs a GPU"
    else:
        why, broken = "", triton_error()
        if broken:
            report.problems.append(f"Triton's kernels do not run here: {broken}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        report.notes.append("TRITON_INTERPRET=1 is set: kernels run in an interpreter, thousands of times slower")
    rows: Rows = {}
    for op in ops(l2v_kernels.__path__):
        error = broken
        if has_triton() and not error:
            error = next(filter(None, (import_error(name) for name in kernel_modules(op))), None)
            if error:
                report.problems.append(f"the kernels of {op} cannot be imported: {error}")
        rows[op] = (False, f"broken: {error}") if error else (not why, why or "Triton")
    return rows


def ops(path) -> list[str]:
    """The ops of the kernel library: its packages that hold kernels."""
    return [m.name for m in pkgutil.iter_modules(path) if m.ispkg and kernel_modules(m.name)]


def kernel_modules(op: str) -> list[str]:
    """The modules of an op that define Triton kernels."""
    spec = importlib.util.find_spec(f"l2v_kernels.{op}")
    if spec is None or spec.origin is None:
        return []
    folder = Path(spec.origin).parent
    return [f"l2v_kernels.{op}.{file.stem}" for file in sorted(folder.glob("kernel*.py"))]


def triton_error() -> str | None:
    """Compile and run a small kernel and compare it with its reference; None if it works. Triton needs a C compiler."""
    import torch

    from l2v.machine import on_null_gpu
    from l2v_kernels import dropout

    x_TE = torch.linspace(1, 2, 256 * 24).view(256, 24)
    seeds_T, rows_T = torch.arange(256), torch.arange(256)
    try:
        got_TE = dropout(x_TE.cuda(), 0.5, seeds_T.cuda(), rows_T.cuda(), 1).cpu()
    except Exception as error:
        return f"{first_line(error)} (Triton needs a C compiler and Python's header files, for example python3-dev)"
    same = on_null_gpu() or torch.allclose(got_TE, dropout(x_TE, 0.5, seeds_T, rows_T, 1), rtol=1e-5)
    return None if same else "dropout differs from its reference"


def backends(report: Report) -> Rows:
    """The backends and precisions of a recipe: whether each runs here, and what it needs."""
    import torch

    gpu = _cuda_works()
    capability = torch.cuda.get_device_capability() if gpu else None
    have = f"this GPU has {capability[0]}.{capability[1]}" if capability else "there is no GPU"
    rows: Rows = {
        "backend: l2v": (True, "packed, counter-based dropout" + ("" if gpu else "; with its PyTorch reference")),
        "backend: sdpa": (True, "slow: its mask grows with the square of the batch's tokens"),
    }
    if capability is None or capability < (8, 0):
        rows["backend: flash_attention_2"] = (False, f"needs a GPU of compute capability 8.0, and {have}")
    elif _version("flash-attn") is None:
        rows["backend: flash_attention_2"] = (False, "needs the package flash-attn: pip install 'l2v[flash-attn]'")
    else:
        error = import_error("flash_attn")
        rows["backend: flash_attention_2"] = (False, f"broken: {error}") if error else (True, "no attention dropout")
    from l2v.model.load import AUTO_PRECISION, cpu_multiplies_bf16, dtype_of

    auto = f"auto is {str(dtype_of('auto')).removeprefix('torch.')}"
    auto += " in training"
    auto += f" (by {AUTO_PRECISION})" if AUTO_PRECISION in os.environ else ""
    in_hardware = capability >= (8, 0) if capability else cpu_multiplies_bf16()
    rows["precision: bf16"] = (in_hardware, ("" if in_hardware else "slow, not in hardware; ") + auto)
    fp8 = capability is not None and capability >= FP8_CAPABILITY
    rows["base_precision: fp8"] = (fp8, "" if fp8 else f"needs a GPU of compute capability 8.9, and {have}")
    if _version("bitsandbytes") is None:
        rows["base_precision: nf4"] = (False, "needs the package bitsandbytes: pip install 'l2v[nf4]'")
    else:
        error = import_error("bitsandbytes")
        rows["base_precision: nf4"] = (
            (False, f"broken: {error}") if error else (True, "plain layers" if gpu else "slow")
        )
    between = "nccl" if gpu else "gloo"
    available = torch.distributed.is_available() and getattr(torch.distributed, f"is_{between}_available")()
    rows["between ranks"] = (available, between)
    if not available:
        report.problems.append(
            f"this build of torch has no {between}, which ranks need to communicate: install another"
        )
    return rows


def files(report: Report) -> Rows:
    """Folders that l2v writes to, the embedded base and the hub."""
    from l2v.model.embedded import EMBEDDED, cache_folder, state

    rows: Rows = {"cache": _writable(cache_folder())}
    if not rows["cache"][0]:
        report.notes.append(
            f"the cache folder {cache_folder()} cannot be written: set L2V_CACHE to one that can, for the embedded base and "
            "the calibration"
        )
    rows |= {f"embedded base {name}": state(name) for name in EMBEDDED}
    if import_error("datasets") is None:
        from datasets import config

        rows["data cache"] = _writable(Path(config.HF_DATASETS_CACHE))
        if not rows["data cache"][0]:
            report.problems.append(
                f"the cache for tokenised data, {config.HF_DATASETS_CACHE}, cannot be written: set HF_DATASETS_CACHE"
            )
    if import_error("huggingface_hub") is None:
        from huggingface_hub import constants, get_token

        rows["hub"] = hub(report)
        rows["hub token"] = (get_token() is not None, "gated bases such as Llama 3 need one")
        rows["hub cache"] = constants.HF_HUB_CACHE
    here = Path.cwd()
    rows["this folder"] = _writable(here)
    rows["free disk"] = f"{shutil.disk_usage(here).free / 2**30:.1f} GiB"
    return rows


def hub(report: Report) -> tuple[bool, str]:
    """Whether the hub answers, which is tried and not assumed; with HF_HUB_OFFLINE nothing is sent."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        switch = next((k for k in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(k)), "HF_HUB_OFFLINE")
        return False, f"offline by {switch}={os.environ.get(switch, 1)}: only what is in its cache is used"
    if trouble := hub_trouble(constants.ENDPOINT, HUB_SECONDS):
        report.notes.append(
            f"the hub, {constants.ENDPOINT}, cannot be reached: {trouble}; only what is in its cache can be used, and "
            "HF_HUB_OFFLINE=1 spares the waiting (docs/deployment.md: nodes without internet)"
        )
        return False, f"{constants.ENDPOINT} cannot be reached: {trouble}"
    return True, f"{constants.ENDPOINT} answers"


def hub_trouble(endpoint: str, seconds: float) -> str | None:
    """Why an endpoint does not answer within `seconds`; None if it does. Any answer below 500 counts, also "not found"."""
    from huggingface_hub import get_session

    found = [f"no answer within {seconds:g} seconds"]

    def ask() -> None:
        try:
            status = get_session().head(endpoint, timeout=seconds).status_code
            found.append(f"it answers with status {status}" if status >= 500 else "")
        except Exception as error:  # of several libraries: names, certificates, proxies
            found.append(first_line(error))

    # In a thread, because looking up a name is not bound by the timeout of the request.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds + 1)
    return found[-1] or None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _satisfies(version: str, wanted: str) -> bool:
    if not wanted:
        return True
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)


def _cuda() -> str:
    import torch

    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"


def _cuda_works() -> bool:
    try:
        import torch

        return torch.cuda.is_available()
    except Exception:
        return False


def _writable(folder: Path) -> tuple[bool, str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return False, f"{folder}: cannot be written: {error.strerror}"
    return True, str(folder)
