"""Several hosts on one machine: namespaces with an sshd in each, joined by veth pairs through a bridge.

A host is a network, mount, pid, uts and ipc namespace: its own address, host name, process numbers, shared memory and
runtime directories; files it shares with all others, as on a cluster's file server. The network is a namespace, too.
Nothing of it has a name that could stay behind: when the test session ends, killed or not, the pipes to a host's first
process and to the switch end, they end, and the kernel takes away what hung on them.

The machine itself takes part as ``HERE``, so that a test can have its controller in its own process.
"""

from __future__ import annotations

import functools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

SUPPORT = Path(__file__).parent
HERE = "here"
START_S = 60.0
SPACES = ("--net", "--mount", "--pid", "--uts", "--ipc")
_PROGRAMS = {"ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}
_SSH_PROGRAMS = {"ssh": "openssh-client", "ssh-keygen": "openssh-client"}
_SSHD = "/usr/sbin/sshd"


class NotAllowed(str):
    """What the kernel or the container refuses: nothing that could be installed."""


def missing_for_ssh() -> tuple[str, ...]:
    """What this machine lacks for an sshd of our own and its clients."""
    missing = [f"{name} (Debian: {package})" for name, package in _SSH_PROGRAMS.items() if shutil.which(name) is None]
    if not os.access(_SSHD, os.X_OK):
        missing.append(f"{_SSHD} (Debian: openssh-server)")
    return tuple(missing)


@functools.cache
def missing_for_hosts() -> tuple[str, ...]:
    """What this machine lacks for hosts made of namespaces; nothing where they can be made."""
    missing = [f"{name} (Debian: {package})" for name, package in _PROGRAMS.items() if shutil.which(name) is None]
    missing += missing_for_ssh()
    if os.geteuid() != 0:
        missing.append("root")
    if missing:
        return tuple(missing)
    trial = "ip link set lo up && ip link add try0 type veth peer name try1 && ip link add try2 type bridge"
    done = subprocess.run(
        ["unshare", *SPACES, "--fork", "sh", "-c", trial], check=False, capture_output=True, text=True, timeout=START_S
    )
    return () if done.returncode == 0 else (NotAllowed(f"namespaces with veth pairs ({done.stderr.strip()[-200:]})"),)


@dataclass
class Host:
    """One host. ``name`` is its host name, and its alias for ssh."""

    name: str
    address: str
    port: str
    process: subprocess.Popen[str]
    init: int
    config: Path

    def command(self, argv: Sequence[str]) -> list[str]:
        """A command line that runs ``argv`` on it, as if typed there."""
        return ["nsenter", f"--target={self.init}", *SPACES, *argv]

    def run(self, *argv: str, timeout_s: float = START_S) -> str:
        """Run a command on it; what it wrote to stdout. Raises CalledProcessError."""
        done = subprocess.run(self.command(argv), check=True, capture_output=True, text=True, timeout=timeout_s)
        return done.stdout

    def processes(self) -> list[str]:
        """What runs on it beside its first process, sshd, and those who look: command lines."""
        ours = f"{self.name} sees itself"
        script = f"for d in /proc/[0-9]*; do tr '\\0' ' ' < $d/cmdline; echo; done 2>/dev/null # {ours}"
        lines = self.run("sh", "-c", script).splitlines()
        usual = ("netns_host.py", "sshd", ours)
        return [line.strip() for line in lines if line.strip() and not any(word in line for word in usual)]


@dataclass
class Network:
    """Hosts by name, and what can happen to them. Made by ``network``."""

    directory: Path
    prefix: str
    switch: subprocess.Popen[str]
    hosts: dict[str, Host] = field(default_factory=dict)
    cuts: set[tuple[str, str]] = field(default_factory=set)
    names: tuple[str, ...] = ()
    private: tuple[str, ...] = ()

    @property
    def here(self) -> str:
        """The address of this machine, as seen from the hosts."""
        return f"{self.prefix}.254"

    @property
    def ssh_config(self) -> Path:
        """For ``ssh -F``: hosts by name, their keys known, ours to enter with."""
        return self.directory / "ssh_config"

    @property
    def bin(self) -> Path:
        """To go first on PATH: an ``ssh`` that reads ``ssh_config`` in place of the user's."""
        return self.directory / "bin"

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def address(self, name: str) -> str:
        """Of a host, or of this machine."""
        return self.here if name == HERE else f"{self.prefix}.{self.names.index(name) + 1}"

    # -- what can happen --------------------------------------------------------------------------------------

    def cut(self, one: str, other: str) -> None:
        """Nothing passes between the two any more, and nobody is told: frames go to a neighbour that is not there."""
        for at, to in ((one, other), (other, one)):
            if (at, to) not in self.cuts and (at == HERE or at in self.hosts):
                self.cuts.add((at, to))
                self._neighbour(at, "replace", self.address(to), "lladdr", "02:00:00:00:00:99", "nud", "permanent")

    def mend(self, one: str, other: str) -> None:
        """The link is there again."""
        for at, to in ((one, other), (other, one)):
            if (at, to) in self.cuts:
                self.cuts.discard((at, to))
                if at == HERE or at in self.hosts:
                    self._neighbour(at, "del", self.address(to))

    def spoil(self, name: str, *, delay_ms: float = 0.0, loss_percent: float = 0.0) -> None:
        """All that a host sends and receives is late, each way, or lost with that chance; zeros make it good again."""
        order = {"order": "spoil", "delay_s": delay_ms / 1000, "loss": loss_percent / 100}
        self._order({**order, "port": self.hosts[name].port})

    def unplug(self, name: str) -> None:
        """The host's cable is out."""
        self._order({"order": "unplug", "port": self.hosts[name].port})

    def plug(self, name: str) -> None:
        """And in again."""
        self._order({"order": "plug", "port": self.hosts[name].port})

    def restore(self) -> None:
        """Every link as it was at first."""
        for one, other in list(self.cuts):
            self.mend(one, other)
        for name in self.hosts:
            self.spoil(name)
            self.plug(name)

    def take_away(self, name: str) -> None:
        """The host loses power: nothing on it runs any more, and nobody hears of it from there."""
        host = self.hosts.pop(name)
        self.cuts = {cut for cut in self.cuts if cut[0] != name}
        os.kill(host.init, 9)
        host.process.wait(START_S)
        _close_pipes(host.process)

    def give_back(self, name: str) -> Host:
        """It boots: the same name, address and host key."""
        self.hosts[name] = self._boot(name)
        return self.hosts[name]

    # -- inside -----------------------------------------------------------------------------------------------

    def _boot(self, name: str) -> Host:
        number = self.names.index(name) + 1
        config = {
            "name": name,
            "hosts_file": str(self.directory / "hosts"),
            "sshd_config": str(self.directory / f"sshd_config.{name}"),
            "sshd_log": str(self.directory / f"sshd.{name}.log"),
            "private": self.private,
        }
        argv = ["unshare", *SPACES, "--fork", "--kill-child", sys.executable, "-S", str(SUPPORT / "netns_host.py")]
        process = _started(self.directory, name, [*argv, json.dumps(config)])
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        host = Host(name, f"{self.prefix}.{number}", f"p{number}", process, int(children[0]), self.ssh_config)
        # The same hardware address after each boot: whoever knows the host goes on reaching it.
        self._cable(host.port, host.init, "eth0", host.address, mac=f"02:00:00:00:00:{number:02x}")
        self._order({"order": "plug", "port": host.port})
        _tell(process, "connected")
        return host

    def _cable(self, port: str, pid: int, interface: str, address: str, *, mac: str) -> None:
        """From a port of the switch to a namespace: that of a process."""
        ends = ["type", "veth", "peer", "name", interface, "address", mac, "netns", str(pid)]
        _run("ip", "link", "add", port, "netns", str(self.switch.pid), *ends)
        inside = [] if pid == os.getpid() else ["nsenter", f"--target={pid}", "--net"]
        for words in (
            ("addr", "add", f"{address}/24", "dev", interface),
            ("link", "set", interface, "up"),
            ("link", "set", "lo", "up"),
        ):
            _run(*inside, "ip", *words)

    def _neighbour(self, at: str, verb: str, *words: str) -> None:
        inside, interface = ([], self.directory.name) if at == HERE else (self.hosts[at].command(()), "eth0")
        _run(*inside, "ip", "neigh", verb, *words, "dev", interface)

    def _order(self, order: Mapping[str, object]) -> None:
        _tell(self.switch, json.dumps(order))
        answer = _line(self.switch)
        if answer != "done":
            raise AssertionError(f"the switch: {order}: {answer}")


@contextmanager
def network(names: Sequence[str] = ("node1", "node2", "node3"), *, private: Sequence[str] = ()) -> Iterator[Network]:
    """These hosts, up, with sshd listening; all gone afterwards. ``private``: further directories that each has for
    itself."""
    missing = missing_for_hosts()
    assert not missing, f"this machine lacks: {', '.join(missing)}"
    directory = _directory()
    switch = _started(directory, "switch", ["unshare", "--net", sys.executable, "-S", str(SUPPORT / "netns_wire.py")])
    found = Network(directory, _free_prefix(), switch, names=tuple(names), private=tuple(private))
    try:
        found._cable("p254", os.getpid(), directory.name, found.here, mac="02:00:00:00:00:fe")
        found._order({"order": "plug", "port": "p254"})
        _write_files(found)
        for name in names:
            found.give_back(name)
        for host in found.hosts.values():
            _until_sshd(host)
        yield found
    finally:
        for name in list(found.hosts):
            found.take_away(name)
        _close_pipes(found.switch)
        found.switch.wait(START_S)
        shutil.rmtree(directory)


def _directory() -> Path:
    """For keys and settings; its name is that of our end of the cable, too (15 characters at most). What sessions left
    that were killed goes first."""
    base = Path("/tmp")  # the last level is private
    for left in base.glob("mtn*"):
        pid = left.name.removeprefix("mtn").partition("x")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left, ignore_errors=True)
    number = 0
    while True:
        try:
            path = base / f"mtn{os.getpid()}x{number}"
            path.mkdir(mode=0o700)
            return path
        except FileExistsError:
            number += 1


def _free_prefix() -> str:
    """Three bytes of addresses that nothing here uses."""
    used = subprocess.run(["ip", "-4", "route"], check=True, capture_output=True, text=True).stdout
    for number in range(os.getpid(), os.getpid() + 1000):
        prefix = f"10.{64 + (number >> 8) % 128}.{number % 256}"
        if f"{prefix}." not in used:
            return prefix
    raise AssertionError(f"no free addresses beside {used}")


def _write_files(network: Network) -> None:
    directory, names = network.directory, network.names
    addresses = {name: network.address(name) for name in names}
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
    (directory / "hosts").write_text("\n".join(lines) + "\n")
    for key in ("own", *names):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", key, "-f", str(directory / f"{key}.key"))
    (directory / "authorized_keys").write_text((directory / "own.key.pub").read_text())
    known, config = [], []
    for name, address in addresses.items():
        known.append(f"{name},{address} {(directory / f'{name}.key.pub').read_text().strip()}")
        config.append(f"Host {name}\n  HostName {address}\n")
        (directory / f"sshd_config.{name}").write_text(
            f"Port 22\nListenAddress {address}\nHostKey {directory}/{name}.key\nUsePAM no\nPidFile none\n"
            f"AuthorizedKeysFile {directory}/authorized_keys\nStrictModes no\nPermitRootLogin yes\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\nUseDNS no\nMaxStartups 200\n"
            "Subsystem sftp internal-sftp\n"
        )
    (directory / "known_hosts").write_text("\n".join(known) + "\n")
    config.append(
        f"Host *\n  IdentityFile {directory}/own.key\n  IdentitiesOnly yes\n  User root\n"
        f"  UserKnownHostsFile {directory}/known_hosts\n  GlobalKnownHostsFile /dev/null\n"
        "  StrictHostKeyChecking yes\n"
    )
    network.ssh_config.write_text("".join(config))
    network.bin.mkdir()
    wrapper = network.bin / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {network.ssh_config} "$@"\n')
    wrapper.chmod(0o755)


def _until_sshd(host: Host) -> None:
    deadline = time.monotonic() + START_S
    while True:
        argv = ["ssh", "-F", str(host.config), "-o", "BatchMode=yes", host.name, "hostname"]
        done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=START_S)
        if done.stdout.strip() == host.name:
            return
        if time.monotonic() > deadline or host.process.poll() is not None:
            raise AssertionError(f"no sshd on {host.name}: {done.stderr}")
        time.sleep(0.05)


def _started(directory: Path, label: str, argv: Sequence[str]) -> subprocess.Popen[str]:
    """A helper that says when it is ready. It does not carry on what the environment says of this session's user."""
    env = {"PATH": os.environ["PATH"]} | {k: v for k, v in os.environ.items() if k == "MILES_TEST_SESSION"}
    log = directory / f"{label}.log"
    with log.open("ab") as stderr:
        process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env
        )
    if (answer := _line(process)) != "ready":
        process.kill()
        code = process.wait(START_S)
        raise AssertionError(f"{label}: {answer!r}, exit code {code}: {log.read_text(errors='replace')[-2000:]}")
    return process


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], START_S)[0]:
        raise AssertionError(f"{process.args} says nothing")
    return process.stdout.readline().strip()


def _tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def _close_pipes(process: subprocess.Popen[str]) -> None:
    for end in (process.stdin, process.stdout):
        if end is not None:
            end.close()


def _run(*argv: str) -> None:
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=START_S)
    if done.returncode:
        raise AssertionError(f"{' '.join(argv)}: {done.stderr.strip()}")
