"""Who gets requests, while engines come and go."""

import asyncio
from types import SimpleNamespace

from miles.backends.sglang_utils.fleet import EngineFleet
from miles.backends.sglang_utils.fleet_update import NoEngineLeft
from miles.backends.sglang_utils.roster import FleetHands, Roster
from miles_controller.weight_versions import Holds


class SlowRouter:
    """Takes an engine when it is told to."""

    def __init__(self):
        self.takes = asyncio.Event()

    async def add(self, url, api_key, **more):
        await self.takes.wait()

    async def remove(self, url):
        pass


class Service:
    name = "engine-1"

    async def fence(self, why):
        pass


def engine(url):
    target = SimpleNamespace(name="engine-1", url=url, api_key="", rank_offset=1)
    return SimpleNamespace(target=target, service=Service(), client=None)


async def test_an_engine_that_ends_while_the_router_takes_it_is_not_living():
    """Nor is who comes in its place, before it has the current weights."""
    roster = Roster()
    roster.router, roster.router_service = SlowRouter(), object()
    first = engine("http://first")
    roster.put(first)
    roster.out.add("engine-1")
    updates = SimpleNamespace(holds=lambda name: Holds.CURRENT, state=SimpleNamespace(version=5))
    hands = FleetHands(
        roster, updates, start_engine=None, start_router=None, loaded_version=0, router_failed=lambda why: None
    )
    admitting = asyncio.ensure_future(hands.admit("engine-1"))
    await asyncio.sleep(0)
    await roster.take_out(first, "killed")
    roster.router.takes.set()
    assert await admitting is None
    roster.put(engine("http://second"))
    assert roster.living == []


class LastStep:
    """Updates in which the only engine dies once, when all is committed."""

    def __init__(self):
        self.state = SimpleNamespace(version=4)
        self.asked = []

    async def update(self, send, version):
        self.asked.append(version)
        assert version > self.state.version
        self.state.version = version
        if len(self.asked) == 1:
            raise NoEngineLeft("none is left", evidence="", advice="")
        return version


async def test_an_update_whose_engines_die_when_it_is_committed_is_made_again_as_the_next_version():
    fleet = object.__new__(EngineFleet)

    async def at_once(*args):
        return None

    fleet.recovery = SimpleNamespace(until=at_once, admit_all=at_once, num_serving=1, num_waiting=0)
    fleet._updates, fleet._memory_is_released = LastStep(), False
    assert await fleet.weight_update(None, version=5) == 6
    assert fleet._updates.asked == [5, 6]
