"""Which lines of many ranks a person wants to see, and how equal ones become one. Pure: no I/O, no clock.

Two parts. ``wanted`` picks: everything of rank 0; of other ranks warnings, errors and whole tracebacks.
``LogDedup`` merges what different ranks of one group say alike:

* consumes lines in the order read, and ``now``; produces ``Merged`` lines;
* waits for nothing: a repeat is held at most ``window_s``, then ``tick`` gives it out;
* invariants: every line given is in exactly one ``Merged``, in order for each rank; a first occurrence comes out
  of the very call that brought it; one ``Merged`` never holds two lines of the same rank.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass, field

WINDOW_S = 3.0
MAX_OPEN = 2048
MAX_OPEN_PER_LINE = 16

_UUID_OR_HEX = re.compile(
    r"\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b"
    r"|\b0[xX][0-9a-fA-F]+\b"
    r"|\b(?=[a-fA-F]*\d)(?=\d*[a-fA-F])[0-9a-fA-F]{8,}\b"
)
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
_LETTER = re.compile(r"[^\W\d_]")

_SEVERE = re.compile(
    r"\b(?:WARN|WARNING|ERROR|CRITICAL|FATAL)\b"
    r"|(?:Error|Exception|Warning)\b"
    r"|\bFatal\b|\berror:|\bfatal:"
    r"|^[WEF]\d{4} "  # glog, as torch's C++ side writes it
    r"|Segmentation fault|\bAborted\b|core dumped|^Killed\b|^terminate called"
    r"|^(?:\[rank\d+\]: *)?(?:During handling of the above exception|The above exception was the direct cause)"
)
_STACK_START = re.compile(r"(?:Exception Group )?Traceback \(most recent call last\):|most recent call first\)?:")


def wanted(rank: int, line: str, state: str | None) -> tuple[bool, str | None]:
    """Whether the line goes to the console; the rest stays in the file.

    Args:
        rank: Rank 0 is forwarded fully.
        line: One line.
        state: What the call for the rank's line before returned; None at the start. Inside a traceback it is the
            prefix that each of its lines carries (torch writes ``[rank3]: `` there), else None.
    """
    start = _STACK_START.search(line)
    if start is not None:
        return True, _stack_prefix(line[: start.start()])
    if state is None:
        return rank == 0 or _SEVERE.search(line) is not None, None
    body = line.removeprefix(state)
    inside = not body.strip() or body[0] in " \t|+"
    # The first line that is not indented is the exception itself, and the last of the block.
    return True, state if inside else None


def _stack_prefix(before: str) -> str:
    """What stands before "Traceback" on every line of the block; log formats stand on its first line only."""
    found = re.match(r"\[[^\]]*\]:? ?$", before)
    return before if found else ""


def template(line: str) -> str | None:
    """The line with numbers, hex and uuids masked; None if nothing but numbers would be left to compare."""
    masked = _NUMBER.sub("#", _UUID_OR_HEX.sub("#", line))
    if "#" in masked and _LETTER.search(masked) is None:
        return None
    return masked


@dataclass(frozen=True, slots=True)
class Merged:
    """One line to show, said by each of ``ranks`` once.

    ``text`` is the wording of ``ranks[0]``; ``varied`` says that others differed from it in numbers. A repeat of a
    line that was shown before has ``repeat`` set.
    """

    group: str
    ranks: tuple[int, ...]
    text: str
    repeat: bool = False
    varied: bool = False

    def __str__(self) -> str:
        if not self.repeat:
            return f"[{self.group} {self.ranks[0]}] {self.text}"
        differ = ", numbers differ" if self.varied else ""
        return f"[{self.group} {rank_ranges(self.ranks)}] (x{len(self.ranks)}{differ}) {self.text}"


def rank_ranges(ranks: tuple[int, ...]) -> str:
    """``(1, 2, 3, 7)`` as ``1-3,7``."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)


@dataclass(slots=True)
class _Open:
    """A line shown a moment ago, and who has repeated it since."""

    key: tuple[str, str]
    first_rank: int
    closes: float
    text: str = ""
    ranks: list[int] = field(default_factory=list)
    varied: bool = False


class LogDedup:
    """Merges equal lines of different ranks of a group within a window."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window = window_s
        self._next = 0
        # By number, oldest first. They close in this order only: so a rank's held lines keep their order.
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._by_key: dict[tuple[str, str], list[int]] = {}
        self._last_held: dict[tuple[str, int], int] = {}

    def add(self, group: str, rank: int, text: str, now: float) -> list[Merged]:
        """Take one line; returns what is to be shown now."""
        masked = template(text)
        if masked is None:
            return [*self.release(group, rank), Merged(group, (rank,), text)]
        key = (group, masked)
        number = self._joinable(key, rank)
        if number is not None:
            self._hold(number, rank, text)
            return []
        out = self.release(group, rank)
        out.append(Merged(group, (rank,), text))
        numbers = self._by_key.setdefault(key, [])
        numbers.append(self._next)
        self._open[self._next] = _Open(key, rank, now + self._window)
        self._next += 1
        if len(numbers) > MAX_OPEN_PER_LINE:
            out += self._close_through(numbers[0])
        if len(self._open) > MAX_OPEN:
            out += self._close_through(next(iter(self._open)))
        return out

    def tick(self, now: float) -> list[Merged]:
        """The repeats whose window has ended."""
        out: list[Merged] = []
        while self._open:
            number, oldest = next(iter(self._open.items()))
            if oldest.closes > now:
                break
            out += self._close_through(number)
        return out

    def flush(self) -> list[Merged]:
        """All repeats that are held."""
        return self._close_through(self._next)

    def next_deadline(self) -> float | None:
        """When ``tick`` has work next; None if nothing is open."""
        return next(iter(self._open.values())).closes if self._open else None

    def _joinable(self, key: tuple[str, str], rank: int) -> int | None:
        """The oldest open line like this that the rank has not said and that comes after what is held of it."""
        numbers = self._by_key.get(key, [])
        after = self._last_held.get((key[0], rank), -1)
        for number in numbers[bisect_right(numbers, after) :]:
            # A rank that is held in a line is never after it, so only the first speaker needs a look.
            if self._open[number].first_rank != rank:
                return number
        return None

    def _hold(self, number: int, rank: int, text: str) -> None:
        held = self._open[number]
        if not held.ranks:
            held.text = text
        held.varied = held.varied or text != held.text
        held.ranks.append(rank)
        self._last_held[held.key[0], rank] = number

    def release(self, group: str, rank: int) -> list[Merged]:
        """Show what is held of a rank, before a newer line of it is shown."""
        last = self._last_held.get((group, rank))
        return [] if last is None else self._close_through(last)

    def _close_through(self, last: int) -> list[Merged]:
        out: list[Merged] = []
        while self._open and next(iter(self._open)) <= last:
            number, closed = self._open.popitem(last=False)
            numbers = self._by_key[closed.key]
            numbers.remove(number)
            if not numbers:
                del self._by_key[closed.key]
            group = closed.key[0]
            for rank in closed.ranks:
                if self._last_held.get((group, rank)) == number:
                    del self._last_held[group, rank]
            if closed.ranks:
                out.append(Merged(group, tuple(closed.ranks), closed.text, repeat=True, varied=closed.varied))
        return out
