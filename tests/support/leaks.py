"""What a test module may leave behind: nothing. Compares what there is before and after, and names the rest.

Looked at: descriptors of the test process (with memfds, and sockets by address and whether they listen), Python
threads, zmq threads, descendants and whatever else carries the mark of this test session in its environment,
``/dev/shm``, runtime directories.
"""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import uvloop
import zmq

MARK = "MILES_TEST_SESSION"
"""Environment variable that all processes started by this test session inherit."""

SETTLE_S = 5.0
"""How long things that are going away may take."""

_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37

Things = Counter[str]


def begin_session() -> None:
    """Mark this process, and so all that it starts, as of this test session."""
    os.environ[MARK] = uuid.uuid4().hex
    # libuv makes one pipe per process, with the first loop, and keeps it.
    uvloop.new_event_loop().close()
    # pyzmq makes a thread and a pipe per process, with the first frame that it does not copy, and keeps them.
    zmq.Frame(bytes(1 << 17), copy=False)


@contextmanager
def no_leaks(settle_s: float = SETTLE_S) -> Iterator[None]:
    """Fails on leaving if something is there that was not before, also after ``settle_s`` seconds."""
    before, adopts = observe(), adopts_orphans()
    yield
    # Else the orphans of later modules would pile up here as zombies that nobody waits for.
    adopt_orphans(adopts)
    deadline = time.monotonic() + settle_s
    while left := observe() - before:
        if time.monotonic() > deadline:
            raise AssertionError("left behind:\n  " + "\n  ".join(sorted(left.elements())))
        time.sleep(0.02)
        gc.collect()


_kept: dict[int, int] = {}


def keep(pid: int, descriptor: int) -> None:
    """A process that lasts to the end of the session, whichever module starts it, and the descriptor that leads to it.
    What it starts counts as ever."""
    _kept[pid] = descriptor


def forget(pid: int) -> None:
    """That process has ended, and its descriptor is closed."""
    del _kept[pid]


def observe() -> Things:
    """All that counts as a leak if it stays, by description."""
    found: Things = Counter()
    for look in LOOKS:
        found.update(look())
    return found


def descriptors() -> list[str]:
    """Open descriptors by what they lead to; sockets with their addresses."""
    sockets = {
        connection.fd: f"{connection.status} {connection.laddr or '(no address)'}"
        for connection in psutil.Process().net_connections("all")
    }
    found = []
    for entry in os.listdir("/proc/self/fd"):
        if int(entry) in _kept.values():
            continue
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:
            continue  # the listing's own
        # Not by inode: a pipe that is closed and one that is opened instead make no leak.
        kind = target.split(":[")[0] if target.startswith(("socket:[", "pipe:[")) else target
        found.append(f"descriptor: {kind} {sockets.get(int(entry), '')}".rstrip())
    return found


def memory_files() -> list[str]:
    """Mappings of memfds and shared memory that outlive their descriptors."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [f"mapping: {line.split(maxsplit=5)[5]}" for line in lines if "/memfd:" in line or "/dev/shm/" in line]


def threads() -> list[str]:
    """Python threads by name, and the native ones of zmq."""
    # The timer of pytest-timeout runs during every test, fixtures included.
    names = (thread.name for thread in threading.enumerate())
    found = [f"thread: {name}" for name in names if not name.startswith("pytest_timeout")]
    for task in Path("/proc/self/task").iterdir():
        try:
            name = (task / "comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if name.startswith("ZMQ"):
            found.append(f"native thread: {name}")
    return found


def processes() -> list[str]:
    """Descendants (zombies too), and processes anywhere that carry the mark of this session."""
    mark = f"{MARK}={os.environ.get(MARK, '')}".encode()
    found = {child.pid: child for child in psutil.Process().children(recursive=True)}
    for pid in psutil.pids():
        try:
            if pid != os.getpid() and mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found[pid] = psutil.Process(pid)
        except (OSError, psutil.NoSuchProcess):
            continue
    return [f"process: {_described(process)}" for pid, process in found.items() if pid not in _kept]


def shared_memory() -> list[str]:
    """Our entries of ``/dev/shm``, but for those that other test sessions on this machine have in use."""
    entries = [entry for entry in Path("/dev/shm").iterdir() if _is_ours(entry)]
    used = _used_by_others() if entries else ""
    return [f"shared memory: {entry}" for entry in entries if str(entry) not in used]


def runtime_directories() -> list[str]:
    """Directories of runs. The session has its own ``XDG_RUNTIME_DIR``, so they are its own."""
    base = Path(os.environ.get("XDG_RUNTIME_DIR", "/nonexistent")) / "miles"
    return [f"runtime directory: {path}" for path in base.iterdir()] if base.is_dir() else []


LOOKS: tuple[Callable[[], list[str]], ...] = (
    descriptors,
    memory_files,
    threads,
    processes,
    shared_memory,
    runtime_directories,
)


def _described(process: psutil.Process) -> str:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return f"pid {process.pid} (zombie, was {process.name()})"
        return f"pid {process.pid} {' '.join(process.cmdline()) or process.name()}"
    except psutil.NoSuchProcess:
        return f"pid {process.pid}, gone meanwhile"


def adopts_orphans() -> bool:
    """Whether this process is a child subreaper."""
    found = ctypes.c_int()
    if ctypes.CDLL(None).prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(found), 0, 0, 0):
        raise OSError("prctl(PR_GET_CHILD_SUBREAPER)")
    return bool(found.value)


def adopt_orphans(wanted: bool) -> None:
    """Make this process a child subreaper, or an ordinary one."""
    if ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0):
        raise OSError("prctl(PR_SET_CHILD_SUBREAPER)")


def _is_ours(path: Path) -> bool:
    try:
        return path.stat().st_uid == os.geteuid()
    except FileNotFoundError:
        return False


def _used_by_others() -> str:
    """Mappings of all processes outside this session's descendants, as one text to search in."""
    own = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    texts = []
    for pid in psutil.pids():
        try:
            if pid not in own:
                texts.append(Path(f"/proc/{pid}/maps").read_text())
        except OSError:
            continue
    return "\n".join(texts)
