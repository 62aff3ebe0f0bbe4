"""A worker's beats carry what user code may have made up: it can lie about its work, but about nothing else."""

import json

import pytest
from support.simulated import SimulatedCluster, simulate
from support.simulated_actors import Probe

from miles_agents.agent.worker_facts import MAX_TEXT, known_facts

GOOD = {"progress": 7, "queued": 2, "running": 1, "call": "train", "call_age_s": 1.5, "lag_s": 0.25}


def test_known_facts_pass():
    assert known_facts(GOOD) == GOOD
    assert known_facts({"call_age_s": 3}) == {"call_age_s": 3}


@pytest.mark.parametrize(
    "bad",
    [
        {"pid": 1},
        {"state": "dead"},
        {"rank": []},
        {"running": "many"},
        {"running": True},
        {"running": 1.5},
        {"progress": 10**400},
        {"lag_s": float("nan")},
        {"lag_s": float("-inf")},
        {"call": ["x"]},
        {"call": None},
        {7: 7},
        "facts",
        None,
    ],
)
def test_all_else_is_dropped(bad):
    assert known_facts(bad) == {}
    if isinstance(bad, dict):
        rest = {name: value for name, value in GOOD.items() if name not in bad}
        assert known_facts({**GOOD, **bad}) == rest


def test_text_is_cut():
    assert known_facts({"call": "x" * 10**6}) == {"call": "x" * MAX_TEXT}


def test_what_a_worker_says_of_itself_does_not_touch_what_is_known_of_it():
    async def story():
        async with SimulatedCluster(1) as cluster:
            mesh = await cluster.controller.spawn("m", Probe)
            (known,) = cluster.controller.status()["meshes"][0]["ranks"]
            lies = {"pid": 1, "state": ["up"], "rank": {}, "node": "elsewhere", "incarnation": [], "junk": "x" * 10**6}
            cluster.worker(mesh, 0).runtime.link.beat({**lies, "progress": 4711, "call": "y" * 1000})
            agent = cluster.nodes["node-0"].agent
            await cluster.until(lambda: agent.workers.facts()[0][-1].get("progress") == 4711)
            agent.link.beat({"lag_s": 0.0, "stdin_open": True, "workers": agent.workers.facts()})

            def shown():
                return cluster.controller.status()["meshes"][0]["ranks"][0]

            await cluster.until(lambda: shown()["facts"].get("progress") == 4711)
            assert shown()["facts"] == {"progress": 4711, "call": "y" * MAX_TEXT}
            assert {**shown(), "facts": {}} == {**known, "facts": {}}
            json.dumps(cluster.controller.status(), default=str)

    simulate(story)
