"""Links on the transport in memory, with recorders above them: hubs, dialers and strangers."""

from __future__ import annotations

import asyncio
from functools import wraps

from miles_agents.virtual_time import run_virtual
from miles_agents.wire import session as wire
from miles_agents.wire.envelope import CALL, Address, Envelope
from miles_agents.wire.link import LinkAcceptor, LinkDialer
from miles_agents.wire.link_handlers import Admission
from miles_agents.wire.memory_transport import Faults, MemoryNetwork
from miles_agents.wire.session import parse_frame
from miles_agents.wire.transport import DIALED
from support.transports import Recorder

LOSE_ALL = Faults(drop=1.0)
NO_FAULTS = Faults()


def virtual(test):
    """Run an async test on a virtual clock."""

    @wraps(test)
    def run(*args, **kwargs):
        run_virtual(test(*args, **kwargs))

    return run


def an_envelope(number, size=0, buffers=()):
    return Envelope(CALL, number, Address(2, 0, 1), 3, (0, 1, 0), body=bytes(size), buffers=list(buffers))


class Above:
    """What lies above a link: remembers all, and raises or acts where it is told to."""

    def __init__(self):
        self.heard = []  # (peer name, number)
        self.events = []
        self.verdict = None
        self.raising = {}  # callback -> exception
        self.acts = {}  # callback -> function of its peer

    def note(self, what, *details, peer=None):
        self.events.append((what, *details))
        if what in self.acts:
            self.acts[what](peer)
        if what in self.raising:
            raise self.raising[what]

    def count(self, what):
        return sum(event[0] == what for event in self.events)

    def numbers(self, name=None):
        return [number for peer, number in self.heard if name in (None, peer)]

    def on_envelope(self, peer, envelope):
        self.heard.append((peer.name, envelope.rid))
        self.note("envelope", envelope.rid, peer=peer)

    def on_peer_up(self, peer, *, resumed):
        self.note("up", peer.name, resumed, peer=peer)

    def on_peer_down(self, peer):
        self.note("down", peer.name, peer=peer)

    def on_beat(self, peer, beat_id, facts):
        self.note("beat", beat_id, facts, peer=peer)
        return {"answered": beat_id}

    def on_answer(self, peer, beat_id, facts):
        self.note("answer", beat_id, facts, peer=peer)

    def on_goodbye(self, peer, reason):
        self.note("goodbye", peer.name, reason, peer=peer)

    def admit(self, hello, user_id, session_id):
        self.note("admit", hello["name"], user_id, session_id)
        return self.verdict or Admission(hello["name"], {"seat": hello["name"]})

    def on_welcome(self, grant):
        self.note("welcome", grant)

    def on_refused(self, refusal):
        self.note("refused", refusal.reason, refusal.final)


class Acceptor:
    def __init__(self, network):
        self.above = Above()
        self.link = LinkAcceptor(self.above)
        self.link.attach(lambda handler: network.acceptor("hub:1", handler, host="hub"))

    def peer(self, name):
        return next(peer for peer in self.link.peers if peer.name == name)


class Dialer:
    def __init__(self, network, name="a", session=1, key=None):
        self.above = Above()
        self.network = network
        self.name = name
        self.link = LinkDialer(self.above, session, lambda: {"name": name})
        self.link.attach(
            lambda handler: network.dialer("hub:1", handler, host=name, user_id=f"key-{name}" if key is None else key)
        )

    def send(self, *numbers):
        for number in numbers:
            self.link.peer.send(an_envelope(number))

    def say(self, kind, payload=None, *, seq=0, ack=0):
        """A frame of this dialer's session that its link would not send."""
        self.raw(wire.pack_frame(kind, self.link.peer.session.session_id, seq, ack, payload))

    def raw(self, *frames):
        assert self.link.transport.send(DIALED, frames)

    async def beat(self, times=1):
        for _ in range(times):
            self.link.beat({})
            await asyncio.sleep(1)

    def lose(self, *, there=False, back=False):
        self.network.set_faults(self.name, "hub", LOSE_ALL if there else NO_FAULTS)
        self.network.set_faults("hub", self.name, LOSE_ALL if back else NO_FAULTS)

    def cut(self):
        (connection,) = self.network.connections(self.name, "hub")
        assert self.network.cut(connection)


class Stranger:
    """Speaks frames of its own making."""

    def __init__(self, network, host="x", key="key-x"):
        self.heard = Recorder()
        self.transport = network.dialer("hub:1", self.heard, host=host, user_id=key)

    def say(self, kind, session, payload=None, *, seq=0, ack=0):
        assert self.transport.send(DIALED, [wire.pack_frame(kind, session, seq, ack, payload)])

    def kinds(self):
        return [parse_frame(message.frames[0]).kind for message in self.heard.messages]

    def last(self):
        return parse_frame(self.heard.messages[-1].frames[0])


async def met(name="a", **options):
    """A hub and a dialer that has been welcomed."""
    network = MemoryNetwork()
    hub, dialer = Acceptor(network), Dialer(network, name, **options)
    await asyncio.sleep(1)
    assert dialer.link.is_welcome
    return network, hub, dialer


async def settled():
    await asyncio.sleep(0.05)
