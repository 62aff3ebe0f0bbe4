"""The unix socket at which an agent's store is asked by the workers of its node.

Consumes connections, questions; produces answers and descriptors. Waits for: HELLO, ``_HELLO_S`` at most; then the
next question, for as long as the worker lives (its end closes the connection). Invariants: nobody without a token of a
living worker gets anything; a connection has one question open; what was granted to a connection and not committed
ends with it; a connection that cannot take its answer is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

from miles_agents.agent.background import Background
from miles_agents.errors import InternalError, MilesError
from miles_agents.store import messages
from miles_agents.store.errors import NotAllowedHere
from miles_agents.store.ref import Ref
from miles_agents.store.table import Owner

logger = logging.getLogger(__name__)
_HELLO_S = 5.0
_ACCEPT_PAUSE_S = 0.1
_MAX_STRANGERS = 64
_MAX_CONNECTIONS = 4096


class Visitor:
    """One connection of one worker. ``granted``: segment to request, of what it may write now."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.owner: Owner | None = None
        self.granted: dict[int, int] = {}
        self.asking: asyncio.Task[None] | None = None
        self.committed: list[Ref] = []
        self.told: list[Any] = []
        """The last question that was answered."""
        self.timer: asyncio.TimerHandle | None = None

    @property
    def me(self) -> Owner:
        """Who it is, after HELLO."""
        assert self.owner is not None
        return self.owner


Answer = tuple[list[Any], int | None]
"""An answer's values, and a descriptor to send along (and close here)."""


class Desk(Protocol):
    """Who answers."""

    def owner_of(self, token: str, process: int) -> Owner | None:
        """The living worker with that token, or a process that it forked off."""

    async def answer(self, visitor: Visitor, question: list[Any]) -> Answer:
        """Answer a question. Raises MilesError, and ValueError, TypeError or LookupError for a malformed one."""

    def not_taken(self, visitor: Visitor, question: list[Any]) -> None:
        """The answer did not reach the visitor."""

    def left(self, visitor: Visitor) -> None:
        """A connection has ended."""


class StoreDoor:
    """See the module's docstring. Create and use it on the agent's loop."""

    def __init__(self, path: Path, desk: Desk, tasks: Callable[[], Background | None]) -> None:
        self.path = path
        self.num_refused = 0
        self._desk = desk
        self._tasks = tasks
        self._loop = asyncio.get_running_loop()
        self._visitors: set[Visitor] = set()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            self._listener.setblocking(False)
            self._listener.bind(str(path))
            self._listener.listen(128)
        except BaseException:
            self._listener.close()
            raise
        self._pause: asyncio.TimerHandle | None = None
        self._watch()

    def close(self) -> None:
        """Hang up on everybody."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._listener.fileno())
        self._listener.close()
        with contextlib.suppress(OSError):
            self.path.unlink()
        for visitor in list(self._visitors):
            self._hang_up(visitor)

    def is_here(self, ident: str) -> bool:
        """Whether that process has a connection."""
        return any(visitor.owner is not None and visitor.owner.ident == ident for visitor in self._visitors)

    def hang_up_on(self, begin: str) -> None:
        """Those whose ident begins so are dead; others may have their connections."""
        for visitor in [v for v in self._visitors if v.owner is not None and v.owner.ident.startswith(begin)]:
            self._hang_up(visitor)

    def _watch(self) -> None:
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            channel, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # No descriptors, mostly: whoever knocks goes on waiting, and the loop must not spin meanwhile.
            logger.warning("the store can let nobody in: %s", error)
            self._loop.remove_reader(self._listener.fileno())
            self._pause = self._loop.call_later(_ACCEPT_PAUSE_S, self._watch)
            return
        strangers = sum(visitor.owner is None for visitor in self._visitors)
        full = strangers >= _MAX_STRANGERS or len(self._visitors) >= _MAX_CONNECTIONS
        if full or messages.uid_of_peer(channel) != os.geteuid():
            self.num_refused += 1
            channel.close()
            return
        channel.setblocking(False)
        visitor = Visitor(channel)
        self._visitors.add(visitor)
        visitor.timer = self._loop.call_later(_HELLO_S, self._refuse, visitor)
        self._loop.add_reader(channel.fileno(), self._on_readable, visitor)

    def _on_readable(self, visitor: Visitor) -> None:
        try:
            question, fd = messages.receive(visitor.channel)
        except BlockingIOError:
            return
        except (EOFError, OSError) as error:
            if isinstance(error, ConnectionResetError) and visitor.told:
                self._desk.not_taken(visitor, visitor.told)  # it ended without reading its last answer
            self._hang_up(visitor)
            return
        except ValueError:
            self._refuse(visitor)
            return
        if fd is not None:
            os.close(fd)
        if visitor.owner is None:
            self._greet(visitor, question)
            return
        tasks = self._tasks()
        if visitor.asking is not None or tasks is None:
            self._refuse(visitor)
            return
        visitor.asking = tasks.create_task(self._ask(visitor, question), name=f"store: {question[0]}"[:64])

    def _greet(self, visitor: Visitor, question: list[Any]) -> None:
        match question:
            case [messages.HELLO, str(token), int(process)]:
                visitor.owner = self._desk.owner_of(token, process)
        if visitor.owner is None:
            refused = NotAllowedHere(
                "the store does not know this process",
                evidence="it gave no token of a living worker",
                advice="Use the store from inside a worker, while it lives.",
            )
            self._send(visitor, messages.describe(refused), None)
            self._refuse(visitor)
            return
        if visitor.timer is not None:
            visitor.timer.cancel()
        self._send(visitor, [messages.OK], None)

    async def _ask(self, visitor: Visitor, question: list[Any]) -> None:
        fd: int | None = None
        try:
            values, fd = await self._attempt(self._desk.answer(visitor, question))
            visitor.asking, visitor.told = None, question
            if not self._send(visitor, values, fd):
                self._desk.not_taken(visitor, question)
        except asyncio.CancelledError:
            visitor.asking = None
            raise
        finally:
            if fd is not None:
                os.close(fd)

    async def _attempt(self, answering: Awaitable[Answer]) -> Answer:
        try:
            values, fd = await answering
        except MilesError as error:
            return messages.describe(error), None
        except (ValueError, TypeError, LookupError) as error:  # what the worker sent is not what it should be
            refused = NotAllowedHere(
                "the store does not understand a question",
                evidence=f"{type(error).__name__}: {error}",
                advice="Start all processes of a run from the same version of the code; if they are, report this.",
            )
            return messages.describe(refused), None
        except Exception as error:  # boundary: one question of one worker; the others have nothing to do with it
            logger.exception("a question to the store failed")
            broken = InternalError(
                "the store failed", evidence=f"{type(error).__name__}: {error}", advice="Look at the agent's log."
            )
            return messages.describe(broken), None
        return [messages.OK, *values], fd

    def _send(self, visitor: Visitor, message: list[Any], fd: int | None) -> bool:
        if visitor not in self._visitors:
            return False
        try:
            messages.send(visitor.channel, message, fd)
        except (OSError, ValueError) as error:
            logger.debug("an answer of the store could not be sent: %s", error)
            self._hang_up(visitor)
            return False
        return True

    def _refuse(self, visitor: Visitor) -> None:
        self.num_refused += 1
        self._hang_up(visitor)

    def _hang_up(self, visitor: Visitor) -> None:
        if visitor not in self._visitors:
            return
        self._visitors.discard(visitor)
        if visitor.timer is not None:
            visitor.timer.cancel()
        self._loop.remove_reader(visitor.channel.fileno())
        visitor.channel.close()
        if visitor.asking is not None:
            visitor.asking.cancel()
        self._desk.left(visitor)
