"""Actors of simulated clusters. They are of this module so that every simulated worker can load them by name."""

import asyncio
from collections import Counter

from miles_agents import Actor, Lock, current_actor, current_call, endpoint, lookup
from miles_agents.errors import ConfigError
from miles_agents.rpc.errors import StaleHandle

EXECUTED: Counter = Counter()
"""How often each request was executed, by its tag; across all workers, dead ones included."""


class Probe(Actor):
    """Answers, counts, waits, calls others."""

    def __init__(self, greeting="hello"):
        self.greeting = greeting
        self.seen = {}

    @endpoint
    def who(self):
        me = current_actor()
        return [me.node_name, me.rank, me.incarnation]

    @endpoint
    def greet(self, name):
        return f"{self.greeting}, {name}"

    @endpoint
    def count(self, tag):
        EXECUTED[tag] += 1
        return EXECUTED[tag]

    @endpoint
    def note(self, sender, number):
        self.seen.setdefault(sender, []).append(number)
        return number

    @endpoint
    def noted(self):
        return self.seen

    @endpoint
    async def wait(self, seconds):
        await asyncio.sleep(seconds)
        return current_actor().incarnation

    @endpoint
    async def wait_for(self, mesh, seconds):
        """Call another actor from here and wait for it to wait."""
        return await mesh.wait.call_one(seconds)

    @endpoint
    async def outlive(self, mesh):
        """Wait for longer than anybody lives."""
        return await mesh.wait.call_one(1e6)

    @endpoint
    async def ask(self, mesh, name):
        """Call another mesh from here, by a handle that travelled."""
        return list((await mesh.greet.call(name)).values)

    @endpoint
    async def ask_all(self, mesh):
        return list((await mesh.who.call()).values)

    @endpoint
    async def send_numbers(self, mesh, count):
        """Calls that are all under way at once, to every rank of a mesh."""
        me = current_actor()
        sender = f"{me.mesh_name}[{me.rank}]"
        calls = [mesh.note.call(sender, number) for number in range(count)]
        for call in calls:
            await call
        return count

    @endpoint
    async def find_and_ask(self, name):
        return list((await (await lookup(name)).who.call()).values)

    @endpoint
    async def ask_stale(self, mesh):
        """The error of a call with a handle of an earlier life, as text."""
        try:
            await mesh.who.call()
        except StaleHandle as error:
            return error.code
        return "no error"

    @endpoint
    async def hold(self, name, seconds):
        """Hold a lock; returns its token and when it was held."""
        loop = asyncio.get_running_loop()
        async with Lock(name) as lock:
            token, since = lock.token, loop.time()
            await asyncio.sleep(seconds)
            return [token, since, loop.time()]

    @endpoint
    async def greet_later(self, mesh, seconds):
        """Begin a task that makes a call when this one is long answered."""

        async def greet():
            await asyncio.sleep(seconds)
            return (await mesh.greet.call("later")).values

        self.task = asyncio.create_task(greet())

    @endpoint
    async def greeted(self):
        return list(await self.task)

    @endpoint
    async def order(self, mesh, name, *args):
        """Call an endpoint of the runtime itself; its error's code, or what it answered."""
        try:
            return await mesh.endpoint(name).call_one(*args)
        except ConfigError as error:
            return error.code

    @endpoint
    def source(self):
        return list(current_call().source)


class Picky(Actor):
    """Its constructor raises on one rank."""

    def __init__(self, rank):
        if current_actor().rank == rank:
            raise ValueError(f"rank {rank} is not wanted")


class Closer(Probe):
    """Counts in which ranks it was closed."""

    def close(self):
        EXECUTED["closed", current_actor().rank] += 1
