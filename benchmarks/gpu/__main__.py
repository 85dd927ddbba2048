"""The command behind benchmarks/gpu.sh.

python -m benchmarks.gpu [FOLDER] [PART...]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.keep import Results
from benchmarks.gpu.plan import LOG, SECONDS, cores, parts, steps, work_folder
from benchmarks.gpu.run import ROOT, run

PROBE = (
    "import importlib.util, json, torch; "
    "print(json.dumps({'gpu': torch.cuda.is_available(), 'xdist': importlib.util.find_spec('xdist') is not None}))"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what earlier calls with the same folder left; exit code 0 once every step is done."""
    began = time.monotonic()
    options = parser().parse_args(argv)
    options.work = options.work.resolve()  # steps run in another folder
    environment = _environment(options.work)
    signal.signal(signal.SIGTERM, _interrupt)
    named = {"--llm2vec": os.environ.get("LLM2VEC"), "--nemo": os.environ.get("NEMO")}
    peers = [word for option, path in named.items() if path for word in (option, path)]
    plan = steps(cores(), **_probe(environment), peers=peers)
    if unknown := set(options.parts) - set(parts(plan)):
        print(f"gpu.sh: no part {', '.join(sorted(unknown))}; choose of {', '.join(parts(plan))}", file=sys.stderr)
        return 2
    plan = [step for step in plan if not options.parts or step.part in options.parts]
    if options.cache:
        unpack(options.cache, Path(environment["TRITON_CACHE_DIR"]))
    results = Results(options.folder, options.earlier)
    results.log(f"\n== {time.strftime('%Y-%m-%d %H:%M:%S')}: {' '.join(parts(plan))}\n")
    try:
        code = run(plan, results, options.work, options.minutes * 60 - (time.monotonic() - began), environment)
    except KeyboardInterrupt:
        print("gpu.sh: stopped; the same command continues", file=sys.stderr)
        return 130
    left = [step.name for step in plan if results.of(step.name).get("state") != "done"]
    print(f"gpu.sh: results in {options.folder}; " + (f"not done: {' '.join(left)}" if left else "all done"))
    return code


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    p = argparse.ArgumentParser(
        prog="benchmarks/gpu.sh", description="GPU tests and benchmarks in nine minutes, the most important first. The same "
        "command continues what is left.",
    )  # fmt: skip
    given = os.environ.get("OUT") or ROOT / "benchmarks" / "results" / "latest"
    p.add_argument(
        "folder", nargs="?", type=Path, metavar="FOLDER", default=Path(given),
        help=f"of the results, a JSON a part and {LOG} (default: $OUT, or benchmarks/results/latest)",
    )  # fmt: skip
    p.add_argument("parts", nargs="*", metavar="PART", help=f"only these parts: {', '.join(parts(steps()))}")
    p.add_argument("--minutes", type=float, default=SECONDS / 60, help="for everything (default: %(default).1f)")
    p.add_argument("--earlier", type=Path, metavar="FOLDER", help="results of an earlier call, to continue from")
    p.add_argument(
        "--work", type=Path, metavar="FOLDER", default=Path(os.environ.get("WORK") or work_folder()),
        help="of weights and compiled kernels, which a next call finds (default: $WORK, or %(default)s)",
    )  # fmt: skip
    p.add_argument(
        "--cache", type=Path, metavar="FILE", help="a tar file of compiled kernels (a folder of Triton's cache)"
    )
    return p


def unpack(file: Path, folder: Path) -> None:
    """Put compiled kernels where Triton looks for them; a file that cannot be read only costs the time to compile."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(file) as archive:
            archive.extractall(folder, filter="data")
    except (OSError, tarfile.TarError) as error:
        print(f"gpu.sh: no kernels from {file}: {error}", file=sys.stderr)


def _environment(work: Path) -> dict[str, str]:
    """Of every step."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH")))
    )
    environment["TRITON_CACHE_DIR"] = os.environ.get("TRITON_CACHE_DIR") or str(work / "triton")
    return environment | {"PYTHON": sys.executable, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


def _probe(environment: dict[str, str]) -> dict[str, bool]:
    """Whether torch finds a GPU, and pytest-xdist is installed. In a process of its own, so that this one holds no device."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, timeout=60, check=True
        )
        return json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        print(
            f"gpu.sh: torch cannot be asked for a GPU ({type(error).__name__}); the plan is that of one",
            file=sys.stderr,
        )
        return {"gpu": True, "xdist": False}


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
