"""Turns: what is sent while messages are being read leaves together, once the last of them was read.

Each thread has one. A transport opens it around the messages that one read brought; a peer that sends meanwhile
asks to be flushed at its end. That saves a tick of the event loop for each message on its way through a hop, and
still sends the answers to a batch as a batch.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)


class Turn:
    """A context: ``reading`` is true inside; at the end every ``flush`` that was asked for runs once, in order.

    ``more``: further messages of this turn are known to come, so what is sent now can wait for them.
    A turn inside a turn belongs to the outer one.
    """

    __slots__ = ("_due", "more", "reading")

    def __init__(self) -> None:
        self.reading = False
        self.more = False
        self._due: list[Callable[[], None]] = []

    def at_end(self, flush: Callable[[], None]) -> None:
        """Run this when the turn ends."""
        self._due.append(flush)

    def begin(self) -> bool:
        """Open the turn. False: it is open, and not the caller's to end."""
        if self.reading:
            return False
        self.reading = True
        return True

    def end(self) -> None:
        """Close the turn, and flush."""
        self.reading = self.more = False
        if self._due:
            due, self._due = self._due, []
            for flush in due:
                try:
                    flush()
                except Exception:  # boundary: one peer of many; the others' messages must leave
                    logger.exception("a peer could not be flushed")

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is sent inside leaves at the end, all at once; in a turn that is open, at its end."""
        is_ours, more = self.begin(), self.more
        self.more = True
        try:
            yield
        finally:
            self.more = more
            if is_ours:
                self.end()


class _Turns(threading.local):
    def __init__(self) -> None:
        self.turn = Turn()


_turns = _Turns()


def current_turn() -> Turn:
    """The calling thread's."""
    return _turns.turn
