"""What a zygote's imports must not leave behind, because a fork would break it or share it between workers.

A descriptor is shared with all that it is: one offset, one stream, one connection. So is a shared mapping. Let pass:
what was there before the imports, files that are only read, and devices without any state.
"""

from __future__ import annotations

import os
import stat
import sys
from dataclasses import dataclass

_GPU_DEVICES = ("/dev/nvidia", "/dev/kfd", "/dev/dri/")
_STATELESS_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_STANDARD = 2
"""Highest of the three standard descriptors: each worker gets its own."""


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a process has open, and which writable mappings it shares: ``(descriptor, target)`` and names."""

    files: frozenset[tuple[int, str]]
    mappings: frozenset[str]

    @classmethod
    def now(cls) -> Holdings:
        """Of this process."""
        return cls(frozenset(_open_files()), frozenset(_shared_mappings()))


def why_unsafe(before: Holdings) -> str:
    """What there is in this process, after its imports, that a fork would break or share; "" if nothing."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            children = file.read().split()
    except FileNotFoundError:  # a kernel without CONFIG_PROC_CHILDREN
        children = []
    if children:
        return f"the imports started a process (pid {', '.join(children)})"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "the imports made a CUDA context"
    return _what_is_shared(before) or other_threads()


def other_threads() -> str:
    """Which threads there are beside this one; "" if none."""
    threads = os.listdir("/proc/self/task")
    if len(threads) == 1:
        return ""
    names = sorted(_comm(f"/proc/self/task/{thread}/comm") for thread in threads)
    return f"{len(threads)} threads run after the imports ({', '.join(names)}); OMP_NUM_THREADS=1 avoids most"


def _what_is_shared(before: Holdings) -> str:
    now = Holdings.now()
    new = sorted((fd, target) for fd, target in now.files - before.files if fd > _STANDARD)
    devices = [target for _, target in new if target.startswith(_GPU_DEVICES)]
    if devices:
        return f"the imports opened a GPU device ({devices[0]})"
    for fd, target in new:
        if _is_shared(fd, target):
            return f"the imports opened {target} (descriptor {fd}), which all workers would share"
    for name in sorted(now.mappings - before.mappings):
        return f"the imports made a writable shared mapping ({name}), which all workers would share"
    return ""


def _is_shared(fd: int, target: str) -> bool:
    """Whether a user of this descriptor can disturb another one."""
    if target in _STATELESS_DEVICES:
        return False
    try:
        mode = os.fstat(fd).st_mode
        with open(f"/proc/self/fdinfo/{fd}") as file:
            flags = next(int(line.split()[1], 8) for line in file if line.startswith("flags:"))
    except OSError:  # closed meanwhile: that of the listing itself
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or flags & os.O_ACCMODE != os.O_RDONLY


def _open_files() -> list[tuple[int, str]]:
    return [(int(fd), target) for fd in os.listdir("/proc/self/fd") if (target := _target(fd))]


def _shared_mappings() -> list[str]:
    """Names of those that can be written, with device and inode: two without a file are told apart, too."""
    found = []
    with open("/proc/self/maps") as file:
        for line in file:
            _, mode, _, device, inode, *name = line.split(maxsplit=5)
            if mode[1] == "w" and mode[3] == "s":
                found.append(f"{name[0].strip() if name else 'no file'}, inode {inode} on {device}")
    return found


def _comm(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return "gone"


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""
