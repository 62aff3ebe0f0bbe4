"""The per-run directory for sockets and secrets: private, short, and gone when the last process that used it is.

Several processes of one run share it (a controller and local agents). Each holds a shared ``flock`` on the directory
itself for as long as it lives. So the kernel, not a pid file, says whether a directory is still in use: correct after
SIGKILL, and also between containers that share ``/tmp`` but number their processes differently.

Invariants: mode 0700, ours, no symbolic link on the last two levels; a name of ``SOCKET_NAME_BYTES`` in it fits
into a unix socket address; a directory that somebody holds is never removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from miles_agents.errors import ConfigError, EnvironmentFault

SOCKET_ADDRESS_BYTES = 107
"""Longest path of a unix socket on Linux (``sun_path`` less its terminator)."""

SOCKET_NAME_BYTES = 32
"""Room that is kept for the name of a socket inside the directory."""

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")
# A holder of the exclusive lock is removing the directory, which takes milliseconds unless it is stopped.
_JOIN_DEADLINE_S = 10.0


class UnsafeDirectory(EnvironmentFault):
    """A directory that must be private to this user is not, or cannot be made."""

    code = "E-DIR-001"


class InvalidRunId(ConfigError):
    """The run id cannot be the name of a directory."""

    code = "E-DIR-002"


class SocketPathTooLong(EnvironmentFault):
    """The address of a unix socket would not fit into the 107 bytes that the kernel takes."""

    code = "E-DIR-003"


class RuntimeDir:
    """A run's directory, held by this process until ``close``. Made by ``runtime_dir``; a context manager."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd: int | None = fd

    def __fspath__(self) -> str:
        return str(self.path)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def socket_path(self, name: str) -> Path:
        """Where a unix socket of that name goes.

        Raises:
            SocketPathTooLong: The whole path exceeds 107 bytes.
        """
        path = self.path / name
        size = len(os.fsencode(path))
        if size > SOCKET_ADDRESS_BYTES:
            raise SocketPathTooLong(
                f"unix socket {path} cannot be made",
                evidence=f"its path has {size} bytes, {SOCKET_ADDRESS_BYTES} are possible",
                advice=f"Use a name of at most {SOCKET_NAME_BYTES} bytes.",
            )
        return path

    def close(self) -> None:
        """Let go of the directory; whoever lets go last removes it. Idempotent."""
        if self._fd is None:
            return
        fd, self._fd = self._fd, None
        try:
            _remove_unless_held(self.path, fd)
        finally:
            os.close(fd)


def runtime_dir(run_id: str) -> RuntimeDir:
    """Make or join the run's directory, after removing those of dead runs.

    It lies below ``$XDG_RUNTIME_DIR/miles`` if that is a short private directory of ours, else ``/tmp/miles-<uid>``.
    What a dead run of the same id left in it is removed.

    Raises:
        InvalidRunId: ``run_id`` is not 1 to 32 letters, digits, ``.``, ``_``, ``-``.
        UnsafeDirectory: The directory, or the one above it, is a link, not ours, or open to others.
    """
    if not _RUN_ID.fullmatch(run_id):
        raise InvalidRunId(
            f"run id {run_id!r} cannot name a directory",
            evidence="allowed are 1 to 32 letters, digits, '.', '_' and '-', beginning with a letter or digit",
            advice="Choose a shorter or plainer run id.",
        )
    base = _bases()[0]
    _make_private(base)
    sweep()
    path = base / run_id
    deadline = time.monotonic() + _JOIN_DEADLINE_S
    while True:
        fd = _join(path)
        if fd is not None:
            return RuntimeDir(path, fd)
        if time.monotonic() > deadline:
            raise UnsafeDirectory(
                f"runtime directory {path} cannot be used",
                evidence=f"another process has held it exclusively for {_JOIN_DEADLINE_S:.0f} s",
                advice=f"Find the process with `fuser {path}`, end it, and start again.",
            )
        time.sleep(0.01)


def live_runs() -> dict[str, Path]:
    """Run id and directory of each run that some process of this user holds, newest last."""
    found: list[tuple[float, Path]] = []
    for path in _run_directories():
        with contextlib.suppress(OSError), _opened(path) as fd:
            if not _locked(fd, fcntl.LOCK_EX):
                found.append((os.fstat(fd).st_ctime, path))
    return {path.name: path for _, path in sorted(found)}


def sweep() -> list[Path]:
    """Remove the directories of runs that no process holds any more; returns them."""
    removed: list[Path] = []
    for path in _run_directories():
        # Directories that vanish or belong to somebody else meanwhile are not ours to judge.
        with contextlib.suppress(OSError), _opened(path) as fd:
            if os.fstat(fd).st_uid == os.geteuid() and _remove_unless_held(path, fd):
                removed.append(path)
    return removed


def _bases() -> list[Path]:
    """Where runs may live: the first is used for new ones, all are looked through."""
    uid = os.geteuid()
    shared = Path(f"/tmp/miles-{uid}")  # noqa: S108  # ours is checked for owner, mode and links
    named = os.environ.get("XDG_RUNTIME_DIR", "")
    longest = SOCKET_ADDRESS_BYTES - SOCKET_NAME_BYTES - len("/miles/") - 32 - len("/")
    if not named.startswith("/") or len(os.fsencode(named)) > longest:
        return [shared]
    try:
        found = os.stat(named)
    except OSError:
        return [shared]
    # After `su` the variable often still names the directory of the user before.
    if found.st_uid != uid or found.st_mode & 0o077:
        return [shared]
    return [Path(named) / "miles", shared]


def _run_directories() -> Iterator[Path]:
    for base in _bases():
        if base.is_dir() and not base.is_symlink():
            yield from (path for path in sorted(base.iterdir()) if _RUN_ID.fullmatch(path.name))


def _make_private(path: Path) -> bool:
    """Make ``path`` with mode 0700, or check that what is there is a real directory, ours, and closed to others.

    False: it was there, and is gone again.
    """
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
    except OSError as error:
        raise UnsafeDirectory(
            f"runtime directory {path} cannot be made",
            evidence=str(error),
            advice="Make its parent writable, or set XDG_RUNTIME_DIR to a directory of yours with mode 0700.",
        ) from error
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    wrong = ""
    if stat.S_ISLNK(found.st_mode):
        wrong = f"it is a symbolic link to {os.readlink(path)}"
    elif not stat.S_ISDIR(found.st_mode):
        wrong = "it is not a directory"
    elif found.st_uid != os.geteuid():
        wrong = f"it belongs to uid {found.st_uid}, this process runs as uid {os.geteuid()}"
    elif found.st_mode & 0o077:
        wrong = f"its mode is {stat.S_IMODE(found.st_mode):04o}, others can look into it or change it"
    if wrong:
        raise UnsafeDirectory(
            f"runtime directory {path} is not private",
            evidence=wrong,
            advice=f"Make sure that nobody put it there on purpose, remove it (rm -r {path}) and start again.",
        )
    return True


def _join(path: Path) -> int | None:
    """Open and lock the directory, made if need be. None: it was being removed at that moment, try again."""
    if not _make_private(path):
        return None
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    if _hold(path, fd):
        return fd
    os.close(fd)
    return None


def _hold(path: Path, fd: int) -> bool:
    """Lock what was opened there, emptied if nobody else holds it. False: the path leads elsewhere meanwhile."""
    # Where the directory was removed and made again, the lock says nothing about what others have in the new one.
    if _locked(fd, fcntl.LOCK_EX) and _is_still(path, fd):
        _empty(path)  # nobody holds it, so whatever is in it was left by the dead
    return _locked(fd, fcntl.LOCK_SH) and _is_still(path, fd)


def _remove_unless_held(path: Path, fd: int) -> bool:
    """Remove the directory if nobody else holds it. ``fd`` loses its own hold in any case."""
    if not _locked(fd, fcntl.LOCK_EX) or not _is_still(path, fd):
        return False
    shutil.rmtree(path, ignore_errors=True)
    return not os.path.lexists(path)


def _locked(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still(path: Path, fd: int) -> bool:
    """Whether the path still leads to what was opened: a removed directory can be locked, but is of no use."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield fd
    finally:
        os.close(fd)


def _empty(path: Path) -> None:
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
