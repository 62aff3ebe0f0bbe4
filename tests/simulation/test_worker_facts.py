"""A worker's beats carry what user code may have made up: it can lie about its work, but about nothing else."""

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.simulated import SimulatedCluster, simulate
from support.simulated_actors import Probe

from miles_agents.agent.worker_facts import MAX_TEXT, FactNews, known_facts

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


def entry(rank=0, state="up", **facts):
    return [2, rank, 7, 1000 + rank, state, {**GOOD, "call": "", "call_age_s": 0.0, **facts}]


def test_facts_are_told_until_a_beat_with_them_was_answered_and_then_no_more():
    news = FactNews()
    both = [entry(0), entry(1)]
    assert news.news(both, 1.0) == both
    news.sent(1, both, 1.0)
    assert news.news(both, 2.0) == both  # the first may have been lost
    news.sent(2, both, 2.0)
    news.answered(2)
    assert news.news(both, 3.0) == []
    changed = [entry(0), entry(1, progress=8)]
    assert news.news(changed, 4.0) == changed[1:]
    news.answered(99)  # an answer to nothing
    assert news.news(changed, 5.0) == changed[1:]


def test_what_was_told_last_counts_also_if_its_answer_was_lost():
    news = FactNews()
    idle, busy = [entry()], [entry(running=1, call="train")]
    news.sent(1, idle, 1.0)
    news.answered(1)
    assert news.news(busy, 2.0) == busy
    news.sent(2, busy, 2.0)  # it arrives, its answer does not
    assert news.news(idle, 3.0) == idle


def test_a_call_that_grows_older_is_no_news_but_another_call_is():
    news = FactNews()
    first = [entry(call="train", call_age_s=1.0)]
    news.sent(1, first, 10.0)
    news.answered(1)
    assert news.news([entry(call="train", call_age_s=31.0)], 40.0) == []
    other = [entry(call="train", call_age_s=0.5)]
    assert news.news(other, 40.0) == other
    lagging = [entry(call="train", call_age_s=31.0, lag_s=2.0)]
    assert news.news(lagging, 40.0) == lagging


def test_a_rank_that_lives_again_is_told_anew():
    news = FactNews()
    news.sent(1, [entry()], 1.0)
    news.answered(1)
    assert news.news([], 2.0) == []
    assert news.news([entry()], 3.0) == [entry()]


@given(st.lists(st.tuples(st.sampled_from(["work", "beat", "lose", "die"]), st.integers(0, 2)), max_size=40))
def test_what_the_controller_believes_is_what_is_so_after_a_beat_that_was_answered(steps):
    news, here, there, now, beat = FactNews(), {}, {}, 0.0, 0
    for step, rank in [*steps, ("beat", 0)]:
        now += 1.0
        if step == "work":
            here[rank] = entry(rank, progress=here.get(rank, entry())[5]["progress"] + 1)
        elif step == "die":
            here.pop(rank, None)
        else:
            beat += 1
            told = news.news(list(here.values()), now)
            news.sent(beat, told, now)
            if step == "beat":
                there.update({one[1]: one for one in told})
                news.answered(beat)
    assert {rank: there[rank] for rank in here} == here


def test_the_status_page_knows_how_old_a_call_is_though_nobody_tells_it_again():
    async def story():
        async with SimulatedCluster(1) as cluster:
            mesh = await cluster.controller.spawn("m", Probe)
            waiting = mesh.wait.call_one(100.0)
            await asyncio.sleep(30.0)
            (rank,) = cluster.controller.status()["meshes"][0]["ranks"]
            assert rank["facts"]["call"] == "wait" and 29.0 < rank["facts"]["call_age_s"] < 31.0
            stats = cluster.controller.fabric.link.transport.stats
            before = stats.received_bytes
            await asyncio.sleep(10.0)
            assert stats.received_bytes - before < 10 * 100
            await waiting

    simulate(story)
