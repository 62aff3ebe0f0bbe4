"""Named shared memory of SGLang's, so that none stays wherever an engine is killed. Imports no torch.

SGLang removes its names in an orderly end only. All of its processes have the memory mapped by the time that requests
are answered, and nobody opens it anew: an engine that answers removes the names at once (``settle_when_ready``). What
one leaves that died before is removed by the next to look (``forget_stale``).
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

logger = logging.getLogger("miles.launch_engine")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # the kernel's, not a place for temporary files
_SGLANGS = ("sgl_shm_", "sglang_loads_")
_SETTING_UP_S = 0.2
_GIVE_UP_S = 3600.0
_LOOK_EVERY_S = 0.1


def settle_when_ready(url: str, key: str) -> None:
    """In a thread: wait until the engine at ``url``, which is this process, answers; then settle."""
    threading.Thread(target=_settle, args=(url, key), name="settle", daemon=True).start()


def _settle(url: str, key: str) -> None:
    deadline = time.monotonic() + _GIVE_UP_S
    while not _answers(url + "/health", key) and time.monotonic() < deadline:
        time.sleep(_LOOK_EVERY_S)
    # SGLang asks itself for this before it listens if it does not warm up. Else every flush of the cache has Python's
    # garbage collector walk through everything.
    _answers(url + "/freeze_gc", key)
    _answers(url + "/v1/loads", key)  # has this process map what it reads of the schedulers' load
    me = psutil.Process()
    forget_names([me.pid, *(child.pid for child in me.children(recursive=True))])


def forget_names(pids: Iterable[int]) -> list[str]:
    """Remove the names of shared memory of SGLang's that these processes have mapped. Returns them."""
    mapped = {inode for pid in pids for inode in mapped_inodes(pid)}
    removed = []
    for path, facts in _entries((*_SGLANGS, "sem.mp-")):
        if (facts.st_dev, facts.st_ino) in mapped:
            path.unlink(missing_ok=True)
            removed.append(path.name)
    return removed


def forget_stale() -> list[str]:
    """Remove names of SGLang's, of this user, that no process has mapped. Returns them."""
    stale = {path.name: facts for path, facts in _entries(_SGLANGS) if facts.st_uid == os.geteuid()}
    if not stale:
        return []
    time.sleep(_SETTING_UP_S)  # one that is just being made is not mapped yet
    mapped = {inode for pid in psutil.pids() for inode in mapped_inodes(pid)}
    removed = [name for name, facts in stale.items() if (facts.st_dev, facts.st_ino) not in mapped]
    for name in removed:
        (SHARED_MEMORY / name).unlink(missing_ok=True)
    return removed


def _entries(prefixes: tuple[str, ...]) -> Iterator[tuple[Path, os.stat_result]]:
    for path in SHARED_MEMORY.iterdir():
        if path.name.startswith(prefixes):
            with contextlib.suppress(FileNotFoundError):
                yield path, path.lstat()


def mapped_inodes(pid: int) -> set[tuple[int, int]]:
    """Device and inode of all shared memory that a process has mapped. By inode: the C library renames semaphores."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    found = set()
    for line in lines:
        if str(SHARED_MEMORY) in line:
            device, inode = line.split(maxsplit=5)[3:5]
            major, minor = (int(number, 16) for number in device.split(":"))
            found.add((os.makedev(major, minor), int(inode)))
    return found


def _answers(url: str, key: str) -> bool:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})  # noqa: S310  # our own server
    try:
        with urllib.request.urlopen(request, timeout=10.0) as answer:  # noqa: S310
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
