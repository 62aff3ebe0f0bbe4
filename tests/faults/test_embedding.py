"""The controller inside somebody else's program: several at once, any loop, and a status page that tells the truth."""

import asyncio
import json
import signal
import threading
import urllib.error
import urllib.request

import pytest
import uvloop
from support.actors import Caller, Victim
from support.cluster import DEADLINE_S, SHORT, error_of, kill, real_cluster
from support.procs import alive, eventually

from miles_agents.rpc.errors import ControllerLost, DeadlineExceeded, NodeLost, PeerFault, WorkerDied
from miles_controller import Controller, ControllerConfig
from miles_controller.nodes_missing import NodesMissing


async def a_short_life(run_dir):
    """Start, call, kill one, call, end."""
    async with real_cluster(run_dir, num_nodes=2, cpu_slots=2) as cluster:
        mesh = await cluster.controller.spawn("life", Victim, dims={"hosts": 2})
        cluster.identities()
        pending = mesh.hang.call()
        pids = list((await mesh.pid.call()).values)
        kill(pids[1])
        error = await error_of(pending, WorkerDied)
        assert str(pids[1]) in str(error)
        assert await mesh.slice(hosts=0).pid.call_one() == pids[0]


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_it_lives_in_any_loop_and_leaves_nothing(run, tmp_path):
    run(a_short_life(tmp_path))


@pytest.mark.full
def test_it_lives_in_a_loop_on_another_thread_too(tmp_path):
    failures = []

    def work():
        try:
            asyncio.run(a_short_life(tmp_path))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work, name="embedded")
    thread.start()
    thread.join(60)
    assert not thread.is_alive() and failures == []


@pytest.mark.full
async def test_two_clusters_in_one_process_do_not_hear_each_other(tmp_path):
    ticks = 0

    async def somebody_elses_work():
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    working = asyncio.create_task(somebody_elses_work())
    async with real_cluster(tmp_path / "one") as one, real_cluster(tmp_path / "two") as two:
        first = await one.controller.spawn("same-name", Victim)
        second = await two.controller.spawn("same-name", Victim)
        pids = [await first.pid.call_one(), await second.pid.call_one()]
        assert pids[0] != pids[1]
        pending = [first.hang.call_one(), second.echo.call_one("mine")]
        kill(one.agent())
        await error_of(pending[0], NodeLost)
        assert await pending[1] == "mine"
        assert not two.events("node_dead") and not two.events("worker_died")
        assert await second.pid.call_one() == pids[1]
    assert ticks > 0 and not working.done()
    working.cancel()


async def test_a_cancelled_owner_leaves_nothing(tmp_path):
    running = asyncio.Event()
    seen = []

    async def owner():
        async with real_cluster(tmp_path) as cluster:
            mesh = await cluster.controller.spawn("owned", Victim)
            seen.extend(cluster.identities())
            pending = mesh.hang.call_one()
            await mesh.pid.call_one()
            running.set()
            await pending

    task = asyncio.create_task(owner())
    await asyncio.wait_for(running.wait(), DEADLINE_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(seen) == 3 and not any(map(alive, seen))


async def test_an_owner_that_raises_gets_its_own_error_and_nothing_is_left(tmp_path):
    seen = []

    async def owner():
        async with real_cluster(tmp_path) as cluster:
            await cluster.controller.spawn("owned", Victim)
            seen.extend(cluster.identities())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await owner()
    assert len(seen) == 3 and not any(map(alive, seen))


@pytest.mark.full
async def test_calls_that_are_made_after_the_end_say_so(tmp_path):
    async with real_cluster(tmp_path) as cluster:
        mesh = await cluster.controller.spawn("owned", Victim)
        pending = mesh.hang.call_one()
        await mesh.pid.call_one()
    error = await error_of(pending, PeerFault)
    assert error.fields["may_have_run"] is True
    error = await error_of(mesh.echo.call_one(1), ControllerLost)
    assert error.code == "E-PEER-005"


async def test_nodes_that_never_come_are_named(tmp_path):
    config = ControllerConfig(nodes=("node-0", "node-1"), run_dir=tmp_path, status=False)
    async with Controller(config) as controller:
        error = await error_of(controller.wait_for_nodes("node-1", timeout_s=0.2), NodesMissing)
        assert "node-1" in error.what


async def test_a_timeout_of_asyncio_around_a_call_cancels_it_there(tmp_path):
    async with real_cluster(tmp_path) as cluster:
        mesh = await cluster.controller.spawn("owned", Victim)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await mesh.hang_async.call_one()
        error = await error_of(mesh.options(timeout_s=0.2).hang_async.call_one(), DeadlineExceeded)
        assert isinstance(error, TimeoutError)
        await eventually(lambda: _rank(cluster.controller.status())["facts"].get("running") == 0, DEADLINE_S)


async def page(url, token=""):
    """Status code and body."""

    def get():
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    return await asyncio.to_thread(get)


@pytest.mark.full
async def test_the_status_page_tells_what_happens_while_it_happens(tmp_path):
    async with real_cluster(tmp_path, num_nodes=2, timings=SHORT, status=True) as cluster:
        server = cluster.controller.status_server
        mesh = await cluster.controller.spawn("seen", Victim, dims={"hosts": 2, "gpus": 2})
        helper = await cluster.controller.spawn("helper", Caller)
        pending = mesh.hang.call()
        calling = helper.call_victim.call_one(mesh.slice(hosts=0, gpus=0), "hang_async")
        pids = list((await mesh.pid.call()).values)

        async def look():
            code, body = await page(f"{server.url}/status", server.token)
            assert code == 200
            return json.loads(body)

        assert (await page(f"{server.url}/status"))[0] == 401
        assert (await page(f"{server.url}/status", "wrong"))[0] == 401
        seen = await look()
        assert {node["state"] for node in seen["nodes"]} == {"alive"}
        (found,) = [found for found in seen["meshes"] if found["name"] == "seen"]
        assert [rank["pid"] for rank in found["ranks"]] == pids
        assert all(rank["owes"][0]["method"] == "hang" for rank in found["ranks"])

        kill(pids[1])
        await error_of(pending, WorkerDied)
        (found,) = [found for found in (await look())["meshes"] if found["name"] == "seen"]
        assert found["ranks"][1]["state"] == "dead" and "SIGKILL" in found["ranks"][1]["evidence"]
        assert found["failed"]

        kill(pids[0], signal.SIGSTOP)
        await cluster.event("worker_silent", "seen[0]")
        (found,) = [found for found in (await look())["meshes"] if found["name"] == "seen"]
        assert found["ranks"][0]["state"] == "silent" and "stopped" in found["ranks"][0]["evidence"]
        kill(pids[0], signal.SIGCONT)

        kill(cluster.agent("node-1"))
        await cluster.event("node_dead", "node-1")
        seen = await look()
        assert {node["name"]: node["state"] for node in seen["nodes"]} == {"node-0": "alive", "node-1": "dead"}
        assert any(event["kind"] == "node_dead" for event in seen["events"])
        calling.cancel()


def _rank(status):
    return status["meshes"][0]["ranks"][0]
