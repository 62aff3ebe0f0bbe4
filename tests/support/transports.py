"""The transports under one roof, so that one test can run on each of them: real sockets, real keys, or memory."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvloop
import zmq

from miles_agents.virtual_time import run_virtual
from miles_agents.wire.keys import AllowList, ClientKeys, KeyPair
from miles_agents.wire.memory_transport import MemoryNetwork
from miles_agents.wire.transport import Buffer, Connection, Transport
from miles_agents.wire.unix_auth import proof_key
from miles_agents.wire.unix_transport import UnixAcceptor, UnixDialer
from miles_agents.wire.zmq_transport import ZmqAcceptor, ZmqDialer

DEADLINE_S = 30.0

# The first frame that is not copied starts pyzmq's collector thread, which then stays for the life of the process.
zmq.Frame(bytes(1 << 17), copy=False)


@dataclass
class Message:
    """One received message."""

    connection: Connection
    frames: list[Buffer]
    user_id: str

    @property
    def data(self) -> list[bytes]:
        return [bytes(frame) for frame in self.frames]


class Recorder:
    """A handler that remembers everything; ``react`` is called with each message after it was noted."""

    def __init__(self, react: Callable[[Message], None] | None = None) -> None:
        self.messages: list[Message] = []
        self.ups: list[Connection] = []
        self.downs: list[Connection] = []
        self.order: list[str] = []
        self.react = react
        self._changed = asyncio.Event()

    def on_up(self, connection: Connection) -> None:
        self.ups.append(connection)
        self._note("up")

    def on_down(self, connection: Connection) -> None:
        self.downs.append(connection)
        self._note("down")

    def on_message(self, connection: Connection, frames: Sequence[Buffer], user_id: str) -> None:
        message = Message(connection, list(frames), user_id)
        self.messages.append(message)
        self._note("message")
        if self.react is not None:
            self.react(message)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition that changes with what is heard here."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def _note(self, what: str) -> None:
        self.order.append(what)
        self._changed.set()


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait for a condition that nothing announces."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - polls what has no event
            await asyncio.sleep(0.005)


class World:
    """Makes acceptors and dialers of one kind, each with sockets of its own, and closes them all."""

    def __init__(self) -> None:
        self.made: list[Transport] = []

    def acceptor(self, handler: Recorder, address: str = "") -> Transport:
        raise NotImplementedError

    def dialer(self, address: str, handler: Recorder) -> Transport:
        raise NotImplementedError

    def another(self) -> World:
        """A world of the same kind that shares nothing with this one."""
        raise NotImplementedError

    async def pair(self) -> tuple[Transport, Recorder, Transport, Recorder, Connection]:
        """An acceptor and a dialer that have met: both sides, and the acceptor's name for the connection."""
        heard, told = Recorder(), Recorder()
        acceptor = self.acceptor(heard)
        dialer = self.dialer(acceptor.address, told)
        await told.until(lambda: bool(told.ups))
        assert dialer.send(b"", [b"hello"])
        await heard.until(lambda: bool(heard.messages))
        return acceptor, heard, dialer, told, heard.messages.pop().connection

    def close(self) -> None:
        for transport in self.made:
            transport.close()


class UnixWorld(World):
    """Unix sockets; with ``keys`` both sides prove theirs."""

    def __init__(self, *, keys: bool = False) -> None:
        super().__init__()
        self._directory = tempfile.TemporaryDirectory(prefix="mt-", dir="/tmp")
        self.directory = Path(self._directory.name)
        self.allow = AllowList() if keys else None

    def acceptor(self, handler: Recorder, address: str = "") -> Transport:
        transport = UnixAcceptor(address or f"unix://{self.directory}/{len(self.made)}", handler, allow=self.allow)
        self.made.append(transport)
        return transport

    def dialer(self, address: str, handler: Recorder) -> Transport:
        key = None
        if self.allow is not None:
            key = KeyPair.generate()
            self.allow.add(key.public, f"node-{len(self.allow)}", proof_key(key))
        transport = UnixDialer(address, handler, key=key)
        self.made.append(transport)
        return transport

    def another(self) -> World:
        return UnixWorld(keys=self.allow is not None)

    def close(self) -> None:
        super().close()
        left = os.listdir(self.directory)
        self._directory.cleanup()
        assert left == [], "socket files were left behind"


def _keyed_unix_world() -> World:
    return UnixWorld(keys=True)


class TcpWorld(World):
    def __init__(self) -> None:
        super().__init__()
        self.server = KeyPair.generate()
        self.allow = AllowList()

    def acceptor(self, handler: Recorder, address: str = "tcp://127.0.0.1:0") -> Transport:
        transport = ZmqAcceptor(address, handler, curve=self.server, allow=self.allow)
        self.made.append(transport)
        return transport

    def dialer(self, address: str, handler: Recorder) -> Transport:
        own = KeyPair.generate()
        self.allow.add(own.public, f"node-{len(self.allow)}")
        transport = ZmqDialer(address, handler, curve=ClientKeys(self.server.public, own))
        self.made.append(transport)
        return transport

    def another(self) -> World:
        return TcpWorld()


class MemoryWorld(World):
    def __init__(self) -> None:
        super().__init__()
        self.network = MemoryNetwork(seed=1)

    def acceptor(self, handler: Recorder, address: str = "") -> Transport:
        transport = self.network.acceptor(address or f"address-{len(self.made)}", handler)
        self.made.append(transport)
        return transport

    def dialer(self, address: str, handler: Recorder) -> Transport:
        transport = self.network.dialer(address, handler, user_id="somebody")
        self.made.append(transport)
        return transport

    def another(self) -> World:
        return MemoryWorld()


Run = Callable[[Coroutine[Any, Any, None]], None]


def _on_asyncio(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(main)


def _on_uvloop(main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)


KINDS: dict[str, tuple[Callable[[], World], Run]] = {
    "unix-asyncio": (UnixWorld, _on_asyncio),
    "unix-uvloop": (UnixWorld, _on_uvloop),
    "unix-keys": (_keyed_unix_world, _on_uvloop),
    "tcp-asyncio": (TcpWorld, _on_asyncio),
    "tcp-uvloop": (TcpWorld, _on_uvloop),
    "memory": (MemoryWorld, run_virtual),
}


def on_every_transport(body: Callable[[World], Awaitable[None]]) -> Callable[[str], None]:
    """Makes a test of ``async def body(world)``, run once on each kind of transport and event loop."""

    @pytest.mark.parametrize("kind", KINDS)
    def test(kind: str) -> None:
        make_world, run = KINDS[kind]

        async def main() -> None:
            world = make_world()
            try:
                await body(world)
            finally:
                world.close()

        run(main())

    test.__name__ = body.__name__
    test.__doc__ = body.__doc__
    return test
