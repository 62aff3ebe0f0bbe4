"""Fetches an object from another agent, by ticket: several connections, each received by a thread of its own.

Consumes a ticket and memory to fill. Produces the object's bytes there, all of them checked, or an error. Waits for:
connections and data, ``_IDLE_S`` without progress at most. Invariant: when ``fetch`` ends, however, no thread writes
into that memory any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from miles_agents.store.bulk_wire import HEAD_BYTES, MAX_STREAMS, BadPeer, Ticket, chunks_of

MAX_PULLS = 4
_IDLE_S = 10.0
_CONNECT_S = 5.0


@dataclass(slots=True)
class _Transfer:
    """One fetch. ``channels`` are its connections now; with ``stopped`` no thread of it goes on."""

    ticket: Ticket
    to: memoryview
    channels: set[socket.socket] = field(default_factory=set)
    stopped: bool = False


class BulkClient:
    """See the module's docstring. Use it on the agent's loop. ``slots``: for the fetches that may be under way."""

    def __init__(self) -> None:
        self.slots = asyncio.Semaphore(MAX_PULLS)
        self._threads = ThreadPoolExecutor(MAX_PULLS * MAX_STREAMS, thread_name_prefix="store-receive")
        self._lock = threading.Lock()
        self._transfers: list[_Transfer] = []

    @property
    def num_transfers(self) -> int:
        """Fetches that are under way."""
        return len(self._transfers)

    def close(self) -> None:
        """Cut off what is under way; its threads end by themselves, at once."""
        for transfer in self._transfers:
            self._stop(transfer)
        self._threads.shutdown(wait=False)

    async def fetch(self, ticket: Ticket, to: memoryview) -> None:
        """Fill ``to``. Raises OSError, BadPeer.

        Whoever cancels this waits for the threads all the same: they write into memory that is used again.
        """
        transfer = _Transfer(ticket, to)
        self._transfers.append(transfer)
        loop = asyncio.get_running_loop()
        jobs = [
            loop.run_in_executor(self._threads, self._receive, transfer, stream) for stream in range(ticket.streams)
        ]
        try:
            await asyncio.wait(jobs, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            self._stop(transfer)
            try:
                await _all_done(jobs)
            finally:
                self._transfers.remove(transfer)
                errors = [error for job in jobs if (error := job.exception()) is not None]
        if errors:
            raise errors[0]

    def _stop(self, transfer: _Transfer) -> None:
        with self._lock:
            transfer.stopped = True
            for channel in transfer.channels:
                with contextlib.suppress(OSError):
                    channel.shutdown(socket.SHUT_RDWR)

    def _receive(self, transfer: _Transfer, stream: int) -> None:
        ticket = transfer.ticket
        if transfer.stopped:
            raise BadPeer("another connection of this fetch failed")
        with socket.create_connection((ticket.host, ticket.port), timeout=_CONNECT_S) as channel:
            with self._lock:
                if transfer.stopped:
                    raise BadPeer("another connection of this fetch failed")
                transfer.channels.add(channel)
            try:
                channel.settimeout(_IDLE_S)
                channel.sendall(ticket.hello(stream))
                head = memoryview(bytearray(HEAD_BYTES))
                for offset, nbytes in chunks_of(ticket.nbytes, stream, ticket.streams):
                    _fill(channel, head)
                    ticket.check_place(bytes(head), offset, nbytes)
                    data = transfer.to[offset : offset + nbytes]
                    _fill(channel, data)
                    ticket.check_data(stream, bytes(head), data)
            finally:
                with self._lock:
                    transfer.channels.discard(channel)


async def _all_done(jobs: list[asyncio.Future[None]]) -> None:
    """Until all threads have ended, which is soon: their connections are cut. Cancellation waits, too."""
    cancelled = False
    while left := [job for job in jobs if not job.done()]:
        try:
            await asyncio.wait(left)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError


def _fill(channel: socket.socket, view: memoryview) -> None:
    while view.nbytes:
        count = channel.recv_into(view)
        if not count:
            raise BadPeer("the other end hung up")
        view = view[count:]
