"""``miles logs``: the output of a run's processes, from the files of its run directory.

Consumes: names, as ``trainer-1``, ``trainer[1]``, ``1``, ``engine-0``, ``controller``. Produces: their lines. Waits
for: more lines, with ``-f``, until the run has ended. Invariants: what is in memory is bounded, whatever the files'
size; a process that was started again is followed into its new file.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from miles_agents.agent.logs import LogTail
from miles_agents.errors import ConfigError, EnvironmentFault
from miles_launcher.runs import Run, find_run

LINES = 50
_POLL_S = 0.3
_BLOCK = 64 * 1024
_SEARCHED = 64 * 1024 * 1024
"""How far back line ends are looked for; where so much has none, lines begin there."""
_EVERYTHING = 1 << 62
_FILE = re.compile(r"(?P<name>.+?)(?:\.(?P<life>[0-9]+))?\.log")


class NoSuchLog(ConfigError):
    """No process of the run is called so."""

    code = "E-CLI-007"


class NoLogs(EnvironmentFault):
    """The run's log files cannot be read from here."""

    code = "E-CLI-008"


@dataclass(frozen=True)
class Log:
    """The output of one life of a process.

    Attributes:
        name: The process's: ``trainer-0``.
        node: Where it is; empty: the controller's machine.
        life: Number of its life, growing; 0 where it has one file for all.
        path: The file.
    """

    name: str
    node: str
    life: int
    path: Path


def print_logs(name: str | None, processes: Sequence[str], *, lines: int | None = LINES, follow: bool = False) -> None:
    """Print the last ``lines`` of each process (None: all of them); without any, list what there is.

    Raises:
        NoSuchRun, NoSuchLog, NoLogs.
    """
    run = find_run(name)
    logs = read_directory(run)
    if not processes:
        Console().print(_table(logs))
        return
    wanted = [choose(logs, process) for process in processes]
    prefixes = [f"{log.name} | " if len(wanted) > 1 else "" for log in wanted]
    followers = [
        Follower(log, lambda text, prefix=prefix: _write(prefix + text), lines)  # type: ignore[misc]
        for log, prefix in zip(wanted, prefixes, strict=True)
    ]
    try:
        _pump(run, followers, follow=follow)
    finally:
        for follower in followers:
            follower.close()


def _pump(run: Run, followers: Sequence[Follower], *, follow: bool) -> None:
    while True:
        is_over = not follow or not run.is_alive  # asked before the last read: then nothing is missed
        newest = {(log.node, log.name): log for log in _listed(run)}
        for follower in followers:
            follower.read(newest.get((follower.log.node, follower.log.name)), is_over=is_over)
        sys.stdout.flush()
        if is_over:
            break
        time.sleep(_POLL_S)
    if follow:
        sys.stderr.write(f"run {run.run_id} has ended\n")


class Follower:
    """Reads one process's output, into its next life if there is one.

    Args:
        log: The life to begin with.
        write: Takes lines.
        lines: How many to begin with; None: all.
    """

    def __init__(self, log: Log, write: Callable[[str], None], lines: int | None) -> None:
        self.log = log
        self._write = write
        start = 0 if lines is None else start_of_last(log.path, lines)
        self._tail = LogTail(log.path, start=start, max_lag_bytes=_EVERYTHING)

    def read(self, newest: Log | None, *, is_over: bool) -> None:
        """What there is now."""
        self._drain()
        if newest is not None and newest.life > self.log.life:
            self._finish()
            self._write(f"==> {newest.name} was started again: {newest.path} <==")
            self.log, self._tail = newest, LogTail(newest.path, max_lag_bytes=_EVERYTHING)
            self._drain()
        if is_over:
            self._finish()

    def close(self) -> None:
        """Let go of the file."""
        self._tail.close()

    def _drain(self) -> None:
        before = -1
        while self._tail.offset != before:
            before = self._tail.offset
            self._all(self._tail.read(_BLOCK))

    def _finish(self) -> None:
        self._all(self._tail.finish(_BLOCK))

    def _all(self, lines: Iterable[str]) -> None:
        for line in lines:
            self._write(line)


def start_of_last(path: Path, count: int) -> int:
    """Where the last ``count`` lines of a file begin, in bytes; an unfinished one counts."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, 2)
            position, needed = end, count + 1
            if end and count:
                file.seek(end - 1)
                needed -= file.read(1) != b"\n"
            while position > max(0, end - _SEARCHED) and count:
                size = min(_BLOCK, position)
                position -= size
                file.seek(position)
                block = file.read(size)
                found = block.count(b"\n")
                if found >= needed:
                    return position + _nth_from_end(block, needed) + 1
                needed -= found
            return position if count else end
    except FileNotFoundError:
        return 0


def _nth_from_end(block: bytes, count: int) -> int:
    place = len(block)
    for _ in range(count):
        place = block.rfind(b"\n", 0, place)
    return place


def read_directory(run: Run) -> list[Log]:
    """The newest life of each process. Raises NoLogs."""
    logs = _listed(run)
    if logs:
        return logs
    where = "the run writes no files" if run.run_dir is None else f"no log in {run.run_dir / 'logs'}"
    raise NoLogs(
        f"run {run.run_id} has no logs that can be read here",
        evidence=where,
        advice="Nodes that do not share the run directory have their logs themselves; `miles status` names them.",
    )


def _listed(run: Run) -> list[Log]:
    if run.run_dir is None:
        return []
    newest: dict[tuple[str, str], Log] = {}
    root = run.run_dir / "logs"
    for path in sorted([*root.glob("*.log"), *root.glob("*/*.log")]):
        match = _FILE.fullmatch(path.name)
        if match is None:
            continue
        node = "" if path.parent == root else path.parent.name
        log = Log(match["name"], node, int(match["life"] or 0), path)
        before = newest.get((node, log.name))
        if before is None or before.life < log.life:
            newest[node, log.name] = log
    return list(newest.values())


def choose(logs: Sequence[Log], text: str) -> Log:
    """The process that is meant: by name, by ``name@node`` where several nodes have one, or a rank of the trainer.

    Raises:
        NoSuchLog: None is called so, or several.
    """
    name, _, node = text.partition("@")
    name = f"trainer-{name}" if name.isdecimal() else re.sub(r"\[([0-9]+)\]$", r"-\1", name)
    found = [log for log in logs if log.name == name and (not node or log.node == node)]
    if len(found) == 1:
        return found[0]
    if found:
        # A process that has moved has files on both nodes: the newest life is it.
        newest = max(found, key=lambda log: log.life)
        if newest.life:
            return newest
    shown = ", ".join(sorted(f"{log.name}@{log.node}" if log in found and log.node else log.name for log in logs))
    raise NoSuchLog(
        f"several processes are called {name!r}" if found else f"no process of the run is called {text!r}",
        evidence=f"there are {shown}",
        advice="Name one of those, as name@node where several nodes have one.",
    )


def _table(logs: Sequence[Log]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("process", "node", "KiB", "written", "file"):
        table.add_column(column, overflow="fold", header_style="dim", justify="right" if column == "KiB" else "left")
    for log in sorted(logs, key=lambda log: (log.node, log.name)):
        try:
            found = log.path.stat()
        except OSError:
            continue
        ago = f"{max(0.0, time.time() - found.st_mtime):.0f} s ago"
        cells = (log.name, log.node or "-", f"{found.st_size / 1024:.0f}", ago, str(log.path))
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")
