"""Groups: async endpoints that exclude each other, and nobody else."""

import asyncio

import pytest
from support.wired import virtual, wired

from miles_agents.rpc.actor import Actor, endpoint
from miles_agents.rpc.errors import CallCancelled


class Grouped(Actor):
    """Counts how many of its endpoints overlap."""

    def __init__(self):
        self.now = {"a": 0, "b": 0, None: 0}
        self.most = {"a": 0, "b": 0, None: 0}

    async def enter(self, group):
        self.now[group] += 1
        self.most[group] = max(self.most[group], self.now[group])
        for _ in range(5):
            await asyncio.sleep(0)
        self.now[group] -= 1

    @endpoint(group="a")
    async def first(self):
        await self.enter("a")

    @endpoint(group="a")
    async def second(self):
        await self.enter("a")

    @endpoint(group="b", thread="io")
    async def third(self):
        await self.enter("b")

    @endpoint
    async def free(self):
        await self.enter(None)

    @endpoint(group="a")
    async def stuck(self):
        await asyncio.get_running_loop().create_future()


@virtual
async def test_endpoints_of_a_group_exclude_each_other():
    async with wired() as net:
        mesh = net.spawn(Grouped)
        names = ["first", "second", "third", "free"] * 4
        await asyncio.gather(*[result(mesh.endpoint(name).call_one()) for name in names])
        assert net.actor(mesh).most == {"a": 1, "b": 1, None: 4}


@virtual
async def test_a_request_that_waits_for_its_group_is_dropped_when_cancelled():
    async with wired() as net:
        mesh = net.spawn(Grouped)
        stuck, waiting = mesh.stuck.call_one(), mesh.first.call_one()
        await asyncio.sleep(1)
        waiting.cancel()
        with pytest.raises(CallCancelled) as caught:
            await waiting
        assert caught.value.fields["may_have_run"] is False
        stuck.cancel()
        with pytest.raises(CallCancelled):
            await stuck
        await mesh.second.call_one()
        assert net.actor(mesh).most["a"] == 1


async def result(future):
    return await future
