"""Reading what children write: each child appends its stdout and stderr to a file of its own.

Files instead of pipes: a child never blocks on its output, a leftover child that holds the file open delays
nobody, and the last traceback survives even the agent. Nothing here waits: a ``LogTail`` is polled by the
agent's tick, reads what a byte budget allows, and after process exit ``finish`` reads the rest.

Invariants of a ``LogTail``: its position never moves back (but for a file that was emptied); every byte before
it was returned as part of a line, collapsed by a carriage return, cut from an overlong line, or counted in
``skipped_bytes``.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Protocol, TypeAlias

from miles_agents.errors import EnvironmentFault

MAX_LINE_BYTES = 8 * 1024
RING_LINES = 200
READ_BYTES = 256 * 1024
MAX_LAG_BYTES = 16 * 1024 * 1024
FINISH_BYTES = 1024 * 1024

_PAGE = 4096
_FALLOC_KEEP_SIZE_PUNCH_HOLE = 0x01 | 0x02


class LogCannotShrink(EnvironmentFault):
    """The file system cannot free the middle of a log file."""

    code = "E-LOG-001"


class _Line:
    """The line being read. A carriage return starts it over at the next byte; bytes over the limit are counted."""

    __slots__ = ("cut", "kept", "limit", "restart")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.kept = bytearray()
        self.cut = 0
        self.restart = False

    def add(self, piece: bytes) -> None:
        """Take bytes without a newline."""
        ends_in_return = piece.endswith(b"\r")
        piece = piece.rstrip(b"\r")
        start = piece.rfind(b"\r") + 1
        if piece and (start or self.restart):
            self.kept.clear()
            self.cut = 0
            self.restart = False
        part = piece[start:]
        room = self.limit - len(self.kept)
        self.kept += part[:room]
        self.cut += max(0, len(part) - room)
        # "text\r" may be half of "text\r\n": the text goes only when something overwrites it.
        self.restart = self.restart or ends_in_return

    def text(self) -> str:
        """The line so far."""
        # NUL bytes are what a freed part of a file reads as.
        shown = bytes(self.kept).replace(b"\0", b"").decode("utf-8", "replace")
        return f"{shown} [cut: {self.cut} more bytes]" if self.cut else shown

    def take(self) -> str:
        """The line, complete; the next one begins."""
        text = self.text()
        self.kept.clear()
        self.cut = 0
        self.restart = False
        return text


class Tail(Protocol):
    """What a forwarder needs of what a process prints: ``LogTail``, or a simulation's."""

    @property
    def path(self) -> Path:
        """Where people find it."""

    @property
    def offset(self) -> int:
        """How far it was read, in bytes."""

    def size(self) -> int:
        """Bytes that there are now."""

    def read(self, max_bytes: int) -> list[str]:
        """Lines completed since the last call."""

    def finish(self, max_bytes: int) -> list[str]:
        """The rest, after the process has exited."""

    def last_lines(self) -> list[str]:
        """The newest lines that were read, at most 200."""

    def close(self) -> None:
        """Let go of it. Idempotent."""


OpenTail: TypeAlias = Callable[[Path, int], Tail]
"""What follows a process's output, from so many bytes on."""


class LogTail:
    """Reads a growing file line by line.

    Args:
        path: The file. It may not exist yet.
        max_lag_bytes: Further behind than this, the tail jumps ahead and says how much it skipped.
        max_line_bytes: Longer lines are cut, with a mark that counts what is missing.
        start: Where to begin, in bytes.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_lag_bytes: int = MAX_LAG_BYTES,
        max_line_bytes: int = MAX_LINE_BYTES,
        start: int = 0,
    ) -> None:
        self.path = path
        self.skipped_bytes = 0
        self._max_lag = max_lag_bytes
        self._offset = start
        self._fd: int | None = None
        self._line = _Line(max_line_bytes)
        self._started_line = False
        self._ring: deque[str] = deque(maxlen=RING_LINES)
        self._finished = False

    @property
    def offset(self) -> int:
        """How far the file was read, in bytes."""
        return self._offset

    def size(self) -> int:
        """The file's size now; 0 if there is none."""
        fd = self._open()
        return 0 if fd is None else os.fstat(fd).st_size

    def read(self, max_bytes: int = READ_BYTES) -> list[str]:
        """The lines that were completed since the last call, from at most ``max_bytes`` of the file."""
        return self._keep(self._read(max_bytes, self._max_lag, self._max_lag // 2))

    def finish(self, max_bytes: int = FINISH_BYTES) -> list[str]:
        """The rest, after the process has exited, an incomplete last line included. Closes the file.

        Reads up to the size that the file has now, so a leftover child that writes on delays nothing; if more
        than ``max_bytes`` are left, the last of them.
        """
        if self._finished:
            return []
        end = self.size()
        lines: list[str] = []
        while self._offset < end:
            before = self._offset
            lines += self._read(min(max_bytes, end - self._offset), max_bytes, max_bytes)
            if self._offset == before:
                break
        if self._started_line:
            lines.append(self._take_line())
        self.close()
        self._finished = True
        return self._keep(lines)

    def last_lines(self, count: int = RING_LINES) -> list[str]:
        """The newest lines that were read (at most 200), the incomplete one included."""
        lines = list(self._ring)
        if self._started_line:
            lines.append(self._line.text())
        return lines[-count:] if count > 0 else []

    def close(self) -> None:
        """Let go of the file. Idempotent; the last lines stay."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _open(self) -> int | None:
        if self._fd is None and not self._finished:
            try:
                self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
        return self._fd

    def _keep(self, lines: list[str]) -> list[str]:
        self._ring.extend(lines)
        return lines

    def _take_line(self) -> str:
        self._started_line = False
        return self._line.take()

    def _read(self, max_bytes: int, max_lag: int, keep: int) -> list[str]:
        fd = self._open()
        if fd is None:
            return []
        size = os.fstat(fd).st_size
        lines: list[str] = []
        if size < self._offset:
            lines += self._interrupt("[log: the file was emptied by someone else]")
            self._offset = 0
        if size - self._offset > max_lag:
            lines += self._jump(fd, size - keep, size, "they are in")
        if self._offset >= size:
            return lines
        data_start = _seek(fd, self._offset, os.SEEK_DATA, size)
        if data_start > self._offset:
            lines += self._jump(fd, data_start, size, "they were freed to keep the size limit of")
        hole_start = _seek(fd, self._offset, os.SEEK_HOLE, size)
        chunk = os.pread(fd, min(max_bytes, hole_start - self._offset), self._offset)
        self._offset += len(chunk)
        return lines + self._split(chunk)

    def _split(self, chunk: bytes) -> list[str]:
        lines = []
        *complete, rest = chunk.split(b"\n")
        for piece in complete:
            self._line.add(piece)
            lines.append(self._take_line())
        if rest:
            self._line.add(rest)
            self._started_line = True
        return lines

    def _jump(self, fd: int, target: int, size: int, where: str) -> list[str]:
        """Move ahead to the line start at or after ``target``, and account for what is left out."""
        target = min(target, size)
        window = os.pread(fd, min(MAX_LINE_BYTES, size - target), target)
        newline = window.find(b"\n")
        target += newline + 1
        skipped = target - self._offset
        self.skipped_bytes += skipped
        self._offset = target
        return self._interrupt(f"[log: skipped {skipped} bytes; {where} {self.path}]")

    def _interrupt(self, notice: str) -> list[str]:
        cut = [self._take_line()] if self._started_line else []
        return [*cut, notice]


def _seek(fd: int, offset: int, whence: int, size: int) -> int:
    """Where data or a hole starts from ``offset`` on; ``size`` if nowhere. Reads use ``pread``: no position moves."""
    try:
        return min(os.lseek(fd, offset, whence), size)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # no holes on this file system
            return offset if whence == os.SEEK_DATA else size
        raise


def last_lines(path: Path, count: int = 20, *, start: int = 0, max_bytes: int = 64 * 1024) -> list[str]:
    """The last lines of a file, not from before byte ``start``; empty if there is no file. For error reports: a file
    that cannot be read is said in place of its lines."""
    tail = LogTail(path, start=start)
    try:
        if tail.size() >= start:
            tail.finish(max_bytes)
        return tail.last_lines(count)
    except OSError as error:
        return [f"[log: {path} cannot be read: {error.strerror or error}]"]
    finally:
        tail.close()


def last_words(lines: Sequence[str], count: int = 20) -> str:
    """The end of a dead process's log for an error's evidence: ``count`` lines, or all from where the interpreter
    reports a crash (the stack of the thread that crashed comes first there) with a few lines before it."""
    start = max(0, len(lines) - count)
    crash = next((i for i, line in enumerate(lines) if line.startswith("Fatal Python error")), start + 5)
    return "\n".join(lines[max(0, min(start, crash - 5)) :]) or "(it printed nothing)"


def cap_file(path: Path, max_bytes: int, keep_head: int) -> int:
    """Free the middle of a log that takes more than ``max_bytes`` on disk. Writers go on undisturbed.

    The first ``keep_head`` bytes and the end stay (half of what the limit leaves, so that it is not freed anew
    with every line); the size that ``ls`` shows does not change.

    Returns:
        Bytes freed on disk; 0 if the file is small enough or away.

    Raises:
        LogCannotShrink: the file system cannot do it.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    try:
        before = os.fstat(fd)
        if before.st_blocks * 512 <= max_bytes:
            return 0
        start = -(-keep_head // _PAGE) * _PAGE
        end = (before.st_size - max(0, max_bytes - keep_head) // 2) // _PAGE * _PAGE
        if end <= start:
            return 0
        _punch_hole(fd, start, end - start, path)
        mark = f"\n[log: the middle was freed here, to keep the file under {max_bytes} bytes]\n".encode()
        if len(mark) <= start:
            os.pwrite(fd, mark, start - len(mark))
        return max(0, (before.st_blocks - os.fstat(fd).st_blocks) * 512)
    finally:
        os.close(fd)


@cache
def _fallocate() -> Callable[[int, int, int, int], int]:
    function = ctypes.CDLL(None, use_errno=True).fallocate
    function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    function.restype = ctypes.c_int
    typed: Callable[[int, int, int, int], int] = function
    return typed


def _punch_hole(fd: int, start: int, length: int, path: Path) -> None:
    if _fallocate()(fd, _FALLOC_KEEP_SIZE_PUNCH_HOLE, start, length) != 0:
        number = ctypes.get_errno()
        raise LogCannotShrink(
            f"the log {path} is over its size limit and cannot be shrunk",
            evidence=f"fallocate(PUNCH_HOLE): {os.strerror(number)}",
            advice="Put the run directory on ext4, xfs, btrfs or tmpfs, or watch the disk yourself.",
            path=str(path),
        )
