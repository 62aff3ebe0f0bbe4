"""The first process of a host made of namespaces: run as pid 1 by ``support.netns``, standard library only.

It gives the host files of its own (process table, shared memory, runtime directories, host names), starts an sshd when
its network is there, and reaps orphans. It ends, and with it everything on the host, when its stdin does: so does the
host when the test session is killed.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys

_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18


def mount(source: str, target: str, kind: str, flags: int) -> None:
    """mount(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source.encode(), target.encode(), kind.encode(), flags, None):
        number = ctypes.get_errno()
        raise OSError(number, f"mount {source} at {target}: {os.strerror(number)}")


def main() -> None:
    """Set up, say so, serve until stdin ends."""
    wanted = json.loads(sys.argv[1])
    mount("none", "/", "none", _MS_REC | _MS_PRIVATE)
    mount("proc", "/proc", "proc", _MS_NOSUID | _MS_NODEV)
    runtime = f"/tmp/miles-{os.getuid()}"  # what runs of different hosts must not share
    os.makedirs(runtime, mode=0o700, exist_ok=True)
    further = [(place, 0o755) for place in wanted["private"]]
    for place, mode in (("/dev/shm", 0o1777), ("/run", 0o755), (runtime, 0o700), *further):
        os.makedirs(place, exist_ok=True)
        mount("tmpfs", place, "tmpfs", _MS_NOSUID | _MS_NODEV)
        os.chmod(place, mode)
    os.makedirs("/run/sshd", mode=0o755)
    mount(wanted["hosts_file"], "/etc/hosts", "none", _MS_BIND)
    subprocess.run(["hostname", wanted["name"]], check=True)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    if sys.stdin.readline().strip() != "connected":
        return
    sshd = subprocess.Popen(
        ["/usr/sbin/sshd", "-D", "-f", wanted["sshd_config"], "-E", wanted["sshd_log"]], stdin=subprocess.DEVNULL
    )
    reap_until_stdin_ends(sshd.pid)


def reap_until_stdin_ends(sshd: int) -> None:
    """Orphans become ours. Without its sshd a host is of no use, and ends, too."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        readable, _, _ = select.select([0, read], [], [])
        if read in readable:
            os.read(read, 4096)
        if 0 in readable and not os.read(0, 4096):
            return
        if sshd in reaped():
            return


def reaped() -> list[int]:
    """Children that have ended."""
    pids = []
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return pids
        if pid == 0:
            return pids
        pids.append(pid)


if __name__ == "__main__":
    main()
