"""A small version of benchmarks/scale.py: what holds at every size. Counts and answers only, no times."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from support.simulated_actors import Probe

from miles_agents.rpc.errors import NodeLost
from miles_agents.simulated_logs import Flood
from miles_agents.timings import Timings
from miles_agents.virtual_cost import run_costed
from miles_controller import Policy
from miles_controller.placement import Request
from miles_controller.simulation import MeasuredCluster

RANKS = 8
SPARES = 2
SHORT = Timings(beat_s=1.0, suspect_s=2.0, fence_s=4.0, dead_s=6.0)


async def spawned(cluster, num_nodes, policy=None):
    """A mesh with a rank for each device of so many nodes; the others stay free as spares."""
    controller = cluster.controller

    async def start():
        num_spares = len(cluster.names) - num_nodes
        request = Request("m", num_nodes * RANKS, ranks_per_node=RANKS)
        placement = controller.place([request], num_spares=num_spares)
        dims = {"hosts": num_nodes, "gpus": RANKS}
        return await controller.spawn("m", Probe, dims=dims, placement=placement, policy=policy)

    return await cluster.work(start())


async def who(mesh):
    return list((await mesh.who.call()).values)


class Traffic:
    """Frames and bytes at the controller since it was made, per node."""

    def __init__(self, cluster):
        self._cluster = cluster
        self._before = self._now()

    def _now(self):
        stats = self._cluster.stats
        return stats.received_messages, stats.sent_messages, stats.received_bytes, stats.sent_bytes

    def per_node(self):
        pairs = zip(self._now(), self._before, strict=True)
        return [(new - old) / len(self._cluster.names) for new, old in pairs]


def test_all_join_all_answer_the_lost_are_answered_for_and_those_that_join_again_are_used():
    async def story():
        async with MeasuredCluster(48 + SPARES, timings=SHORT) as cluster:
            mesh = await spawned(cluster, 48, Policy("restart"))
            first = await cluster.work(who(mesh))
            assert len({(rank, incarnation) for _, rank, incarnation in first}) == 48 * RANKS
            assert len({node for node, _, _ in first}) == 48

            async def tell_all():
                await mesh.who.broadcast()

            await cluster.work(tell_all())

            async def wait():
                return list((await mesh.options(return_exceptions=True).wait.call(12.0)).values)

            waiting = cluster.cpu.task(wait(), "pending calls")
            await asyncio.sleep(1.0)
            lost = cluster.names[:SPARES]
            await cluster.lose(lost)
            outcomes = await waiting
            assert [type(outcome) for outcome in outcomes[: SPARES * RANKS]] == [NodeLost] * SPARES * RANKS
            before = [incarnation for _, _, incarnation in first]
            assert outcomes[SPARES * RANKS :] == before[SPARES * RANKS :]
            told = [event.subject for event in cluster.controller.events.history if event.kind == "node_dead"]
            assert sorted(told) == lost

            again = await cluster.work(who(mesh))
            assert [node for node, _, _ in again[: SPARES * RANKS]] == [
                name for name in cluster.names[48:] for _ in range(RANKS)
            ]
            assert again[SPARES * RANKS :] == first[SPARES * RANKS :]
            assert not {(r, i) for _, r, i in again[: SPARES * RANKS]} & {(r, i) for _, r, i in first}

            await cluster.rejoin(lost)

            async def use():
                used = await cluster.controller.spawn("used", Probe, dims={"hosts": SPARES, "gpus": RANKS})
                answers = await who(used)
                await used.stop()
                return answers

            assert {node for node, _, _ in await cluster.work(use())} == set(lost)
            await cluster.work(mesh.stop())
            assert [worker for node in cluster.nodes.values() for worker in node.starter.living] == []

    run_costed(story())


def test_what_a_node_costs_the_controller_does_not_depend_on_how_many_there_are():
    async def traffic(num_nodes):
        found = {}
        async with MeasuredCluster(num_nodes) as cluster:
            for name in ("spawn", "call", "idle"):
                seen = Traffic(cluster)
                if name == "spawn":
                    mesh = await spawned(cluster, num_nodes)
                elif name == "call":
                    await cluster.work(who(mesh))
                else:
                    await asyncio.sleep(2.0)
                    seen = Traffic(cluster)
                    await asyncio.sleep(10.0)
                found[name] = seen.per_node()
        return found

    few, many = (run_costed(traffic(num_nodes)) for num_nodes in (5, 50))
    for name, counts in few.items():
        assert many[name] == pytest.approx(counts, rel=0.2), name
    frames_in, frames_out, bytes_in, bytes_out = many["idle"]
    assert (frames_in, frames_out) == (10.0, 10.0)
    assert bytes_in < 10 * 100 and bytes_out < 10 * 50
    # One order a node, one construction, and no more than two answers a rank.
    assert many["spawn"][1] <= 6 and many["spawn"][0] <= 2 * RANKS + 2


def test_a_flood_of_logs_from_every_rank_delays_neither_beats_nor_calls():
    async def story():
        flood = Flood()
        async with MeasuredCluster(8, open_tail=flood.open_tail) as cluster:
            mesh = await spawned(cluster, 8)

            async def slowest():
                """Virtual seconds of the slowest of many calls, each to one rank."""
                times = []
                for number in range(100):
                    began = cluster.now
                    await mesh.slice(hosts=number % 8, gpus=number % RANKS).greet.call_one("x")
                    times.append(cluster.now - began)
                    await asyncio.sleep(0.02)
                return max(times)

            quiet = await cluster.work(slowest())
            seen = Traffic(cluster)
            flood.lines_per_s = 600.0
            assert await cluster.work(slowest()) <= quiet + 0.001
            flood.lines_per_s = 0.0
            printed = flood.num_lines * 100 / 8
            assert printed > 700_000
            assert seen.per_node()[2] < 0.6 * printed  # 1 MiB a second is shown, of all nodes together
            assert not [event for event in cluster.controller.events.history if event.kind == "node_suspect"]

    run_costed(story())


@pytest.mark.full
def test_the_benchmark_prints_its_table_and_finds_nothing_wrong():
    script = Path(__file__).parents[2] / "benchmarks/scale.py"
    command = [sys.executable, script, "--nodes", "2", "4", "--quick"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 nodes" in done.stdout and "call every rank" in done.stdout
