"""Two acceptors as one: whoever came by either is heard, answered by the same way, and counted once."""

from contextlib import asynccontextmanager

from support.transports import Recorder, TcpWorld, UnixWorld

from miles_agents.wire.joined_transport import JoinedAcceptor
from miles_agents.wire.transport import DIALED, Transport


class Hub:
    """A joined acceptor that echoes, and a dialer on either side of it."""

    def __init__(self, far, near):
        self.heard = Recorder(lambda message: self.joined.send(message.connection, message.frames))
        self.joined = JoinedAcceptor(far.acceptor(self.heard), near.acceptor(self.heard))
        self.told = {"far": Recorder(), "near": Recorder()}
        self.dialers = {
            "far": far.dialer(self.joined.address, self.told["far"]),
            "near": near.dialer(self.joined.local_address, self.told["near"]),
        }


@asynccontextmanager
async def a_hub():
    far, near = TcpWorld(), UnixWorld(keys=True)
    try:
        hub = Hub(far, near)
        for told in hub.told.values():
            await told.until(lambda told=told: bool(told.ups))
        yield hub
    finally:
        far.close()
        near.close()


async def test_each_is_answered_by_the_way_it_came():
    async with a_hub() as hub:
        assert isinstance(hub.joined, Transport)
        assert hub.joined.address.startswith("tcp://")
        assert hub.joined.local_address.startswith("unix://")
        for _ in range(20):
            for name, dialer in hub.dialers.items():
                assert dialer.send(DIALED, [name.encode()])
        for name, told in hub.told.items():
            await told.until(lambda told=told: len(told.messages) == 20)
            assert {message.frames[0] for message in told.messages} == {name.encode()}
        connections = {message.frames[0]: message.connection for message in hub.heard.messages}
        assert len({message.connection for message in hub.heard.messages}) == len(connections) == 2
        stats = hub.joined.stats
        assert (stats.sent_messages, stats.received_messages) == (40, 40)
        assert stats.sent_bytes == stats.received_bytes == 20 * (3 + 4)


async def test_the_end_of_a_connection_is_told_and_nothing_goes_to_it_or_to_strangers():
    async with a_hub() as hub:
        for name, dialer in hub.dialers.items():
            dialer.send(DIALED, [name.encode()])
        await hub.heard.until(lambda: len(hub.heard.messages) == 2)
        for name, dialer in hub.dialers.items():
            connection = next(m.connection for m in hub.heard.messages if m.frames[0] == name.encode())
            dialer.close()
            await hub.heard.until(lambda connection=connection: connection in hub.heard.downs)
            assert hub.joined.send(connection, [b"x"]) is False
        assert hub.joined.send(b"u nobody", [b"x"]) is False
        assert hub.joined.send(b"\0none", [b"x"]) is False
        assert hub.joined.stats.unsendable == 4


async def test_closing_closes_both():
    async with a_hub() as hub:
        hub.joined.close()
        hub.joined.close()
        for told in hub.told.values():
            await told.until(lambda told=told: bool(told.downs))
