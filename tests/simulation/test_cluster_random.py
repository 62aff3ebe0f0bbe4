"""Random misfortune: whatever happens in whatever order, every call ends, nothing is used twice, everything stops.

Hypothesis draws the schedule and the seed of the network, and prints both for the smallest that fails.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, event, given, note, settings
from hypothesis import strategies as st
from support.simulated import CONTROLLER, SimulatedCluster, outcome, simulate
from support.simulated_actors import EXECUTED, Probe

from miles_agents.errors import PeerFault
from miles_agents.wire.memory_transport import Faults
from miles_controller import Policy

NUM_NODES = 3
MESHES = {
    "restarted": Policy(on_death="restart", max_restarts=50, backoff_s=0.5),
    "regrouped": Policy(on_death="restart", whole_group=True, max_restarts=50, backoff_s=0.5),
    "killed": Policy(on_death="restart", hang_timeout_s=12.0, max_restarts=50, backoff_s=0.5),
    "left": Policy(on_death="fail"),
}
RANKS = 3
SETTLE_S = 150.0
"""At most so long after the last fault everything is as it should be: a node is declared dead, joins again, and gets
back its ranks, with backoffs up to 30 s."""

LINGER_S = 30.0
"""And so it stays, for longer than any verdict takes."""

nodes = st.integers(0, NUM_NODES - 1)
meshes = st.sampled_from(sorted(MESHES))
ranks = st.integers(0, RANKS - 1)
waits = st.tuples(st.just("wait"), st.sampled_from([0.0002, 0.0005, 0.01, 0.3, 2.0, 6.0, 14.5, 16.0, 19.9, 21.0]))
steps = st.one_of(
    *[waits] * 4,
    st.tuples(st.just("call"), meshes, ranks),
    st.tuples(st.just("long_call"), meshes, st.sampled_from([0.001, 1.0, 25.0])),
    st.tuples(st.just("relay"), meshes, ranks, meshes),
    st.tuples(st.just("lock"), meshes, ranks),
    st.tuples(st.just("kill_worker"), meshes, ranks),
    st.tuples(st.just("freeze_worker"), meshes, ranks),
    st.tuples(st.just("thaw_workers"), nodes),
    st.tuples(st.just("partition"), nodes, st.sampled_from([None, "controller", "node"])),
    st.tuples(st.just("heal"), nodes),
    st.tuples(st.just("cut"), nodes),
    st.tuples(st.just("freeze_agent"), nodes),
    st.tuples(st.just("thaw_agent"), nodes),
    st.tuples(st.just("crash"), nodes, st.booleans()),
    st.tuples(st.just("start"), nodes),
)


@dataclass
class World:
    """The cluster, the calls that were made, and the rules that always hold."""

    cluster: SimulatedCluster
    meshes: dict = field(default_factory=dict)
    calls: list = field(default_factory=list)
    tags: dict = field(default_factory=dict)
    frozen_agents: set = field(default_factory=set)

    def node(self, index):
        return self.cluster.nodes[f"node-{index}"]

    def find(self, mesh, rank):
        try:
            return self.cluster.worker(self.meshes[mesh], rank)
        except LookupError:
            return None

    async def do(self, kind, *args):
        await getattr(self, kind)(*args)
        self.check()

    # -- what happens ----------------------------------------------------------------------------------------

    async def wait(self, seconds):
        deadline = self.cluster.now + seconds
        while self.cluster.now < deadline:
            await asyncio.sleep(min(0.25, deadline - self.cluster.now))
            self.check()

    async def call(self, mesh, rank):
        tag = f"call {len(self.calls)}"
        self.tags[tag] = self.meshes[mesh].slice(ranks=rank).count.call_one(tag)
        self.calls.append((tag, self.tags[tag]))

    async def long_call(self, mesh, seconds):
        self.calls.append((f"wait on {mesh}", self.meshes[mesh].wait.call(seconds)))

    async def relay(self, mesh, rank, other):
        call = self.meshes[mesh].slice(ranks=rank).ask_all.call_one(self.meshes[other])
        self.calls.append((f"{mesh}[{rank}] asks {other}", call))

    async def lock(self, mesh, rank):
        self.calls.append((f"lock by {mesh}[{rank}]", self.meshes[mesh].slice(ranks=rank).hold.call_one("lock", 1.5)))

    async def kill_worker(self, mesh, rank):
        worker = self.find(mesh, rank)
        if worker is not None:
            worker.kill_9()

    async def freeze_worker(self, mesh, rank):
        worker = self.find(mesh, rank)
        # A worker that is suspended along with its agent cannot be fenced by anybody: that is a suspended machine.
        if worker is not None and worker.birth.node not in self.frozen_agents:
            worker.freeze()

    async def thaw_workers(self, index):
        for worker in self.node(index).starter.living:
            worker.thaw()

    async def partition(self, index, towards):
        self.cluster.partition(f"node-{index}", towards=towards)

    async def heal(self, index):
        self.cluster.heal(f"node-{index}")

    async def cut(self, index):
        for connection in self.cluster.network.connections(f"node-{index}", CONTROLLER):
            self.cluster.network.cut(connection)

    async def freeze_agent(self, index):
        await self.thaw_workers(index)
        self.node(index).freeze()
        self.frozen_agents.add(f"node-{index}")

    async def thaw_agent(self, index):
        self.node(index).thaw()
        self.frozen_agents.discard(f"node-{index}")

    async def crash(self, index, is_reported):
        node = self.node(index)
        if not node.is_running:
            return
        self.frozen_agents.discard(node.info.node)
        await node.crash()
        if is_reported:
            self.cluster.controller.report_node_exit(node.info.node, "its reaper ended")

    async def start(self, index):
        if not self.node(index).is_running:
            self.node(index).start()

    async def end_all_misfortune(self):
        self.cluster.disturb(Faults())
        for index in range(NUM_NODES):
            await self.heal(index)
            await self.thaw_agent(index)
            await self.thaw_workers(index)
            await self.start(index)

    async def settle(self):
        deadline = self.cluster.now + SETTLE_S
        while self.cluster.now < deadline and not self.is_settled():
            await self.wait(1.0)
        await self.wait(LINGER_S)

    def is_settled(self):
        if len(self.cluster.controller.fabric.nodes) < NUM_NODES or not all(call.done() for _, call in self.calls):
            return False
        return all(
            rank.state == "up"
            for name, mesh in self.meshes.items()
            if name != "left"
            for rank in mesh._supervisor.ranks
        )

    # -- what always holds -----------------------------------------------------------------------------------

    def check(self):
        living = self.cluster.living
        devices = Counter((worker.birth.node, device) for worker in living for device in worker.spec.devices)
        assert [key for key, count in devices.items() if count > 1] == [], "a device is used twice"
        lives = Counter((worker.spec.mesh_name, worker.spec.rank) for worker in living)
        assert [key for key, count in lives.items() if count > 1] == [], "a rank lives twice"
        assert [tag for tag, count in EXECUTED.items() if count > 1] == [], "a call was executed twice"

    async def check_end(self):
        fabric = self.cluster.controller.fabric
        assert len(fabric.nodes) == NUM_NODES
        for what, call in self.calls:
            assert call.done(), f"never ended: {what}"
            error = await outcome(call)
            assert not isinstance(error, Exception) or isinstance(error, PeerFault), (what, error)
            event(f"{what.split()[0]}: {type(error).__name__ if isinstance(error, Exception) else 'answered'}")
        for tag, call in self.tags.items():
            if not isinstance(await outcome(call), Exception):
                assert EXECUTED[tag] == 1
        for worker in self.cluster.living:
            rank = self.meshes[worker.spec.mesh_name]._supervisor.ranks[worker.spec.rank]
            assert (rank.incarnation, rank.state) == (worker.spec.incarnation, "up")
        for name, mesh in self.meshes.items():
            if name != "left":
                assert mesh.failure is None, mesh.failure
                assert len(await mesh.who.call()) == RANKS
        assert fabric.switch.in_flight.pending_at(fabric.node.address) == []
        assert len(fabric.switch.in_flight) == 0
        assert self.cluster.controller.locks.snapshot() == {}
        assert self.cluster.events("background_failed") == []


async def live_through(schedule, seed, faults):
    EXECUTED.clear()
    cluster = SimulatedCluster(NUM_NODES, cpu_slots=2 * RANKS, seed=seed, join_timeout_s=1e6)
    async with cluster:
        world = World(cluster)
        for name, policy in MESHES.items():
            world.meshes[name] = await cluster.controller.spawn(name, Probe, dims={"ranks": RANKS}, policy=policy)
        cluster.disturb(faults)
        for kind, *args in schedule:
            await world.do(kind, *args)
        note(f"end of the schedule at {cluster.now}")
        await world.end_all_misfortune()
        await world.settle()
        for at, told in cluster.told:
            note(f"{at:10.4f} {told.kind} {told.subject} {told.text}")
        await world.check_end()
    assert cluster.living == []
    assert not any(node.is_running for node in cluster.nodes.values())
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


schedules = st.lists(steps, min_size=1, max_size=40)
seeds = st.integers(0, 2**32 - 1)
links = st.sampled_from([Faults(), Faults(drop=0.03, duplicate=0.1, reorder=0.1, delay_s=(0.0, 0.02))])
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=15, deadline=None, suppress_health_check=QUIET, print_blob=True)
@given(schedules, seeds, links)
def test_whatever_happens_every_call_ends_and_everything_stops(schedule, seed, faults):
    simulate(lambda: live_through(schedule, seed, faults))


@pytest.mark.full
@pytest.mark.parametrize("part", range(4))  # each within the time limit of one test
@settings(max_examples=60, deadline=None, suppress_health_check=QUIET, print_blob=True)
@given(schedule=schedules, seed=seeds, faults=links)
def test_whatever_happens_at_length(part, schedule, seed, faults):
    simulate(lambda: live_through(schedule, seed, faults))
