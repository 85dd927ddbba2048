"""A program `l2v` for shell scripts under test: it runs in processes that are forked with all imports done."""

import json
import os
import socket
import sys
import threading
from pathlib import Path

from support import forked
from support.processes import free_port, training_environment

CLIENT = """#!{python} -IS
import json, os, socket, sys
channel = socket.socket(socket.AF_UNIX)
channel.connect({address!r})
asked = {{"arguments": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd()}}
channel.sendall(json.dumps(asked).encode())
channel.shutdown(socket.SHUT_WR)
with channel.makefile("rb") as answer:
    code, output = json.load(answer)
sys.stdout.write(output)
sys.exit(code)
"""


class Program:
    """`l2v` in the folder `self.path`. `l2v train` is the one rank of a launcher, which saves the launcher's twenty seconds."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        address = str(folder / "socket")
        program = folder / "l2v"
        program.write_text(CLIENT.format(python=sys.executable, address=address), encoding="utf-8")
        program.chmod(0o755)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of a script that calls the program."""
        environment = training_environment() | more
        return environment | {"PATH": f"{self.path}{os.pathsep}{os.environ['PATH']}", "PYTHONUTF8": "1"}

    def close(self) -> None:
        """No call is answered any more."""
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                channel, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._reply, args=(channel,), daemon=True).start()

    def _reply(self, channel: socket.socket) -> None:
        with channel, channel.makefile("rb") as question:
            channel.sendall(json.dumps(self._answer(json.load(question))).encode())

    def _answer(self, asked: dict) -> tuple[int, str]:
        environment = asked["env"]
        if asked["arguments"][0] == "train":
            environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
            environment["MASTER_PORT"] = str(free_port())
        process = forked.start(["-m", "l2v.commands.main", *asked["arguments"]], environment, Path(asked["cwd"]))
        output = process.communicate(timeout=300)[0]
        return process.returncode, output
