"""How a process ended, and whether the kernel ended it for want of memory."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

CREDIT_S = 5.0
"""How long a counted out-of-memory kill waits for the exit that it explains."""


@dataclass(frozen=True, slots=True)
class Exit:
    """The end of a process: exactly one of ``code`` and ``signal`` is set, or none if the status was lost.

    ``oom`` is True only where the kernel's count of out-of-memory kills in our cgroup grew along with a SIGKILL
    that we did not send; where that count cannot be read it is False.
    """

    code: int | None
    signal: int | None
    core_dumped: bool = False
    oom: bool = False

    def describe(self) -> str:
        """For people: ``exit code 1``, ``killed by SIGKILL (9) (out of memory)``."""
        if self.signal is not None:
            text = f"killed by {signal_name(self.signal)} ({self.signal})"
        elif self.code is not None:
            text = f"exit code {self.code}"
        else:
            text = "exit status unknown"
        return text + (" (core dumped)" if self.core_dumped else "") + (" (out of memory)" if self.oom else "")


def signal_name(number: int) -> str:
    """``SIGKILL`` for 9; ``signal 40`` where there is no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def exit_of(info: os.waitid_result, *, oom: bool = False) -> Exit:
    """From ``waitid``."""
    if info.si_code == os.CLD_EXITED:
        return Exit(code=info.si_status, signal=None)
    return Exit(code=None, signal=info.si_status, core_dumped=info.si_code == os.CLD_DUMPED, oom=oom)


@dataclass(slots=True)
class OomAttribution:
    """Pure: gives each counted out-of-memory kill to at most one exit.

    The kernel counts per cgroup, not per process. A kill that no exit claimed within ``CREDIT_S`` (it hit a
    grandchild) is forgotten, so that it cannot explain an unrelated SIGKILL later.
    """

    seen: int
    _credits: list[float] = field(default_factory=list)

    def on_exit(self, count: int, *, killed_by_stranger: bool, now: float) -> bool:
        """A child ended while the count stood at ``count``. True: the kernel killed it for memory."""
        self._credits = [since for since in self._credits if now - since <= CREDIT_S]
        self._credits += [now] * max(0, count - self.seen)
        self.seen = max(self.seen, count)
        if killed_by_stranger and self._credits:
            self._credits.pop(0)
            return True
        return False


def oom_count_file(self_cgroup: str, root: Path = Path("/sys/fs/cgroup")) -> Path | None:
    """The file that counts out-of-memory kills, given /proc/self/cgroup's text; None if none is readable.

    Knows cgroup v2 (``memory.events``) and v1 (``memory.oom_control``), and containers that see their own cgroup
    at the root whatever /proc says.
    """
    candidates: list[Path] = []
    for line in self_cgroup.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            candidates += [root / path.lstrip("/") / "memory.events", root / "memory.events"]
        elif "memory" in controllers.split(","):
            v1 = root / "memory"
            candidates += [v1 / path.lstrip("/") / "memory.oom_control", v1 / "memory.oom_control"]
    return next((file for file in candidates if read_oom_count(file) is not None), None)


def read_oom_count(file: Path) -> int | None:
    """The ``oom_kill`` line of a cgroup file, or None."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


class OomWatch:
    """Reads the kernel's count at every exit. Produces the verdict for ``Exit.oom``."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        count = read_oom_count(file) if file is not None else None
        self._attribution = OomAttribution(count or 0)

    @classmethod
    def of_this_process(cls) -> OomWatch:
        """For the cgroup that this process and its children live in."""
        try:
            text = Path("/proc/self/cgroup").read_text()
        except OSError:
            return cls(None)
        return cls(oom_count_file(text))

    def on_exit(self, *, killed_by_stranger: bool, now: float) -> bool:
        """See ``OomAttribution.on_exit``; False where nothing can be read."""
        count = read_oom_count(self._file) if self._file is not None else None
        if count is None:
            return False
        return self._attribution.on_exit(count, killed_by_stranger=killed_by_stranger, now=now)
