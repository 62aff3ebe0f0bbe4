"""Which calls that a switch passed on take much longer than calls of their kind do. Pure.

The agent watches those between its own workers, which nobody else sees; the controller all others. Invariant: a call is
news once.
"""

from __future__ import annotations

from collections.abc import Callable

from miles_agents.rpc.inflight import InFlight, Passed, RequestKey
from miles_agents.wire.envelope import Address

CHECK_S = 5.0
_FACTOR = 5.0
_MOST_NEWS = 20


class OverdueWatch:
    """Look at it every ``CHECK_S``.

    Args:
        in_flight: Of the switch.
        at_least_s: Younger calls are never overdue.
        concerns: Which calls to watch; default: all.
    """

    def __init__(
        self, in_flight: InFlight, at_least_s: float, concerns: Callable[[Passed], bool] = lambda passed: True
    ) -> None:
        self._in_flight = in_flight
        self._at_least_s = at_least_s
        self._concerns = concerns
        self._told: set[tuple[RequestKey, Address]] = set()

    def news(self, now: float) -> list[Passed]:
        """Calls that are overdue and were not told before; many come a few at a time."""
        overdue = self._in_flight.overdue(now, at_least_s=self._at_least_s, factor=_FACTOR)
        named = {(passed.key, passed.receiver): passed for passed in overdue if self._concerns(passed)}
        self._told &= named.keys()
        news = [name for name in named if name not in self._told][:_MOST_NEWS]
        self._told.update(news)
        return [named[name] for name in news]
