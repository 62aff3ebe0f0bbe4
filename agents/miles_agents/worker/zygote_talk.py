"""What an agent and its zygotes say to each other: message formats of both ends.

On the control socket (SOCK_SEQPACKET): the agent's ``Wishes`` and then batches of starts; the zygote's one ``Verdict``.
On a worker's line (SOCK_SEQPACKET, one per start): the steps of the hand-over, see docs/design.md, "Fast start". All of
it is msgpack or plain bytes between processes of one version; nothing of it can come from anybody else.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import msgpack

LEAVE = b"leave"
"""Agent to M: the worker is known, end."""
HERE = b"here"
"""Worker to agent: the agent is its parent, and its life is bound to the agent's."""
GO = b"go"
"""Agent to worker: it is watched, become the worker."""
MAX_BATCH = 64
"""Workers per control message; each takes three descriptors, and the kernel passes on no more than 253."""
MAX_MESSAGE = 1 << 16


@dataclass(frozen=True, slots=True)
class Wishes:
    """The agent's first message.

    Attributes:
        sys_path: What to append to ``sys.path``.
        also: Modules to import beside those that were named: they are there, and harmless.
        agent: The parent of all workers.
    """

    sys_path: tuple[str, ...]
    also: tuple[str, ...]
    agent: int

    def pack(self) -> bytes:
        """As a message."""
        packed: bytes = msgpack.packb(asdict(self), unicode_errors="surrogateescape")
        return packed

    @classmethod
    def unpack(cls, message: bytes) -> Wishes:
        """Inverse of ``pack``."""
        plain = msgpack.unpackb(message, unicode_errors="surrogateescape")
        return cls(tuple(plain["sys_path"]), tuple(plain["also"]), plain["agent"])


@dataclass(frozen=True, slots=True)
class Verdict:
    """The zygote's one message. Neither ``missing`` nor ``refusal``: it is ready.

    ``missing``: the module that is not found without the run's own ``sys.path`` entries. ``refusal``: why it must not
    fork.
    """

    missing: str = ""
    refusal: str = ""

    def pack(self) -> bytes:
        """As a message."""
        packed: bytes = msgpack.packb(asdict(self))
        return packed

    @classmethod
    def unpack(cls, message: bytes) -> Verdict:
        """Inverse of ``pack``."""
        return cls(**msgpack.unpackb(message))


@dataclass(frozen=True, slots=True)
class Start:
    """One worker to be made.

    Attributes:
        options: For ``exec_shim.settle``.
        env: The worker's complete environment.
        birth: A packed ``Birth``.
    """

    options: dict[str, str]
    env: dict[str, str]
    birth: bytes

    def pack(self) -> bytes:
        """For a memory file of its own: it may be larger than a message, and only its worker is to read it."""
        # Environments may hold any bytes.
        packed: bytes = msgpack.packb(asdict(self), unicode_errors="surrogateescape")
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> Start:
        """Inverse of ``pack``."""
        return cls(**msgpack.unpackb(data, unicode_errors="surrogateescape"))


def born(pid: int, start_time: int) -> bytes:
    """Worker to agent, its first word: who it is."""
    return f"born {pid} {start_time}".encode()


def parse_born(message: bytes) -> tuple[int, int] | None:
    """Pid and start time; None if this is another message."""
    words = message.split()
    if len(words) != 3 or words[0] != b"born":
        return None
    return int(words[1]), int(words[2])
