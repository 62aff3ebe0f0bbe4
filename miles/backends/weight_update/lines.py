"""The lines of one update to the engines' ranks that this trainer rank sends to, and what they have said. No torch.

Invariants: an engine that failed once is not spoken to again in this update, ``failures`` says why; waiting ends when
all have answered, failed, or said nothing for ``timeout_s``. Who says that it was cut off (others did not hand on a
broadcast) is no cause of it: ``is_broken`` tells at once, ``settle_blame`` who it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from miles.backends.weight_update.stream import Line, StreamBroken, readable

Peer = tuple[str, int]
"""An engine's name, and which of its ranks."""
_BLAME_S = 3.0
"""The end of an engine is heard of about when others are cut off by it."""


class Lines:
    """``close`` it: engines that are still receiving give up."""

    def __init__(self, expected: Iterable[Peer], timeout_s: float) -> None:
        self.failures: dict[str, str] = {}
        self.engine_seconds = 0.0
        """The most that one engine's rank took to load the buckets."""
        self.groups: dict[Peer, str] = {}
        """The process group that each was in when it connected; empty: none."""
        self._expected = frozenset(expected)
        self._engines = sorted({engine for engine, _ in self._expected})
        self._timeout_s = timeout_s
        self._lines: dict[Peer, Line] = {}
        self._done: set[Peer] = set()
        self._joined: set[Peer] = set()
        self._loaded: dict[Peer, int] = {}
        self._seconds: dict[Peer, float] = {}
        self._cut_off: dict[str, str] = {}

    @property
    def is_broken(self) -> bool:
        """Whether not everybody will come to the end."""
        return bool(self.failures or self._cut_off)

    @property
    def peers(self) -> list[Peer]:
        """Those that are connected, are not done, and have not failed."""
        return list(self._lines)

    def missing(self) -> set[str]:
        """Engines of which a rank has not connected yet."""
        absent = self._expected - self._lines.keys() - self._done
        return {engine for engine, _ in absent if engine not in self.failures}

    def take(self, line: Line, hello: dict[str, Any]) -> None:
        """A connection that knew the token."""
        peer = (str(hello.get("engine")), int(hello.get("rank", -1)))
        if peer not in self._expected or peer in self._lines or peer[0] in self.failures:
            line.close()
            return
        self._lines[peer] = line
        self.groups[peer] = str(hello.get("group", ""))
        self._loaded[peer], self._seconds[peer] = -1, 0.0

    def fail(self, engine: str, why: str) -> None:
        """Let go of it."""
        self.failures.setdefault(engine, why)
        for peer in [peer for peer in self._lines if peer[0] == engine]:
            self._lines.pop(peer).close()

    def tell(self, message: Callable[[Peer], dict[str, Any]]) -> None:
        """To all, each its own."""
        for peer, line in list(self._lines.items()):
            if peer in self._lines:  # else its engine has failed on the way
                try:
                    line.send(message(peer))
                except StreamBroken as error:
                    self._hear_last_words(peer, str(error))

    def listen(self, wait_s: float) -> bool:
        """Take in what was said, waiting so long for a first word. Returns whether there was any."""
        peers = {line.fileno(): peer for peer, line in self._lines.items()}
        ready = readable(peers, wait_s)
        for fileno in ready:
            peer = peers[fileno]
            if peer in self._lines:
                self._hear(peer)
        return bool(ready)

    def await_loaded(self, number: int) -> None:
        """Until everybody has loaded that bucket, or failed."""
        self._until(lambda peer: self._loaded[peer] >= number, f"loaded bucket {number}")

    def await_joined(self) -> None:
        """Until everybody is in the process group, or failed."""
        self._until(lambda peer: peer in self._joined, "joined the process group")

    def await_done(self) -> None:
        """Until everybody holds the weights, or failed."""
        self._until(lambda peer: peer in self._done, "come to the end")

    def fail_slowest(self, why: str) -> None:
        """Of those that have not come to the end: who has loaded the least holds up the others."""
        least = min((self._loaded[peer] for peer in self._lines), default=0)
        for engine, rank in [peer for peer in self._lines if self._loaded[peer] == least]:
            self.fail(engine, f"rank {rank} {why}")

    def hear_of_blame(self) -> None:
        """After what takes everybody has broken off: wait a little for whoever was the cause to be heard of."""
        deadline = time.monotonic() + min(_BLAME_S, self._timeout_s)
        while self._lines and not self.failures and (left := deadline - time.monotonic()) > 0:
            self.listen(left)

    def settle_blame(self) -> None:
        """After a broadcast has broken off: if nobody is known to be the cause, those that were cut off have failed,
        and if there are none, all."""
        self.hear_of_blame()
        if not self.failures:
            failed = self._cut_off or dict.fromkeys(self._engines, "a broadcast broke off; its log may say why")
            for engine, why in failed.items():
                self.fail(engine, why)

    def are_done(self, engines: Iterable[str]) -> bool:
        """Whether all ranks of these that connect here have come to the end."""
        wanted = set(engines)
        return all(peer in self._done for peer in self._expected if peer[0] in wanted)

    def close(self) -> None:
        """See the class."""
        for line in self._lines.values():
            line.close()
        self._lines.clear()

    def _until(self, is_done: Callable[[Peer], bool], what: str) -> None:
        deadline = time.monotonic() + self._timeout_s
        while waiting := [peer for peer in self._lines if not is_done(peer)]:
            left = deadline - time.monotonic()
            if left <= 0:
                for engine, rank in waiting:
                    self.fail(engine, f"rank {rank} has not {what} within {self._timeout_s:g} s")
                return
            if self.listen(min(left, 1.0)):
                deadline = time.monotonic() + self._timeout_s

    def _hear(self, peer: Peer) -> None:
        try:
            message = self._lines[peer].receive()
        except StreamBroken as error:
            self.fail(peer[0], f"rank {peer[1]}: {error}")
            return
        match message.get("said"):
            case "cut off":
                self._cut_off.setdefault(peer[0], f"rank {peer[1]}: {message['why']}")
                self._lines.pop(peer).close()
            case "joined":
                self._joined.add(peer)
            case "loaded":
                self._loaded[peer] = int(message["number"])
                self._seconds[peer] += float(message["seconds"])
                self.engine_seconds = max(self.engine_seconds, self._seconds[peer])
            case "done":
                self._done.add(peer)
                self._lines.pop(peer).close()

    def _hear_last_words(self, peer: Peer, otherwise: str) -> None:
        """Whoever lets go of a line has said why, if it could."""
        while peer in self._lines and self._lines[peer].has_message():
            self._hear(peer)
        if peer in self._lines:
            self.fail(peer[0], f"rank {peer[1]}: {otherwise}")
