"""Engines over several nodes: their parts start, fail and end together. The engines are scripted ones."""

import asyncio
import json
import os
import signal
from pathlib import Path

import psutil
import pytest
from support.cluster import error_of, real_cluster
from support.engines import engine_config, engine_model
from support.recovering_fleet import FAKES, recovering

from miles.backends.sglang_utils.fleet import EngineFleet
from miles.backends.sglang_utils.places import FleetPlaces, Place, engine_parts, fleet_places
from miles.backends.sglang_utils.server_arguments import BadEngineConfig
from miles_agents.agent.service import ServiceDied
from miles_agents.simulation import simulated_info
from miles_controller.placement import Inventory, Request, Slot, place

TWO_NODES = FleetPlaces(((Place("node-0"), Place("node-1")), (Place("node-1"),)), "node-0")


def test_places_follow_slots_and_tell_what_is_on_which_node():
    config = {"rollout_num_engines": 1, "rollout_num_gpus_per_engine": 4}
    nodes = Inventory.of([simulated_info(f"n{number}", cpu_slots=2) for number in range(3)])
    requests = [Request("trainer", 2), Request("engines", 1, devices_per_rank=4, kind="service")]
    found = fleet_places(config, place(nodes, requests))
    assert found.engines == ((Place("n1", (0, 1)), Place("n2", (0, 1))),)
    assert (found.head, found.on_one_node) == ("n0", False)
    alone = fleet_places({"rollout_num_engines": 1}, place(nodes, [Request("engines", 1, kind="service")]))
    assert alone == FleetPlaces(((Place("n0", (0,)),),), "n0", True)


def test_an_engine_with_unequal_parts_is_refused():
    slots = [Slot("n0", (0,), 0, 0), Slot("n0", (1,), 1, 0), Slot("n1", (0,), 0, 1)]
    with pytest.raises(BadEngineConfig, match=r"2 on n0, 1 on n1"):
        engine_parts(3, slots)
    assert engine_parts(0, slots[1:]) == (Place("n0", (1,)), Place("n1", (0,)))


def arguments(job, node):
    """That the part of engine 0 on that node was started with."""
    return json.loads(psutil.Process(job.pid("engine-0", node)).cmdline()[-1])


@pytest.mark.full
async def test_the_parts_of_an_engine_meet_at_one_address_and_a_death_of_one_is_the_end_of_all_and_a_new_begin(
    tmp_path,
):
    async with recovering(tmp_path / "run", num_nodes=2, places=TWO_NODES) as job:
        parts = [arguments(job, node) for node in ("node-0", "node-1")]
        assert [(part["nnodes"], part["node_rank"]) for part in parts] == [(2, 0), (2, 1)]
        assert len({part["dist_init_addr"] for part in parts}) == 1
        assert "dist_init_addr" not in json.loads(psutil.Process(job.pid("engine-1")).cmdline()[-1])
        before = [job.pid("engine-0", node) for node in ("node-0", "node-1")]
        job.strike("engine-0", signal.SIGKILL, "node-1")
        await job.cluster.event("engine_lost", "engine-0")
        await job.until_all_serve()
        [told] = job.recoveries()
        assert told.subject == "engine-0" and "its part on node-1" in told.fields["cause"]
        after = [job.pid("engine-0", node) for node in ("node-0", "node-1")]
        assert not set(before) & set(after)
        assert len({part["dist_init_addr"] for part in (arguments(job, "node-0"), arguments(job, "node-1"))}) == 1
        assert len(set((await job.checksums()).values())) == 1


@pytest.mark.full
async def test_a_part_that_does_not_start_is_told_with_its_words_and_no_other_is_left(tmp_path):
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    async with real_cluster(tmp_path / "run", num_nodes=2) as cluster:
        cluster.controller.forwarded_env["PYTHONPATH"] = path
        config = engine_config(engine_model(), **{**FAKES, "sglang_fake_failing_part": 1, "rollout_num_engines": 1})
        fleet = EngineFleet(cluster.controller, config, places=FleetPlaces(TWO_NODES.engines[:1], "node-0"))
        error = await error_of(asyncio.ensure_future(fleet.start()), ServiceDied)
        assert "this part of the engine does not start" in str(error)
        assert cluster.controller.services.snapshot() == []
        cluster.identities()
