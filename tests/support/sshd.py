"""Hosts for tests: real sshds on this machine, each on a port of its own, by names that one ssh configuration knows."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
_START_S = 60.0
_TRIES = 5

SSHD_CONFIG = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PidFile none
MaxStartups 100
SetEnv HOME={home} PATH={path} LANG=C.UTF-8
"""
HOST_CONFIG = """\
Host {name}
    HostName 127.0.0.1
    Port {port}
"""
USER_CONFIG = """\
Host *
    IdentityFile {folder}/user_key
    IdentitiesOnly yes
    IdentityAgent none
    UserKnownHostsFile {folder}/known_hosts
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
"""


@dataclass
class SshHost:
    """One of them."""

    name: str
    port: int
    home: Path
    folder: Path
    process: subprocess.Popen[bytes]

    def set_path(self, path: str) -> None:
        """Logins from now on have this PATH."""
        config = self.folder / "sshd_config"
        lines = [line for line in config.read_text().splitlines() if not line.startswith("SetEnv")]
        config.write_text("\n".join([*lines, f"SetEnv HOME={self.home} PATH={path} LANG=C.UTF-8"]) + "\n")
        self.end()
        self.process = _serve(self.folder, self.port)

    def end(self) -> None:
        """No login is possible any more; those that there are stay."""
        self.process.terminate()
        self.process.wait()


@dataclass
class SshHosts:
    """All of them. ``config``: for ``ssh -F``."""

    folder: Path
    hosts: dict[str, SshHost]

    @property
    def config(self) -> Path:
        """The user's configuration."""
        return self.folder / "ssh_config"

    def write_config(self, *further: str) -> None:
        """With these blocks before the others, so that they win."""
        blocks = [HOST_CONFIG.format(name=host.name, port=host.port) for host in self.hosts.values()]
        self.config.write_text("\n".join([*further, *blocks, USER_CONFIG.format(folder=self.folder)]))


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def ssh_hosts(folder: Path, names: Sequence[str]) -> Iterator[SshHosts]:
    """Started, and reachable with the key that ``config`` names."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    _make_key(folder / "user_key")
    made = SshHosts(folder, {})
    known = []
    with ExitStack() as owned:
        for name in names:
            host = made.hosts[name] = _make_host(folder, name)
            owned.callback(host.end)
            public = " ".join((host.folder / "host_key.pub").read_text().split()[:2])
            known.append(f"[127.0.0.1]:{host.port} {public}")
        (folder / "known_hosts").write_text("\n".join(known) + "\n")
        made.write_config()
        yield made


def _make_host(folder: Path, name: str) -> SshHost:
    own, home = folder / name, folder / name / "home"
    home.mkdir(parents=True)
    _make_key(own / "host_key")
    shutil.copy(folder / "user_key.pub", own / "authorized")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for left in reversed(range(_TRIES)):  # somebody may take the port before sshd does
        port = _free_port()
        (own / "sshd_config").write_text(SSHD_CONFIG.format(port=port, folder=own, home=home, path=path))
        try:
            return SshHost(name, port, home, own, _serve(own, port))
        except AssertionError:
            if not left:
                raise
    raise AssertionError("left above")


def _make_key(path: Path) -> None:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, timeout=_START_S)


def _serve(folder: Path, port: int) -> subprocess.Popen[bytes]:
    with (folder / "sshd.log").open("ab") as log:
        process = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    deadline = time.monotonic() + _START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=_START_S).close()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                process.wait()
                raise AssertionError(f"no sshd:\n{(folder / 'sshd.log').read_text()}") from None
            time.sleep(0.02)
        else:
            return process
