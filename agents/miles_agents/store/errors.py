"""What can go wrong with the store, by whose move it is."""

from __future__ import annotations

from miles_agents.errors import ConfigError, EnvironmentFault, PeerFault


class NoStoreHere(ConfigError):
    """The store was used outside of a worker, or in one whose agent has none."""

    code = "E-STORE-001"


class BlocksLoop(ConfigError):
    """A waiting function of the store was called on a thread that runs an event loop."""

    code = "E-STORE-002"


class StoreFull(EnvironmentFault, TimeoutError):
    """There was no room within the deadline. The evidence names who holds what."""

    code = "E-STORE-003"


class ObjectTooLarge(ConfigError):
    """The object is larger than the whole pool of a node."""

    code = "E-STORE-004"


class ObjectRemoved(ConfigError):
    """The object was removed."""

    code = "E-STORE-005"


class UnknownObject(ConfigError):
    """The reference names nothing that its home node ever stored."""

    code = "E-STORE-006"


class ObjectLost(PeerFault):
    """The object's home node is gone and no other node has a copy. Fields: home."""

    code = "E-STORE-007"


class PullFailed(PeerFault):
    """The object is there, but could not be fetched from the node that has it. Fields: home."""

    code = "E-STORE-008"


class NoSecondNode(ConfigError):
    """More copies were asked for than there are nodes that can hold one."""

    code = "E-STORE-009"


class StoreSilent(PeerFault):
    """The node's agent does not answer its workers' requests to the store, or hung up."""

    code = "E-STORE-010"


class NoMemory(EnvironmentFault):
    """The kernel did not give the memory for a segment, although the pool has room for it."""

    code = "E-STORE-011"


class DamagedObject(PeerFault):
    """What lies in a segment is not what a put wrote."""

    code = "E-STORE-012"


class BadStoreArgument(ConfigError):
    """An argument of a function of the store makes no sense."""

    code = "E-STORE-013"


class NotAllowedHere(PeerFault):
    """Somebody spoke to a store's socket who has no token, or asked for what is not theirs."""

    code = "E-STORE-014"
