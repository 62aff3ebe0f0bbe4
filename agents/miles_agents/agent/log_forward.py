"""From many log files to the controller's console, without ever slowing a process or the link.

* Consumes: files that grow, read on the agent's tick within a byte budget (``poll(now)``, or ``turns(now)``, which lets
  others run between two slices).
* Produces: batches of entries through ``send``, one in flight: the next goes when the one before is answered, and after
  the pause that its answer asks for. A controller with a thousand nodes can only show so much.
* Waits for: lines (woken by ``poll``), that pause (a minute at most), and the answer to a batch (``send`` itself must
  end; a batch that failed is sent again after a pause, so the controller may see its lines twice, never out of order).
* Invariants: what is not forwarded is counted and reported in the stream with the path of the file that has it; the
  queue is bounded, in bytes, and the more the longer the pauses are: of a flood the newest lines are kept, and the last
  words of processes and notices of what is missing before all.

A batch is plain data: a list of ``[source, time, text, ranks]``; ``time`` is the agent's loop time at reading, in
seconds; ``ranks`` is empty for a line of one process and names the ranks that repeated a line otherwise.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from miles_agents.agent.log_dedup import LogDedup, Merged, rank_ranges, wanted
from miles_agents.agent.logs import LogCannotShrink, LogTail, OpenTail, Tail, cap_file
from miles_agents.errors import MilesError

Entry: TypeAlias = list[str | float | list[int]]
Send: TypeAlias = Callable[[list[Entry]], Awaitable[float]]
"""Sends a batch; returns for how many seconds no other is to be sent."""
MAX_PAUSE_S = 60.0


@dataclass(frozen=True, slots=True)
class LogSource:
    """Whose lines: ``trainer[3]@node-a``, or ``web@node-a`` for a process without ranks (a service)."""

    group: str
    rank: int | None
    node: str

    def __str__(self) -> str:
        return f"{self.group}@{self.node}" if self.rank is None else f"{self.group}[{self.rank}]@{self.node}"


@dataclass(frozen=True, slots=True)
class ForwardLimits:
    """Bounds of forwarding. Sizes in bytes, times in seconds."""

    rate_bytes: float = 64 * 1024
    burst_bytes: float = 256 * 1024
    batch_bytes: int = 8 * 1024
    queue_bytes: int = 1024 * 1024
    stale_s: float = 10.0
    poll_bytes: int = 512 * 1024
    poll_file_bytes: int = 128 * 1024
    slice_bytes: int = 8 * 1024
    report_s: float = 5.0
    send_s: float = 10.0
    retry_s: float = 1.0
    file_bytes: int = 1024**3
    file_head_bytes: int = 16 * 1024**2
    cap_s: float = 10.0


class TokenBucket:
    """Allows ``rate`` bytes per second, after a pause up to ``burst`` at once."""

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._at = now

    def take(self, amount: float, now: float) -> bool:
        """Spend ``amount`` if it is there. Amounts over ``burst`` pass when the bucket is full."""
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        if self._tokens < min(amount, self._burst):
            return False
        self._tokens -= amount
        return True


@dataclass(slots=True)
class _Process:
    source: LogSource
    tail: Tail
    bucket: TokenBucket
    filter_state: str | None = None
    dropped_lines: int = 0
    dropped_bytes: int = 0
    report_at: float = 0.0
    can_shrink: bool = True
    fault_told: bool = False


@dataclass(slots=True)
class _Queue:
    """Entries that wait to be sent, and how many there ever were."""

    entries: deque[tuple[int, Entry, bool]] = field(default_factory=deque)
    size: int = 0
    added: int = 0
    done: int = 0

    def add(self, entry: Entry, size: int, *, keep: bool) -> None:
        self.entries.append((size, entry, keep))
        self.size += size
        self.added += 1

    def trim(self, max_bytes: int) -> int:
        """Let go of the oldest entries that are not to be kept, until so much is left; returns how many went."""
        kept: deque[tuple[int, Entry, bool]] = deque()
        before = len(self.entries)
        for size, entry, keep in self.entries:
            if self.size > max_bytes and not keep:
                self.size -= size
            else:
                kept.append((size, entry, keep))
        self.entries = kept
        self.done += before - len(kept)
        return before - len(kept)

    def head(self, max_bytes: int) -> list[Entry]:
        batch: list[Entry] = []
        total = 0
        for size, entry, _ in self.entries:
            if batch and total + size > max_bytes:
                break
            batch.append(entry)
            total += size
        return batch

    def drop_head(self, count: int) -> None:
        for _ in range(count):
            self.size -= self.entries.popleft()[0]
        self.done += count


class LogForwarder:
    """Tails the processes of one node and sends what a person wants to see. One task runs ``run``."""

    def __init__(
        self, node: str, send: Send, limits: ForwardLimits | None = None, *, open_tail: OpenTail | None = None
    ) -> None:
        self._node = node
        self._send = send
        self._open_tail = open_tail or _tail_of_file
        self._limits = limits or ForwardLimits()
        self._queue_bytes = self._limits.queue_bytes
        self._processes: dict[LogSource, _Process] = {}
        self._dedup = LogDedup()
        self._queue = _Queue()
        self._changed = asyncio.Condition()
        self._news = asyncio.Event()
        self.num_faults = 0
        """How often a file could not be read or kept small. Told once for each file."""
        self._turn = 0
        self._cap_at = 0.0

    def add(self, group: str, rank: int | None, path: Path, now: float, *, start: int = 0) -> Tail:
        """Follow a process from byte ``start`` of its file on; its lines also stand in the returned tail's ring.

        ``rank`` None: a service, whose lines all count as those of rank 0 do and are merged with nobody's.
        """
        source = LogSource(group, rank, self._node)
        if source in self._processes:
            self.finish(group, rank, now)
        bucket = TokenBucket(self._limits.rate_bytes, self._limits.burst_bytes, now)
        tail = self._open_tail(path, start)
        self._processes[source] = _Process(source, tail, bucket)
        return tail

    def finish(self, group: str, rank: int | None, now: float) -> list[str]:
        """The process has exited: forward its last lines, forget it, and return them (at most 200)."""
        process = self._processes.pop(LogSource(group, rank, self._node), None)
        if process is None:
            return []
        # The last words of a process that said too much are the ones to keep: no limit but the burst holds for them.
        lines = self._read(process, lambda: process.tail.finish(int(self._limits.burst_bytes)), now)
        process.tail.close()
        self._take(process, lines, now, limited=False)
        self._report_dropped(process, now)
        return process.tail.last_lines()

    def close(self) -> None:
        """Let go of all files. What is queued stays queued."""
        for process in self._processes.values():
            process.tail.close()
        self._processes.clear()

    def poll(self, now: float) -> None:
        """Read what is new, within the budget, starting with another process each time."""
        for _ in self.turns(now):
            pass

    def turns(self, now: float) -> Iterator[None]:
        """``poll`` in slices, each a millisecond's work."""
        processes = list(self._processes.values())
        self._turn += 1
        budget = self._limits.poll_bytes
        for index in range(len(processes)):
            process = processes[(index + self._turn) % len(processes)]
            share = min(budget, self._limits.poll_file_bytes)
            while share > 0 and self._processes.get(process.source) is process:
                before = process.tail.offset
                self._take(process, self._read_some(process, min(share, self._limits.slice_bytes), now), now)
                if process.tail.offset == before:
                    break
                share -= process.tail.offset - before
                budget -= process.tail.offset - before
                yield
            if process.dropped_lines and now >= process.report_at:
                self._report_dropped(process, now)
        self._put_merged(self._dedup.tick(now), now)
        if now >= self._cap_at:
            self._cap_at = now + self._limits.cap_s
            for process in processes:
                self._cap(process, now)

    async def run(self) -> None:
        """Send until cancelled."""
        while True:
            await self._news.wait()
            batch = self._queue.head(self._limits.batch_bytes)
            if not batch:
                self._news.clear()
                continue
            try:
                async with asyncio.timeout(self._limits.send_s):
                    pause_s = await self._send(batch)
            except (MilesError, OSError):  # a timeout is an OSError: the controller is away, the lines wait
                await asyncio.sleep(self._limits.retry_s)
                continue
            self._queue.drop_head(len(batch))
            async with self._changed:
                self._changed.notify_all()
            self._heed(pause_s)
            if pause_s > 0:
                await asyncio.sleep(min(pause_s, MAX_PAUSE_S))

    def _heed(self, pause_s: float) -> None:
        """Keep no more than can be shown soon: what is shown minutes later helps nobody."""
        limits = self._limits
        self._queue_bytes = limits.queue_bytes
        if pause_s > 0:
            self._queue_bytes = min(limits.queue_bytes, int(limits.batch_bytes * max(2.0, limits.stale_s / pause_s)))
        dropped = self._queue.trim(self._queue_bytes)
        if dropped:
            text = f"[log: {dropped} lines of this node were too many to show; they are in its log files]"
            self._put([f"logs@{self._node}", asyncio.get_running_loop().time(), text, []], len(text))

    async def flush(self, deadline: float) -> bool:
        """Barrier: True when all complete lines written before the call were sent (or reported as dropped).

        ``run`` must be running. False if ``deadline`` (loop time) came first; nothing is lost then.
        """
        loop = asyncio.get_running_loop()
        for process in list(self._processes.values()):
            end = self._size(process)
            while process.tail.offset < end and loop.time() < deadline:
                before = process.tail.offset
                lines = self._read_some(process, end - before, loop.time())
                self._take(process, lines, loop.time())
                await asyncio.sleep(0)
                if process.tail.offset == before:
                    break
            self._report_dropped(process, loop.time())
        self._put_merged(self._dedup.flush(), loop.time())
        target = self._queue.added
        try:
            async with asyncio.timeout_at(deadline), self._changed:
                await self._changed.wait_for(lambda: self._queue.done >= target)
        except TimeoutError:
            return False
        return True

    def _take(self, process: _Process, lines: list[str], now: float, *, limited: bool = True) -> None:
        source = process.source
        for line in lines:
            want, process.filter_state = wanted(source.rank or 0, line, process.filter_state)
            if not want:
                continue
            size = len(line)
            full = self._queue.size + size > self._queue_bytes
            if limited and (full or not process.bucket.take(size, now)):
                if not process.dropped_lines:
                    process.report_at = now + self._limits.report_s
                process.dropped_lines += 1
                process.dropped_bytes += size
            elif source.rank is None:
                self._put([str(source), now, line, []], size, keep=not limited)
            else:
                self._put_merged(self._dedup.add(source.group, source.rank, line, now), now, keep=not limited)

    def _report_dropped(self, process: _Process, now: float) -> None:
        if not process.dropped_lines:
            return
        notice = (
            f"[log: {process.dropped_lines} lines ({process.dropped_bytes} bytes) were too many to show; "
            f"they are in {process.tail.path}]"
        )
        process.dropped_lines = process.dropped_bytes = 0
        self._notice(process, notice, now)

    def _notice(self, process: _Process, text: str, now: float) -> None:
        """Say something about a process. Its own held lines go first."""
        source = process.source
        if source.rank is not None:
            self._put_merged(self._dedup.release(source.group, source.rank), now)
        self._put([str(source), now, text, []], len(text), keep=True)

    def _read_some(self, process: _Process, max_bytes: int, now: float) -> list[str]:
        return self._read(process, lambda: process.tail.read(min(max_bytes, self._limits.poll_file_bytes)), now)

    def _read(self, process: _Process, read: Callable[[], list[str]], now: float) -> list[str]:
        """The file is the process's: whatever it makes of it (a directory, say) is told once and hurts nobody else."""
        try:
            return read()
        except OSError as error:
            self._note_fault(process, f"cannot be read: {error.strerror or error}", now)
            return []

    def _size(self, process: _Process) -> int:
        try:
            return process.tail.size()
        except OSError:
            return 0

    def _note_fault(self, process: _Process, what: str, now: float) -> None:
        self.num_faults += 1
        if not process.fault_told:
            process.fault_told = True
            self._notice(process, f"[log: {process.tail.path} {what}]", now)

    def _cap(self, process: _Process, now: float) -> None:
        if not process.can_shrink:
            return
        try:
            cap_file(process.tail.path, self._limits.file_bytes, self._limits.file_head_bytes)
        except LogCannotShrink as error:
            process.can_shrink = False  # said once for each file
            self._notice(process, f"[log: {error.what}: {error.evidence}]", now)
        except OSError as error:
            self._note_fault(process, f"cannot be kept small: {error.strerror or error}", now)

    def _put_merged(self, lines: list[Merged], now: float, *, keep: bool = False) -> None:
        for line in lines:
            if len(line.ranks) == 1:
                source = str(LogSource(line.group, line.ranks[0], self._node))
                self._put([source, now, line.text, []], len(line.text), keep=keep)
            else:
                ranks: list[int] = list(line.ranks)
                text = f"{line.text} [numbers differ]" if line.varied else line.text
                self._put([f"{line.group}@{self._node}", now, text, ranks], len(text), keep=keep)

    def _put(self, entry: Entry, size: int, *, keep: bool = False) -> None:
        self._queue.add(entry, size + 64, keep=keep)
        self._news.set()


def _tail_of_file(path: Path, start: int) -> Tail:
    return LogTail(path, start=start)


def render(entry: Entry) -> str:
    """An entry as a console line: ``trainer[3]@node-a | text``, ``trainer[1-7]@node-a | (x7) text``."""
    source, _, text, ranks = entry
    if isinstance(ranks, list) and ranks:
        group, _, node = str(source).partition("@")
        return f"{group}[{rank_ranges(tuple(ranks))}]@{node} | (x{len(ranks)}) {text}"
    return f"{source} | {text}"
