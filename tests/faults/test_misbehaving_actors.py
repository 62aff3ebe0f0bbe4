"""Actors that raise, hang, hold the interpreter, flood or exhaust: the runtime goes on, and callers are told."""

import asyncio
import re
import time

import pytest
import pytest_asyncio
from support.actors import Caller, RefusedToLive, Victim
from support.cluster import error_of, kill, known, real_cluster
from support.procs import alive, eventually

from miles_agents.rpc.errors import CallCancelled, DeadlineExceeded, WorkerDied
from miles_agents.wire.codec import CannotTravel, TooLarge
from miles_agents.wire.remote_error import RemoteError

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory):
    async with real_cluster(tmp_path_factory.mktemp("run"), cpu_slots=6) as cluster:
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(cluster):
    """Two ranks that outlive what the tests do to them."""
    mesh = await cluster.controller.spawn("pair", Victim, dims={"gpus": 2})
    yield mesh
    pids = [known(pid) for pid in (await mesh.pid.call()).values]
    await mesh.stop(grace_s=1.0)
    assert not [pid for pid in pids if alive(pid)]
    assert not cluster.events("worker_died", "pair")


async def answers(mesh):
    """Every rank does its work, on the main thread."""
    assert list((await mesh.echo.call("ok")).values) == ["ok"] * len(mesh)


async def test_an_endpoint_that_raises_gives_the_caller_its_own_exception_with_the_remote_traceback(pair):
    error = await error_of(pair.slice(gpus=1).fail.call_one("no more"), RemoteError)
    assert isinstance(error, RefusedToLive) and error.code == "E-USER-001"
    assert "pair[1]" in str(error) and "raise RefusedToLive(text)" in error.remote_traceback
    assert error.origin.pid == await pair.slice(gpus=1).pid.call_one()
    await answers(pair)


async def test_a_result_that_cannot_travel_is_named_by_its_path(pair):
    error = await error_of(pair.slice(gpus=0).untransportable.call_one(), CannotTravel)
    assert "['metrics'][1]" in str(error) and "lock" in str(error)
    await answers(pair)


async def test_a_call_that_never_returns_ends_at_its_deadline_and_the_rest_of_its_mesh_goes_on(cluster):
    mesh = await cluster.controller.spawn("stuck", Victim, dims={"gpus": 2})
    cluster.identities()
    pid = known(await mesh.slice(gpus=0).pid.call_one())
    error = await error_of(mesh.slice(gpus=0).options(timeout_s=0.3).hang.call_one(), DeadlineExceeded)
    assert error.code == "E-CALL-001" and error.fields["may_have_run"] is True
    assert await mesh.slice(gpus=1).echo.call_one(1) == 1
    stack = await mesh.stack(0)
    assert "in hang" in stack and "actors.py" in stack
    await mesh.stop(grace_s=0.2)
    assert not alive(pid)


async def test_a_call_that_never_returns_can_be_cancelled_and_its_mesh_stopped_at_once(cluster, tmp_path, took):
    mesh = await cluster.controller.spawn("stuck", Victim)
    cluster.identities()
    pending = mesh.hang.call_one(str(tmp_path / "started"))
    await eventually((tmp_path / "started").exists, 20.0)
    queued = mesh.echo.call_one(1)
    await mesh.pid.call_one()  # the one before it has been read
    queued.cancel()
    error = await error_of(queued, CallCancelled)
    assert error.fields["may_have_run"] is False
    pending.cancel()
    error = await error_of(pending, CallCancelled)
    assert error.code == "E-CALL-002" and error.fields["may_have_run"] is True
    other = mesh.hang_async.call_one()
    at = time.perf_counter()
    await mesh.stop(grace_s=0.2)
    took("stop", at)
    await error_of(other, (WorkerDied, CallCancelled))


@pytest.mark.full
async def test_an_interpreter_held_in_c_is_reported_with_its_stack_and_nobody_is_killed(cluster, pair):
    first = pair.slice(gpus=0)
    pid = await first.pid.call_one()
    held = first.hold_interpreter.call_one(6)
    event = await cluster.event("worker_silent", "pair[0]")
    assert "interpreter" in event.text
    assert "hold_interpreter" in event.fields["stack"] and "actors.py" in event.fields["stack"]
    assert await pair.slice(gpus=1).echo.call_one("unaffected") == "unaffected"
    assert await held == "held"
    await eventually(lambda: _rank(cluster, "pair", 0)["state"] == "up", 20.0)
    assert await first.pid.call_one() == pid


async def test_a_worker_without_free_descriptors_still_answers_and_ends(cluster):
    mesh = await cluster.controller.spawn("greedy", Victim)
    cluster.identities()
    assert await mesh.exhaust_descriptors.call_one() > 0
    await answers(mesh)
    assert "thread" in await mesh.stack(0)
    error = await error_of(mesh.fail.call_one("still told"), RemoteError)
    assert isinstance(error, RefusedToLive)
    await mesh.free_descriptors.call_one()
    await mesh.stop(grace_s=1.0)


async def test_a_flood_of_output_delays_neither_calls_nor_beats(cluster, pair, took):
    flooding = pair.slice(gpus=0).flood.call_one(100_000)
    at = time.perf_counter()
    for _ in range(50):
        await pair.pid.call()
    took("50 calls", at)
    await flooding
    await answers(pair)
    tail = await pair.log_tail(0, 3)
    assert re.fullmatch(r"flood 0000999 x{80}", tail[-1])
    assert not cluster.events("worker_silent", "pair[1]")


async def test_one_way_calls_to_a_stalled_worker_are_neither_lost_nor_reordered(cluster, pair):
    first = pair.slice(gpus=0)
    node = cluster.controller.fabric.node
    waiting = first.wait_for_release.call_one()
    sent = [first.take.broadcast(number) for number in range(20_000)]
    await first.pid.call_one()  # endpoints of the I/O thread answer meanwhile: they have a lane of their own
    window = node._windows[first._info.mesh, "main"]
    assert 0 < window.calls <= 1000, "more is under way than the window allows"
    assert window.num_waiting >= 19_000
    assert _rank(cluster, "pair", 0)["state"] == "up"
    await first.release.call_one()
    async with asyncio.timeout(60):
        await waiting
        for future in sent:
            await future
    assert await first.taken_numbers.call_one() == list(range(20_000))
    assert len(node.calls) == 0 and node._windows[first._info.mesh, "main"].bytes == 0


async def test_an_argument_over_the_limit_is_refused_at_the_caller_with_advice(pair):
    too_large = memoryview(bytes(257 * 1024 * 1024))
    with pytest.raises(TooLarge) as caught:
        pair.slice(gpus=0).echo.call_one(too_large)
    assert "268,435,456" in str(caught.value) and caught.value.advice
    await answers(pair)


@pytest.mark.full
async def test_a_worker_that_waits_for_another_one_that_is_killed_gets_the_same_error(cluster):
    victim = await cluster.controller.spawn("victim", Victim)
    caller = await cluster.controller.spawn("caller", Caller)
    cluster.identities()
    pid = await victim.pid.call_one()
    calling = caller.call_victim.call_one(victim, "hang")
    await eventually(lambda: _rank(cluster, "victim", 0)["facts"].get("running"), 20.0)
    kill(pid)
    error = await error_of(calling, WorkerDied)
    assert "SIGKILL" in str(error) and error.fields["pid"] == pid
    await caller.stop()
    await victim.stop()


@pytest.mark.full
async def test_answers_owed_to_a_killed_caller_are_cancelled_not_kept(cluster):
    victim = await cluster.controller.spawn("victim", Victim)
    caller = await cluster.controller.spawn("caller", Caller)
    cluster.identities()
    calling = caller.call_victim.call_one(victim, "hang_async")
    await eventually(lambda: _rank(cluster, "victim", 0)["facts"].get("running"), 20.0)
    await caller.kill()
    await error_of(calling, WorkerDied)
    await eventually(lambda: _rank(cluster, "victim", 0)["facts"].get("running") == 0, 20.0)
    await victim.stop()


def _rank(cluster, name, rank):
    meshes = {mesh["name"]: mesh for mesh in cluster.controller.status()["meshes"]}
    return meshes[name]["ranks"][rank]
