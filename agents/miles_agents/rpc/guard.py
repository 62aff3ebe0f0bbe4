"""Who may give which order: the endpoints of the runtime itself obey those who run it, and no actor."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import ParamSpec, TypeVar

from miles_agents.errors import ConfigError
from miles_agents.rpc.context import current_call
from miles_agents.wire.envelope import AGENT_MESH, CONTROLLER_MESH, Address

P = ParamSpec("P")
T = TypeVar("T")
_NAMES = {CONTROLLER_MESH: "the controller", AGENT_MESH: "an agent"}


class NotYourOrder(ConfigError):
    """Agents obey their controller, workers that and their agent; an actor tried to give one an order."""

    code = "E-AGENT-004"


def obeying(name: str, order: Callable[P, T], masters: Collection[Address]) -> Callable[P, T]:
    """The endpoint ``name``, for these callers only; others get NotYourOrder."""

    @functools.wraps(order)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        source = current_call().source
        if source not in masters:
            raise not_your_order(name, source)
        return order(*args, **kwargs)

    return guarded


def not_your_order(name: str, source: Address) -> NotYourOrder:
    """The error for whoever may not order this."""
    return NotYourOrder(
        f"only those who run this process may order {name}",
        evidence=f"{_NAMES.get(source.mesh, 'an actor')} tried: rank {source.rank} of mesh {source.mesh}",
        advice="Do it from where the controller runs.",
    )
