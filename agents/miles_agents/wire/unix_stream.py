"""Messages on one connected unix stream socket. The kernel keeps order and loses nothing while both ends live.

Consumes: messages to send, from any thread; bytes. Produces: whole messages (``on_frames``), one word of the end
(``on_end``), both on the event loop. Waits for: room in the socket; what did not fit is kept, in order, and the windows
of the sessions bound it. Invariants: a message arrives whole or not at all; what came before the end of the stream is
read before its end is told; after ``close`` nothing is called back.

On the wire a message is: number of frames, the size of each (all 32 bit, little-endian), the frames.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence

from miles_agents.wire.transport import ZERO_COPY_BYTES, Buffer
from miles_agents.wire.turns import current_turn

MAX_FRAMES = 110_000
"""More than a batch of envelopes can have."""
_SCRATCH_BYTES = 512 * 1024
"""The sizes of the most frames have to fit."""
_JOINED_BYTES = SMALL_BYTES = 64 * 1024
"""Messages up to this size are copied together, because one small write is faster than a vector of pieces."""
_VECTOR = 512
"""Pieces for one ``sendmsg``; the kernel takes 1024."""
_READS_PER_TURN = 16
_SINGLE = struct.Struct("<II")


class BrokenStream(Exception):
    """The peer sent bytes that are no message; the connection is of no more use."""


class _Scratch(threading.local):
    """One reading buffer per thread: most reads end with a whole message, and nothing stays in it."""

    def __init__(self) -> None:
        self.bytes = bytearray(_SCRATCH_BYTES)
        self.view = memoryview(self.bytes)


_scratch = _Scratch()


class Stream:
    """See the module's docstring. Created on the event loop that reads it; owns the socket from then on."""

    def __init__(
        self,
        sock: socket.socket,
        max_frame_bytes: int,
        on_frames: Callable[[list[Buffer]], None],
        on_end: Callable[[str], None],
    ) -> None:
        sock.setblocking(False)
        self.on_frames = on_frames
        self.closed = False
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._socket = sock
        self._max_frame_bytes = max_frame_bytes
        self._send = sock.send
        self._recv_into = sock.recv_into
        self._lock = threading.RLock()
        self._out: deque[memoryview] = deque()
        self._writing = False
        self._rest = b""
        self._partial: _Partial | None = None
        self._loop.add_reader(sock.fileno(), self._on_readable)

    # -- sending, from any thread ----------------------------------------------------------------------------

    def send(self, frames: Sequence[bytes | memoryview]) -> bool:
        """Send a message of flat frames, or keep what does not fit now. False: the stream is over."""
        sizes = [len(frame) for frame in frames]
        head = struct.pack(f"<{len(frames) + 1}I", len(frames), *sizes)
        if sum(sizes) <= _JOINED_BYTES:
            return self._send_piece(b"".join([head, *frames]))
        pieces = [head, *filter(len, frames)]
        with self._lock:
            if self.closed:
                return False
            if self._out:
                self._out.extend(map(memoryview, pieces))
                return True
            try:
                self._write(pieces)
            except OSError:
                return False  # the reader finds the end, after what came before it
            return True

    def send_small(self, frame: bytes) -> bool:
        """``send`` for one small frame: nearly all messages are such."""
        return self._send_piece(_SINGLE.pack(1, len(frame)) + frame)

    def _send_piece(self, piece: bytes) -> bool:
        with self._lock:
            if self._out or self.closed:
                if not self.closed:
                    self._out.append(memoryview(piece))
                return not self.closed
            try:
                sent = self._send(piece)
            except BlockingIOError:
                sent = 0
            except OSError:
                return False  # see send
            if sent < len(piece):
                self._keep([piece], sent)
            return True

    def _write(self, pieces: Sequence[bytes | memoryview]) -> None:
        """As much as the socket takes; the rest is kept."""
        for start in range(0, len(pieces), _VECTOR):
            some = pieces[start : start + _VECTOR]
            try:
                sent = self._socket.sendmsg(some)
            except BlockingIOError:
                sent = 0
            if sent < sum(map(len, some)):
                self._keep([*some, *pieces[start + _VECTOR :]], sent)
                return

    def _keep(self, pieces: Sequence[bytes | memoryview], sent: int) -> None:
        for piece in pieces:
            if sent >= len(piece):
                sent -= len(piece)
            else:
                self._out.append(memoryview(piece)[sent:])
                sent = 0
        if threading.get_ident() == self._thread:
            self._want_room()
        else:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and with it this stream
                self._loop.call_soon_threadsafe(self._want_room)

    def _want_room(self) -> None:
        if self._out and not self._writing and not self.closed:
            self._writing = True
            self._loop.add_writer(self._socket.fileno(), self._on_writable)

    def _on_writable(self) -> None:
        with self._lock:
            try:
                while self._out and not self.closed:
                    some = [self._out[i] for i in range(min(len(self._out), _VECTOR))]
                    sent = self._socket.sendmsg(some)
                    self._drop(sent)
            except BlockingIOError:
                return
            except OSError:
                self._out.clear()
            if not self.closed:
                self._writing = False
                self._loop.remove_writer(self._socket.fileno())

    def _drop(self, sent: int) -> None:
        while sent:
            piece = self._out[0]
            if sent < len(piece):
                self._out[0] = piece[sent:]
                return
            sent -= len(piece)
            self._out.popleft()

    # -- reading, on the loop --------------------------------------------------------------------------------

    def _on_readable(self) -> None:
        turn = current_turn()
        is_ours = not turn.reading
        turn.reading = True
        try:
            # A read that did not fill the buffer has emptied the socket; the loop reports what comes after it.
            for _ in range(_READS_PER_TURN):
                if self._partial is not None:
                    if not self._read(self._partial.room):
                        break
                elif self._rest:
                    kept = len(self._rest)
                    _scratch.view[:kept] = self._rest
                    if kept + self._read(_scratch.view[kept:], kept) < _SCRATCH_BYTES:
                        break
                elif self._read(_scratch.view) < _SCRATCH_BYTES:
                    break
        except BrokenStream as error:
            self._end(f"not our protocol: {error}")
        finally:
            if is_ours:
                turn.end()

    def _read(self, room: memoryview, kept: int = 0) -> int:
        """One read, and what it brought. 0: there is nothing (more) to read."""
        try:
            num_read = self._recv_into(room)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._end(f"{type(error).__name__}: {error}")
            return 0
        if not num_read:
            self._end("the peer closed the connection")
        elif self._partial is not None:
            self._fill(self._partial, num_read)
        else:
            self._rest = b""
            self._parse(kept + num_read)
        return 0 if self.closed else num_read

    def _fill(self, partial: _Partial, num_read: int) -> None:
        if partial.took(num_read):
            self._partial = None
            self._deliver(partial.frames())

    def _parse(self, end: int) -> None:
        """The messages in the scratch buffer; what is left of an incomplete one is put aside."""
        view, data, start = _scratch.view, _scratch.bytes, 0
        turn = current_turn()
        while end - start >= _SINGLE.size:
            count, size = _SINGLE.unpack_from(data, start)
            if count == 1 and size < ZERO_COPY_BYTES:  # nearly all messages are such
                body = start + _SINGLE.size
                after = body + size
                if after > end:
                    break
                frames: list[Buffer] = [bytes(view[body:after])]
            else:
                body, sizes = self._sizes(start, end, count)
                after = body + sum(sizes)
                if not sizes:
                    break
                if after > end:
                    if after - start <= _JOINED_BYTES:
                        break
                    self._begin_partial(sizes, view[body:end])
                    return
                frames = _cut(view, body, sizes)
            turn.more = after < end
            try:
                self.on_frames(frames)
            except Exception as error:  # noqa: BLE001 - boundary: one message of many; those behind it are others'
                self._report(error)
            if self.closed:
                return
            start = after
        if start < end:
            self._rest = bytes(view[start:end])
            if len(self._rest) >= _SCRATCH_BYTES:
                raise BrokenStream("the sizes of a message do not fit into the buffer")

    def _sizes(self, start: int, end: int, count: int) -> tuple[int, Sequence[int]]:
        """Where the frames of the message at ``start`` begin, and their sizes; none if these have not come yet."""
        if not 0 < count <= MAX_FRAMES:
            raise BrokenStream(f"a message of {count} frames")
        body = start + 4 + 4 * count
        if body > end:
            return body, ()
        sizes = struct.unpack_from(f"<{count}I", _scratch.bytes, start + 4)
        if max(sizes) > self._max_frame_bytes:
            raise BrokenStream(f"a frame of {max(sizes)} bytes; limit {self._max_frame_bytes}")
        return body, sizes

    def _begin_partial(self, sizes: Sequence[int], have: memoryview) -> None:
        partial = _Partial(sizes)
        while len(have):
            room = partial.room
            fits = min(len(room), len(have))
            room[:fits] = have[:fits]
            have = have[fits:]
            partial.took(fits)
        self._partial = partial

    def _deliver(self, frames: list[Buffer]) -> None:
        try:
            self.on_frames(frames)
        except Exception as error:  # noqa: BLE001 - boundary: as in _parse
            self._report(error)

    def _report(self, error: Exception) -> None:
        self._loop.call_exception_handler({"message": "a message handler failed", "exception": error})

    # -- the end ---------------------------------------------------------------------------------------------

    def _end(self, why: str) -> None:
        if not self.closed:
            self.close()
            self._on_end(why)

    def close(self) -> None:
        """Close now. Idempotent."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            self._out.clear()
            fd = self._socket.fileno()
            self._loop.remove_reader(fd)
            if self._writing:
                self._loop.remove_writer(fd)
            self._socket.close()


class _Partial:
    """A message too large for the scratch buffer, on its way into memory of its own, a frame after the other."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self._frames: list[Buffer] = []
        self._memory = bytearray(sizes[0])
        self._filled = 0
        self._finish_full()

    @property
    def room(self) -> memoryview:
        """Where the next bytes go."""
        return memoryview(self._memory)[self._filled :]

    def took(self, num_bytes: int) -> bool:
        """So many bytes came. True: the message is whole."""
        self._filled += num_bytes
        self._finish_full()
        return len(self._frames) == len(self._sizes)

    def _finish_full(self) -> None:
        while self._filled == len(self._memory):
            memory = self._memory
            self._frames.append(bytes(memory) if len(memory) < ZERO_COPY_BYTES else memoryview(memory))
            if len(self._frames) == len(self._sizes):
                return
            self._memory = bytearray(self._sizes[len(self._frames)])
            self._filled = 0

    def frames(self) -> list[Buffer]:
        """The message."""
        return self._frames


def _cut(view: memoryview, start: int, sizes: Sequence[int]) -> list[Buffer]:
    frames: list[Buffer] = []
    for size in sizes:
        part = view[start : start + size]
        frames.append(bytes(part) if size < ZERO_COPY_BYTES else memoryview(bytearray(part)))
        start += size
    return frames
