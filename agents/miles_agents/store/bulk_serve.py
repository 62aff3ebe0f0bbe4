"""Hands objects to other agents: tickets, a listener while there are any, and threads that send.

Consumes offers (memory that stays for as long as they last) and connections. Produces the bytes of objects, to those
with a ticket. Waits for: hello, ``hello_s``; progress of a stream, ``idle_s``; a ticket that nobody uses expires
after ``idle_s``. Invariants: each stream of a ticket is sent to one connection, once; strangers cost a socket and a
comparison, at most ``_MAX_STRANGERS`` at a time, the oldest making place; an offer ends exactly once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from miles_agents.store.bulk_wire import (
    HELLO_BYTES,
    KEY_BYTES,
    MAX_STREAMS,
    TOKEN_BYTES,
    BadPeer,
    Ticket,
    chunks_of,
    is_authentic,
    streams_for,
    token_of,
)
from miles_agents.store.memory import Mapping

logger = logging.getLogger(__name__)
IDLE_S = 10.0
MAX_OFFERS = 4
HELLO_S = 5.0
ACCEPT_PAUSE_S = 0.1
_MAX_STRANGERS = 32


class Offer:
    """One object for one other agent."""

    def __init__(self, ticket: Ticket, mapping: Mapping, on_over: Callable[[], None]) -> None:
        self.ticket = ticket
        self.view = memoryview(mapping.exporter(ticket.nbytes)).cast("B")
        self.mapping = mapping
        self.unused = set(range(ticket.streams))
        self.sending: set[socket.socket] = set()
        self.on_over = on_over
        self.timer: asyncio.TimerHandle | None = None


class BulkServer:
    """See the module's docstring. Create and use it on the agent's loop. ``host``: where it listens."""

    def __init__(self, host: str, *, idle_s: float = IDLE_S, hello_s: float = HELLO_S) -> None:
        self.host = host
        self.num_refused = 0
        self.num_offers = 0
        self._idle_s = idle_s
        self._hello_s = hello_s
        self._loop = asyncio.get_running_loop()
        self._slots = asyncio.Semaphore(MAX_OFFERS)
        self._threads = ThreadPoolExecutor(MAX_OFFERS * MAX_STREAMS, thread_name_prefix="store-send")
        self._offers: dict[bytes, Offer] = {}
        self._listener: socket.socket | None = None
        self._pause: asyncio.TimerHandle | None = None
        self._closed = False
        self._strangers: dict[socket.socket, asyncio.Task[None]] = {}

    @property
    def is_listening(self) -> bool:
        """Whether anybody can connect."""
        return self._listener is not None

    async def slot(self) -> None:
        """Wait until one more offer may be made."""
        await self._slots.acquire()

    def free_slot(self) -> None:
        """An offer was not made after all."""
        self._slots.release()

    def offer(self, mapping: Mapping, nbytes: int, on_over: Callable[[], None]) -> Ticket:
        """Offer the first bytes of a mapping, in a slot. ``on_over`` is called when nobody reads it any more.

        Raises:
            OSError: There can be no listener.
        """
        port = self._listen()
        self.num_offers += 1
        token, key = secrets.token_bytes(TOKEN_BYTES), secrets.token_bytes(KEY_BYTES)
        offer = Offer(Ticket(self.host, port, token, key, nbytes, streams_for(nbytes)), mapping, on_over)
        self._offers[token] = offer
        self._expect_progress(offer)
        return offer.ticket

    def end(self, token: bytes) -> None:
        """The offer is over; what is still being sent is cut off."""
        offer = self._offers.pop(token, None)
        if offer is None:
            return
        if offer.timer is not None:
            offer.timer.cancel()
        offer.unused.clear()
        for channel in offer.sending:
            with contextlib.suppress(OSError):
                channel.shutdown(socket.SHUT_RDWR)
        if not offer.sending:
            self._over(offer)

    def close(self) -> None:
        """End everything."""
        self._closed = True
        for token in list(self._offers):
            self.end(token)
        self._stop_listening()
        self._threads.shutdown(wait=False, cancel_futures=True)

    # -- inside ------------------------------------------------------------------------------------------------

    def _over(self, offer: Offer) -> None:
        self._slots.release()
        offer.on_over()
        if self._closed:
            offer.mapping.unmap()
        else:
            self._threads.submit(offer.mapping.unmap)  # not here: it takes time
        if not self._offers:
            self._stop_listening()

    def _listen(self) -> int:
        if self._listener is None:
            family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
            listener = socket.create_server((self.host, 0), family=family, backlog=64)
            listener.setblocking(False)
            self._listener = listener
            self._watch(listener)
        return int(self._listener.getsockname()[1])

    def _watch(self, listener: socket.socket) -> None:
        self._pause = None
        self._loop.add_reader(listener.fileno(), self._accept, listener)

    def _stop_listening(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        if self._listener is not None:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None
        for greeting in list(self._strangers.values()):
            greeting.cancel()

    def _accept(self, listener: socket.socket) -> None:
        try:
            channel, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # No descriptors, mostly: whoever knocks goes on waiting, and the loop must not spin meanwhile.
            logger.warning("nobody can be let in who wants an object of the store: %s", error)
            self._loop.remove_reader(listener.fileno())
            self._pause = self._loop.call_later(ACCEPT_PAUSE_S, self._watch, listener)
            return
        channel.setblocking(False)
        if len(self._strangers) >= _MAX_STRANGERS:
            self.num_refused += 1
            self._strangers.pop(next(iter(self._strangers))).cancel()
        self._strangers[channel] = self._loop.create_task(self._greet(channel), name="store: a stranger")

    async def _greet(self, channel: socket.socket) -> None:
        """Until the hello is there, and right; then a thread goes on."""
        offer, stream = None, 0
        try:
            async with asyncio.timeout(self._hello_s):
                hello = await self._read_hello(channel)
            token, stream = token_of(hello)
            offer = self._offers.get(token)
            if offer is None or not is_authentic(hello, offer.ticket.key) or stream not in offer.unused:
                offer = None
                raise BadPeer("a token that is unknown, used up, or without its key")
        except (OSError, TimeoutError, BadPeer) as error:
            self.num_refused += 1
            logger.warning("somebody who wanted an object of the store was refused: %s", error or type(error).__name__)
        finally:
            self._strangers.pop(channel, None)
            if offer is None:
                channel.close()
        if offer is not None:
            offer.unused.discard(stream)
            offer.sending.add(channel)
            sending = self._loop.run_in_executor(self._threads, send_stream, channel, offer, stream, self._idle_s)
            sending.add_done_callback(lambda over: self._stream_over(offer, channel, over))

    async def _read_hello(self, channel: socket.socket) -> bytes:
        hello = b""
        while len(hello) < HELLO_BYTES:
            more = await self._loop.sock_recv(channel, HELLO_BYTES - len(hello))
            if not more:
                break
            hello += more
        return hello

    def _stream_over(self, offer: Offer, channel: socket.socket, over: asyncio.Future[None]) -> None:
        channel.close()
        offer.sending.discard(channel)
        error = None if over.cancelled() else over.exception()
        if error is not None:
            logger.info("an object of the store was not sent to its end: %s", error)
        if offer.ticket.token not in self._offers:
            if not offer.sending:
                self._over(offer)
        elif not offer.unused and not offer.sending:
            self.end(offer.ticket.token)
        else:
            self._expect_progress(offer)

    def _expect_progress(self, offer: Offer) -> None:
        if offer.timer is not None:
            offer.timer.cancel()
        offer.timer = self._loop.call_later(self._idle_s, self._expire, offer)

    def _expire(self, offer: Offer) -> None:
        if offer.sending:  # their own time limits apply
            self._expect_progress(offer)
        else:
            self.end(offer.ticket.token)


def send_stream(channel: socket.socket, offer: Offer, stream: int, idle_s: float) -> None:
    """Send one stream of an offer. Raises OSError, also when for ``idle_s`` nothing was taken."""
    channel.settimeout(idle_s)
    for offset, nbytes in chunks_of(offer.ticket.nbytes, stream, offer.ticket.streams):
        data = offer.view[offset : offset + nbytes]
        _send_all(channel, memoryview(offer.ticket.head(stream, offset, data)))
        _send_all(channel, data)


def _send_all(channel: socket.socket, data: memoryview) -> None:
    """Not ``sendall``: its time limit is for the whole, however steadily a slow reader takes it."""
    while data:
        data = data[channel.send(data) :]
