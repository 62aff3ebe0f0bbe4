"""Keys of a run: who may talk to whom.

A key is a CURVE (Curve25519) key in Z85 text, 40 characters. The controller has one pair for the run; each node
has one of its own, which travels to its agent as one line on standard input and is never written down by us.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

import zmq

from miles_agents.errors import ConfigError

_Z85_KEY = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_BUNDLE_VERSION = 1
_BUNDLE_FIELDS = ("run_id", "node", "controller_public", "public", "secret")


class InvalidKey(ConfigError):
    """A key or a key line is malformed, incomplete, or its halves do not belong together."""

    code = "E-KEY-001"


class KeyConflict(ConfigError):
    """One public key was allowed for two different nodes."""

    code = "E-KEY-002"


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A CURVE key pair, both halves Z85. The secret half is in no ``repr`` and in no error text."""

    public: str
    secret: str = field(repr=False)

    def __post_init__(self) -> None:
        _check_key("public key", self.public)
        if not _Z85_KEY.fullmatch(self.secret):
            raise InvalidKey(
                "a secret key is not a Z85 key of 40 characters",
                evidence=f"it has {len(self.secret)} characters (not shown: it is secret)",
                advice="Pass the key as it was generated, whole and unquoted.",
            )
        if _public_of(self.secret) != self.public:
            raise InvalidKey(
                f"the secret key does not belong to the public key {self.public}",
                evidence=f"the public key of this secret is {_public_of(self.secret)}",
                advice="Use both halves of one generated pair.",
            )

    @classmethod
    def generate(cls) -> KeyPair:
        """A fresh pair from the system's random source."""
        public, secret = zmq.curve_keypair()
        return cls(public.decode("ascii"), secret.decode("ascii"))


@dataclass(frozen=True, slots=True)
class ClientKeys:
    """What a dialer needs: the key of the one server that it will talk to, and its own pair."""

    server_public: str
    own: KeyPair

    def __post_init__(self) -> None:
        _check_key("server key", self.server_public)


@dataclass(frozen=True, slots=True)
class AgentKey:
    """All that one agent must know to join a run. Travels as one line (``to_line``) over a private channel."""

    run_id: str
    node: str
    controller_public: str
    own: KeyPair

    def __post_init__(self) -> None:
        _check_key("controller key", self.controller_public)
        for name, value in (("run_id", self.run_id), ("node", self.node)):
            if not value or not value.isprintable():
                raise InvalidKey(
                    f"{name} of an agent key is {value!r}",
                    evidence="it is empty or holds unprintable characters",
                    advice=f"Give {name} as plain text.",
                )

    def client_keys(self) -> ClientKeys:
        """The keys with which the agent dials its controller."""
        return ClientKeys(self.controller_public, self.own)

    def to_line(self) -> str:
        """One JSON object without line breaks. It holds the secret: keep it off command lines and environments."""
        values = {
            "v": _BUNDLE_VERSION,
            "run_id": self.run_id,
            "node": self.node,
            "controller_public": self.controller_public,
            "public": self.own.public,
            "secret": self.own.secret,
        }
        return json.dumps(values, separators=(",", ":"))

    @classmethod
    def from_line(cls, line: str) -> AgentKey:
        """Read what ``to_line`` wrote.

        Raises:
            InvalidKey: not JSON, another version, a missing or malformed field. Never quotes the line itself.
        """
        values = _parse_bundle(line)
        pair = KeyPair(values["public"], values["secret"])
        return cls(values["run_id"], values["node"], values["controller_public"], pair)


class AllowList:
    """Public keys that may connect, each with the name of its node. Changes take effect at once.

    Revoking a key refuses its next handshake and drops whatever still arrives over its open connections.
    """

    def __init__(self) -> None:
        self.nodes: dict[str, str] = {}
        """Node by public key; for reading."""
        self._proof_keys: dict[str, bytes] = {}

    def __contains__(self, public: object) -> bool:
        return public in self.nodes

    def __len__(self) -> int:
        return len(self.nodes)

    def add(self, public: str, node: str, proof_key: bytes | None = None) -> None:
        """Allow ``public`` for ``node``. A node may have several keys (a new one before the old one goes).

        ``proof_key``: what the key's owner proves itself with on a unix socket (``unix_auth``); None: it cannot.

        Raises:
            InvalidKey: not a Z85 key.
            KeyConflict: the key already belongs to another node.
        """
        _check_key(f"public key of node {node}", public)
        holder = self.nodes.setdefault(public, node)
        if holder != node:
            raise KeyConflict(
                f"public key {public} cannot be allowed for node {node}",
                evidence=f"it already belongs to node {holder}",
                advice="Generate one key pair per node.",
            )
        if proof_key is not None:
            self._proof_keys[public] = proof_key

    def revoke(self, public: str) -> bool:
        """Forget a key. False: it was not allowed anyway."""
        self._proof_keys.pop(public, None)
        return self.nodes.pop(public, None) is not None

    def node_of(self, public: str) -> str | None:
        """The node that owns a key, or None for a stranger."""
        return self.nodes.get(public)

    def proof_key_of(self, public: str) -> bytes | None:
        """What the owner of a key has to prove on a unix socket; None if it is not allowed there."""
        return self._proof_keys.get(public)


def _public_of(secret: str) -> str:
    return zmq.curve_public(secret.encode("ascii")).decode("ascii")


def _check_key(what: str, key: str) -> None:
    if not _Z85_KEY.fullmatch(key):
        raise InvalidKey(
            f"{what} is not a Z85 key of 40 characters",
            evidence=f"got {len(key)} characters: {key[:60]!r}",
            advice="Pass the key as it was generated, whole and unquoted.",
        )


def _parse_bundle(line: str) -> dict[str, str]:
    advice = "Pass the line that the controller made for this node, unchanged."
    try:
        values = json.loads(line)
    except ValueError as error:
        # Not chained: a JSON error carries the whole document, and with it the secret.
        problem = f"{type(error).__name__}; the line has {len(line)} characters (not shown: it may hold a secret)"
        raise InvalidKey("the agent key line is not JSON", evidence=problem, advice=advice) from None
    if not isinstance(values, dict) or values.get("v") != _BUNDLE_VERSION:
        found = values.get("v") if isinstance(values, dict) else type(values).__name__
        raise InvalidKey(
            f"the agent key line is not of version {_BUNDLE_VERSION}",
            evidence=f"found {str(found)[:40]!r}",
            advice="Run the same version of the program on the controller and on every node.",
        )
    bad = [name for name in _BUNDLE_FIELDS if not isinstance(values.get(name), str)]
    if bad:
        evidence = f"missing or not text: {', '.join(bad)}"
        raise InvalidKey("the agent key line is incomplete", evidence=evidence, advice=advice)
    return {name: values[name] for name in _BUNDLE_FIELDS}
