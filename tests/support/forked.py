"""Processes that start at once: forked from a server that has loaded torch, transformers and DeepSpeed before.

A rank that starts as `python -m l2v.train` spends most of a short test on imports. `start` gives a process with the same
arguments, environment, folder and output, which runs its module as `__main__`, forked from one server for each environment of
imports. Where forking is not safe (a GPU that is not hidden, no Linux) it starts an interpreter instead.
"""

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

AT_IMPORT = ("OMP_NUM_THREADS", "DS_ACCELERATOR", "TRITON_INTERPRET", "HF_DATASETS_CACHE", "LD_PRELOAD")
"""Variables that are read while modules load: a server serves one set of values."""
TRAINING = (
    "l2v.train", "l2v.training.stage", "deepspeed", "deepspeed.ops.op_builder.all_ops",
    "transformers.models.llama.modeling_llama", "deepspeed.module_inject.auto_ep_layer",
    "peft.utils.transformers_weight_conversion", "torch._dynamo.testing", "torch._inductor.compile_fx",
    "torch.utils.tensorboard",
)  # fmt: skip
KERNELS = ("torch", "triton.language", "torch.testing", "pytest", "hypothesis.strategies")
_servers: dict[tuple, "Server"] = {}


def start(
    arguments: Sequence[str], env: dict[str, str], cwd: Path | None = None, preload: Sequence[str] = TRAINING,
    errors: TextIO | None = None,
):  # fmt: skip
    """A process like `python *arguments`, its output piped to .stdout.

    arguments: "-m", a module and its arguments, or a script and its arguments. errors: a file for its standard error; without
    one it goes where the output goes.
    Returns a Process, or a subprocess.Popen where forking is not safe; both have pid, poll, wait, communicate, send_signal
    and kill.
    """
    if not sys.platform.startswith("linux") or env.get("CUDA_VISIBLE_DEVICES") != "":
        return subprocess.Popen(
            [sys.executable, *arguments], env=env, cwd=cwd, text=True, stdout=subprocess.PIPE,
            stderr=errors or subprocess.STDOUT,
        )  # fmt: skip
    key = (*preload, *(env.get(name) for name in AT_IMPORT))
    if key not in _servers:
        _servers[key] = Server(preload, env)
    return _servers[key].start(arguments, env, cwd, errors)


def output_of(arguments: Sequence[str], env: dict[str, str], preload: Sequence[str] = TRAINING) -> str:
    """The standard output of a process that ends with exit code 0. Raises: AssertionError with both streams."""
    with tempfile.TemporaryFile("w+") as errors:
        process = start(arguments, env, preload=preload, errors=errors)
        said = process.communicate()[0]
        errors.seek(0)
        assert process.returncode == 0, said + errors.read()
    return said


class Server:
    """The side of the tests: one process that has loaded the modules and forks when asked."""

    def __init__(self, preload: Sequence[str], env: dict[str, str]) -> None:
        own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, __file__, str(other.fileno()), *preload]
        self.process = subprocess.Popen(command, env=env, pass_fds=[other.fileno()])
        other.close()
        self.socket = own
        atexit.register(self.close)

    def start(
        self, arguments: Sequence[str], env: dict[str, str], cwd: Path | None, errors: TextIO | None
    ) -> "Process":
        output, output_end = os.pipe()
        status, status_end = os.pipe()
        asked = {"arguments": list(arguments), "env": env, "cwd": str(cwd or Path.cwd())}
        try:
            socket.send_fds(
                self.socket,
                [json.dumps(asked).encode()],
                [output_end, errors.fileno() if errors else output_end, status_end],
            )
        finally:
            os.close(output_end)
            os.close(status_end)
        pid = int(self.socket.recv(64) or 0)
        assert pid, "the server of forked processes has ended"
        return Process(pid, output, status)

    def close(self) -> None:
        self.socket.close()  # at which it ends, and what it has started
        self.process.wait(timeout=30)


class Process:
    """A forked process, with what the tests use of subprocess.Popen."""

    def __init__(self, pid: int, output: int, status: int) -> None:
        self.pid, self.returncode = pid, None
        self.stdout = open(output, encoding="utf-8", errors="replace")  # noqa: SIM115 (closed by communicate)
        self._status, self._said = status, b""

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._wait(0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises: subprocess.TimeoutExpired."""
        if self._wait(timeout) is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """What it said until its output was closed, and None. Raises: subprocess.TimeoutExpired; call again to continue."""
        end = None if timeout is None else time.monotonic() + timeout
        while not self.stdout.closed:
            left = None if end is None else max(0.0, end - time.monotonic())
            if not select.select([self.stdout], [], [], left)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout, self._said)
            if piece := os.read(self.stdout.fileno(), 1 << 16):
                self._said += piece
            else:
                self.stdout.close()
        self.wait(None if end is None else max(0.0, end - time.monotonic()))
        return self._said.decode("utf-8", "replace"), None

    def send_signal(self, number: int) -> None:
        """Nothing once it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            said = os.read(self._status, 16)
            os.close(self._status)
            self.returncode = int(said) if said else -signal.SIGKILL  # the server itself is gone
        return self.returncode


def serve(channel: socket.socket) -> dict | None:
    """The side of the server: fork for every message. Returns the message in a child, None once the tests have ended."""
    running: dict[int, tuple[int, int]] = {}  # pidfd to pid and the pipe for its exit code
    while True:
        ready, _, _ = select.select([channel, *running], [], [])
        for pidfd in set(ready) - {channel}:
            pid, status = running.pop(pidfd)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.write(status, str(code).encode())
            os.close(status)
            os.close(pidfd)
        if channel not in ready:
            continue
        message, fds, _, _ = socket.recv_fds(channel, 1 << 20, 3)
        if not message:
            for pid, _ in running.values():
                os.kill(pid, signal.SIGKILL)
            return None
        output, errors, status = fds
        pid = os.fork()
        if pid == 0:
            channel.close()
            for fd in (status, *running, *(pipe for _, pipe in running.values())):
                os.close(fd)
            os.dup2(output, 1)
            os.dup2(errors, 2)
            os.close(output)
            os.close(errors)
            return json.loads(message)
        os.close(output)
        os.close(errors)
        running[os.pidfd_open(pid)] = (pid, status)
        channel.send(str(pid).encode())


def become(asked: dict) -> None:
    """Run what was asked for as the main module of this process, and end it.

    What runs at exit runs; taking down the loaded modules, seconds of a short test, is left to the system.
    """
    import atexit
    import threading

    code = 1
    try:
        run(asked)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(asked: dict) -> None:
    """As `python *arguments` in that environment and folder."""
    import runpy
    import warnings

    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    sys.path[1:1] = [x for x in asked["env"].get("PYTHONPATH", "").split(os.pathsep) if x and x not in sys.path]
    first, *rest = asked["arguments"]
    if first == "-m":
        name, *rest = rest
        sys.argv, sys.path[0] = [name, *rest], asked["cwd"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # that the module has been loaded before
            runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [first, *rest], str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


def others() -> list[str]:
    """Names of threads that a fork would lose; jemalloc's own (pyarrow brings it) starts again in the child."""
    names = (Path(f"/proc/self/task/{thread}/comm").read_text().strip() for thread in os.listdir("/proc/self/task"))
    return [name for name in names if not name.startswith("jemalloc")][1:]


if __name__ == "__main__":
    import gc
    import importlib

    _channel = socket.socket(fileno=int(sys.argv[1]))
    for _name in sys.argv[2:]:
        importlib.import_module(_name)
    if _lost := others():
        sys.exit(f"threads beside the main one after loading {sys.argv[2:]}, so that forking is not safe: {_lost}")
    gc.freeze()
    _asked = serve(_channel)
    if _asked is not None:
        become(_asked)
