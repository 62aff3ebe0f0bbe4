"""Proof of a key on a unix socket: who dials must hold the secret of a key that is allowed, and so must who accepts.

The directory of the socket is closed to other users already; this keeps a process of the same user (an actor, say)
from passing for a node by its name alone. Nothing is encrypted: the bytes never leave the kernel; whoever of the same
user sits between the two and passes their words on is not found out (docs/security.md). The proof is a challenge and
its response, HMAC-SHA256 under a key derived from the secret half of the node's CURVE key, which the controller made
and therefore knows::

    acceptor: [MAGIC, a]                    a, d: 32 random bytes
    dialer:   [public key, d, HMAC(k, "dialer" a d)]
    acceptor: [HMAC(k, "acceptor" a d)]
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence

from miles_agents.wire.keys import AllowList, KeyPair
from miles_agents.wire.transport import Buffer

MAGIC = b"MILES-UNIX-1"
_NONCE_BYTES = 32


def proof_key(pair: KeyPair) -> bytes:
    """What both ends of a node's local connection know, derived from the node's secret key."""
    return hashlib.sha256(b"miles local proof\0" + pair.secret.encode("ascii")).digest()


def _mac(key: bytes, role: bytes, accepted: bytes, dialed: bytes) -> bytes:
    return hmac.digest(key, role + accepted + dialed, "sha256")


class AcceptorProof:
    """The accepting side of one handshake."""

    def __init__(self, allow: AllowList) -> None:
        self._allow = allow
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self.public = ""

    def challenge(self) -> list[bytes | memoryview]:
        """The first message."""
        return [MAGIC, self._nonce]

    def answer(self, frames: Sequence[Buffer]) -> list[bytes | memoryview] | str:
        """The last message, or why the dialer is turned away."""
        if len(frames) != 3 or len(frames[1]) != _NONCE_BYTES:
            return "not our protocol"
        public, nonce, proof = (bytes(frame) for frame in frames)
        name = public.decode("ascii", "replace")
        key = self._allow.proof_key_of(name)
        if key is None:
            return "the key is not allowed"
        if not hmac.compare_digest(proof, _mac(key, b"dialer", self._nonce, nonce)):
            return "the key was not proved"
        self.public = name
        return [_mac(key, b"acceptor", self._nonce, nonce)]


class DialerProof:
    """The dialing side of one handshake."""

    def __init__(self, pair: KeyPair) -> None:
        self._pair = pair
        self._key = proof_key(pair)
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._expected = b""

    def answer(self, frames: Sequence[Buffer]) -> list[bytes | memoryview] | None:
        """What to say to the acceptor's message. None: nothing more, both have proved themselves.

        Raises:
            ValueError: the acceptor is not ours, or did not prove that it knows this node.
        """
        if self._expected:
            if len(frames) != 1 or not hmac.compare_digest(bytes(frames[0]), self._expected):
                raise ValueError("the acceptor did not prove that it knows this node's key")
            return None
        if len(frames) != 2 or bytes(frames[0]) != MAGIC or len(frames[1]) != _NONCE_BYTES:
            raise ValueError("not our protocol")
        challenge = bytes(frames[1])
        self._expected = _mac(self._key, b"acceptor", challenge, self._nonce)
        proof = _mac(self._key, b"dialer", challenge, self._nonce)
        return [self._pair.public.encode("ascii"), self._nonce, proof]
