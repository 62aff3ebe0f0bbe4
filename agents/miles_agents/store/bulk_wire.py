"""What goes over a connection on which one agent fetches an object from another. Pure: bytes in, bytes out.

The one who fetches says hello once: token, number of the stream, a MAC over both. Then the other sends the stream's
chunks in order: place, size, a MAC over token, stream, place, size and data, and the data. The key of all MACs came
over the encrypted channel of the run. So neither side does anything for who has no key, and no chunk can be changed,
left out, repeated, or moved within an object or between objects.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

CHUNK = 4 << 20
TOKEN_BYTES = 16
KEY_BYTES = 32
MAX_STREAMS = 4
_MAGIC = b"milespl1"
_STREAM = struct.Struct(">I")
_PLACE = struct.Struct(">QI")
_MAC = 32
HELLO_BYTES = len(_MAGIC) + TOKEN_BYTES + _STREAM.size + _MAC
HEAD_BYTES = _PLACE.size + _MAC


class BadPeer(Exception):
    """The other end does not know the key, or what came is not what was sent."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """What entitles to fetch one object once. ``streams`` connections, each with a number from 0 on."""

    host: str
    port: int
    token: bytes
    key: bytes
    nbytes: int
    streams: int

    def to_plain(self) -> list[Any]:
        """Plain values."""
        return [self.host, self.port, self.token, self.key, self.nbytes, self.streams]

    @classmethod
    def from_plain(cls, plain: Any) -> Ticket:
        """Inverse of ``to_plain``. Raises ValueError."""
        match plain:
            case [str(host), int(port), bytes(token), bytes(key), int(nbytes), int(streams)]:
                if len(token) == TOKEN_BYTES and len(key) == KEY_BYTES and nbytes > 0 and 0 < streams <= MAX_STREAMS:
                    return cls(host, port, token, key, nbytes, streams)
        raise ValueError("no ticket")

    def hello(self, stream: int) -> bytes:
        """The first bytes of a connection."""
        told = self.token + _STREAM.pack(stream)
        return _MAGIC + told + _mac(self.key, b"hello" + told)

    def head(self, stream: int, offset: int, data: memoryview) -> bytes:
        """What goes before a chunk."""
        place = _PLACE.pack(offset, data.nbytes)
        return place + self._chunk_mac(stream, place, data)

    def check_place(self, head: bytes, offset: int, nbytes: int) -> None:
        """Whether this is the chunk that comes next. Raises BadPeer."""
        if head[: _PLACE.size] != _PLACE.pack(offset, nbytes):
            raise BadPeer(f"a chunk that is not the one at {offset}")

    def check_data(self, stream: int, head: bytes, data: memoryview) -> None:
        """Whether the data are those that were sent. Raises BadPeer."""
        expected = self._chunk_mac(stream, head[: _PLACE.size], data)
        if not hmac.compare_digest(expected, head[_PLACE.size :]):
            raise BadPeer("a chunk whose checksum is wrong")

    def _chunk_mac(self, stream: int, place: bytes, data: memoryview) -> bytes:
        made = hmac.new(self.key, b"chunk" + self.token + _STREAM.pack(stream) + place, "sha256")
        made.update(data)
        return made.digest()


def token_of(hello: bytes) -> tuple[bytes, int]:
    """Token and stream that a hello names; ``is_authentic`` says whether it may. Raises BadPeer."""
    if len(hello) != HELLO_BYTES or not hello.startswith(_MAGIC):
        raise BadPeer("no hello")
    told = hello[len(_MAGIC) : -_MAC]
    return told[:TOKEN_BYTES], _STREAM.unpack(told[TOKEN_BYTES:])[0]


def is_authentic(hello: bytes, key: bytes) -> bool:
    """Whether who said hello has the key."""
    told = hello[len(_MAGIC) : -_MAC]
    return hmac.compare_digest(_mac(key, b"hello" + told), hello[-_MAC:])


def streams_for(nbytes: int) -> int:
    """How many connections fetch so many bytes."""
    return max(1, min(MAX_STREAMS, nbytes // (2 * CHUNK)))


def chunks_of(nbytes: int, stream: int, streams: int) -> Iterator[tuple[int, int]]:
    """Places and sizes of the chunks of one stream, in order."""
    for offset in range(stream * CHUNK, nbytes, streams * CHUNK):
        yield offset, min(CHUNK, nbytes - offset)


def _mac(key: bytes, told: bytes) -> bytes:
    return hmac.digest(key, told, "sha256")
