"""What runs on a node: wire protocol, actor host, node agent, process hygiene.

Nothing in this package imports torch; nothing in it imports the packages above it. What an actor's author needs:

    from miles_agents import Actor, Lock, current_actor, current_call, endpoint, lease_ports, lookup, store
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miles_agents.rpc.actor import Actor, endpoint
    from miles_agents.rpc.context import current_actor, current_call
    from miles_agents.rpc.future import CallFuture
    from miles_agents.rpc.lock import Lock, lease_ports, lookup
    from miles_agents.rpc.mesh import ActorMesh
    from miles_agents.rpc.shape import ValueMesh
    from miles_agents.rpc.streams import CallStream
    from miles_agents.store.ref import Ref
    from miles_agents.wire.codec_registry import register_type
    from miles_agents.wire.remote_error import RemoteError

# Resolved on first use: `miles agent` reads this package on every node's start-up path and needs none of it.
_EXPORTS = {
    "Actor": "rpc.actor",
    "ActorMesh": "rpc.mesh",
    "CallFuture": "rpc.future",
    "CallStream": "rpc.streams",
    "Lock": "rpc.lock",
    "Ref": "store.ref",
    "RemoteError": "wire.remote_error",
    "ValueMesh": "rpc.shape",
    "current_actor": "rpc.context",
    "current_call": "rpc.context",
    "endpoint": "rpc.actor",
    "lease_ports": "rpc.lock",
    "lookup": "rpc.lock",
    "register_type": "wire.codec_registry",
}
__all__ = [
    "Actor", "ActorMesh", "CallFuture", "CallStream", "Lock", "Ref", "RemoteError", "ValueMesh",
    "current_actor", "current_call", "endpoint", "lease_ports", "lookup", "register_type",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
