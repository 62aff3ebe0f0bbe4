"""A new directory takes the name of another, such that a crash at any point leaves one of the two under that name.

Where the file system can exchange two names at once (Linux ``renameat2``; ext4, xfs, btrfs, tmpfs, but not NFS), the
name is never free. Elsewhere what had it is ``.{name}.old`` for a moment, and ``recover`` puts that back.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_CANNOT = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


def exchange(one: Path, other: Path) -> bool:
    """Both exist and get each other's name at once. False: nothing has changed, the file system cannot do it.

    Raises:
        OSError: It can, but failed.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def put_in_place(new: Path, final: Path, *, swap: Callable[[Path, Path], bool] = exchange) -> Path | None:
    """``new`` becomes ``final``. Returns where what was ``final`` is now; None if there was none.

    Raises:
        OSError: ``final`` is as it was.
    """
    recover(final)
    previous = _old(final)
    shutil.rmtree(previous, ignore_errors=True)
    if not final.exists():
        new.rename(final)
        return None
    if swap(new, final):
        new.rename(previous)
        return previous
    final.rename(previous)
    try:
        new.rename(final)
    except OSError:
        previous.rename(final)
        raise
    return previous


def put_back(final: Path, previous: Path | None, aside: Path, *, swap: Callable[[Path, Path], bool] = exchange) -> None:
    """Undo ``put_in_place``: ``final`` is what it was before; what replaced it is ``aside``."""
    if previous is None:
        final.rename(aside)
    elif swap(previous, final):
        previous.rename(aside)
    else:
        final.rename(aside)
        previous.rename(final)


def recover(final: Path) -> None:
    """If a crash came while ``final`` was replaced, so that nothing has its name: what had it gets it again."""
    previous = _old(final)
    if not final.exists() and previous.exists():
        with contextlib.suppress(OSError):  # another process was faster, or nothing may be written here
            previous.rename(final)


def recover_all(root: Path, pattern: str, *, clean_up: bool = False) -> None:
    """``recover`` for all names below ``root`` that match. ``clean_up``: what was replaced for good is removed."""
    for previous in root.glob(f".{pattern}.old"):
        final = root / previous.name.removeprefix(".").removesuffix(".old")
        recover(final)
        if clean_up and final.exists():
            shutil.rmtree(previous, ignore_errors=True)


def _old(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")
