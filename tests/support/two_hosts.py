"""Two hosts on one machine: an sshd on each of two loopback addresses, with keys and configuration of their own.

`node-a` is 127.0.0.2 and `node-b` 127.0.0.3. They share this machine's files, as nodes of a cluster share a file system.
OpenSSH reads no other configuration than the user's, so an `ssh` stands first on the path that names ours.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.processes import free_port

HOSTS = {"node-a": "127.0.0.2", "node-b": "127.0.0.3"}
SSHD = shutil.which("sshd", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))


def missing() -> str | None:
    """What this machine lacks for two hosts, for a skipped test to name; None where nothing is lacking."""
    found = {
        "sshd": SSHD,
        "ssh": shutil.which("ssh"),
        "ssh-keygen": shutil.which("ssh-keygen"),
        "pdsh": shutil.which("pdsh"),
    }
    lacking = [name for name, path in found.items() if path is None]
    return f"{', '.join(lacking)} not installed (apt-get install openssh-server pdsh)" if lacking else None


@contextmanager
def two_hosts(folder: Path) -> Iterator[Path]:
    """Start both; yields a folder to put first on PATH. Both are stopped, with what runs under them, at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd's own, where it may separate privileges
    client, servers = [], []
    try:
        for host, address in HOSTS.items():
            port = free_port()
            server = folder / f"{host}.sshd"
            server.write_text(
                f"ListenAddress {address}\nPort {port}\nHostKey {folder / 'host'}\nAuthorizedKeysFile {folder / 'authorized'}\n"
                f"PidFile {folder / host}.pid\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPrintMotd no\n"
                "KbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\nMaxStartups 100\n"
            )
            client.append(f"Host {host}\n  HostName {address}\n  Port {port}\n")
            log = (folder / f"{host}.log").open("w")
            servers.append(subprocess.Popen([SSHD, "-D", "-e", "-f", str(server)], stderr=log))
        client.append(
            f"Host *\n  IdentityFile {folder / 'user'}\n  IdentitiesOnly yes\n  BatchMode yes\n  LogLevel ERROR\n"
            "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n"
        )
        (folder / "config").write_text("".join(client))
        path = folder / "bin"
        path.mkdir()
        wrapper = path / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder / "config"} "$@"\n')
        wrapper.chmod(0o755)
        for host in HOSTS:
            _wait_for(path, host, folder / f"{host}.log")
        yield path
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait(timeout=10)


def _wait_for(path: Path, host: str, log: Path) -> None:
    for _ in range(50):
        done = subprocess.run([path / "ssh", host, "true"], capture_output=True, text=True, timeout=20)
        if done.returncode == 0:
            return
        time.sleep(0.1)
    raise RuntimeError(f"{host} cannot be reached: {done.stderr}\n{log.read_text()}")
