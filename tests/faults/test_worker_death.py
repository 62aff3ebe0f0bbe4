"""A worker dies: what its caller gets, how fast, and what is left."""

import asyncio
import os
import signal
import time
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio
from support.actors import Victim
from support.cluster import all_gone, error_of, kill, known, real_cluster
from support.process_cases import alive as still_alive
from support.process_cases import reported
from support.procs import alive, eventually

from miles_agents.agent.worker_errors import WorkerNeverReady
from miles_agents.rpc.errors import ActorFailedToStart, WorkerDied
from miles_agents.wire.remote_error import RemoteError
from miles_controller.policy import Policy

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory):
    async with real_cluster(tmp_path_factory.mktemp("run"), num_nodes=2) as cluster:
        yield cluster


@asynccontextmanager
async def victims(cluster, name, *args, **options):
    """A mesh for one test; nothing of it is left afterwards."""
    mesh = await cluster.controller.spawn(name, Victim, *args, **options)
    pids = [known(pid) for pid in (await mesh.pid.call()).values]
    cluster.identities()
    try:
        yield mesh
    finally:
        await mesh.stop(grace_s=0.5)
        assert not [pid for pid in pids if alive(pid)]
        assert name not in {found["name"] for found in cluster.controller.status()["meshes"]}


@pytest.mark.parametrize("method", ["hang", "hang_async", "hang_io"])
async def test_a_killed_worker_ends_its_pending_call_with_signal_pid_and_last_words(cluster, method, took):
    async with victims(cluster, f"v-{method.replace('_', '-')}") as mesh:
        await mesh.say.call_one("these were my last words")
        pid = await mesh.pid.call_one()
        pending = mesh.endpoint(method).call_one()
        await mesh.pid.call_one()  # the call before it has been read
        at = kill(pid)
        error = await error_of(pending, WorkerDied)
        took("kill to error", at)
        assert error.code == "E-PEER-001"
        assert "SIGKILL" in str(error) and str(pid) in str(error) and "these were my last words" in str(error)
        assert error.fields["may_have_run"] is True and error.fields["pid"] == pid
        late = await error_of(mesh.echo.call_one(1), WorkerDied)
        assert "SIGKILL" in str(late)
        assert "SIGKILL" in (await asyncio.wait_for(mesh.wait_failed(), 10)).evidence


@pytest.mark.parametrize(("method", "args", "cause"), [("leave", (7,), "exit code 7"), ("crash", (), "SIGSEGV")])
async def test_an_endpoint_that_ends_its_process_is_told_by_exit_code_or_signal(cluster, method, args, cause):
    async with victims(cluster, f"v-{method}") as mesh:
        error = await error_of(mesh.endpoint(method).call_one(*args), WorkerDied)
        assert cause in error.what and error.fields["may_have_run"] is True
        if method == "crash":
            assert "about to crash" in error.evidence and "ctypes" in error.evidence  # the stack, by faulthandler


async def test_other_ranks_go_on_when_one_dies(cluster):
    async with victims(cluster, "neighbours", dims={"hosts": 2, "gpus": 2}) as mesh:
        kill(await mesh.slice(hosts=1, gpus=0).pid.call_one())
        await cluster.event("worker_died", "neighbours[2]")
        rest = await mesh.slice(hosts=0).echo.call("still here")
        assert list(rest.values) == ["still here"] * 2
        outcomes = await mesh.options(return_exceptions=True).echo.call(1)
        assert [type(outcome).__name__ for outcome in outcomes.values].count("int") == 3


async def test_killing_the_group_frees_survivors_that_sit_in_a_collective(cluster, tmp_path, took):
    fifo = tmp_path / "collective"
    os.mkfifo(fifo)
    policy = Policy(on_death="kill_group")
    async with victims(cluster, "ring", dims={"hosts": 2, "gpus": 2}, policy=policy) as mesh:
        pids = [known(pid) for pid in (await mesh.pid.call()).values]
        single = [mesh.flatten("ranks").slice(ranks=rank).join_collective.call_one(str(fifo)) for rank in range(4)]
        await mesh.pid.call()
        at = kill(pids[1].pid)
        for pending in single:
            error = await error_of(pending, WorkerDied)
            assert "SIGKILL" in error.what
        took("kill to all errors", at)
        await all_gone(pids)
        failure = await asyncio.wait_for(mesh.wait_failed(), 20)
        assert "SIGKILL" in failure.evidence and failure.code == "E-MESH-001"


async def test_a_restarted_rank_answers_on_the_same_handle_and_never_twice(cluster, tmp_path):
    notes = tmp_path / "notes"
    policy = Policy(on_death="restart", backoff_s=0.0)
    async with victims(cluster, "phoenix", dims={"gpus": 2}, policy=policy) as mesh:
        first = mesh.slice(gpus=0)
        old = await first.note.call_one(str(notes), "before")
        pending = first.hang.call_one()
        await first.pid.call_one()
        kill(old)
        await error_of(pending, WorkerDied)
        await cluster.event("worker_restarted", "phoenix[0]")
        new = await mesh.slice(gpus=0).note.call_one(str(notes), "after")
        assert new != old and notes.read_text().split() == ["before", "after"]


NEVER = {
    "missing-module": {"PYTHONHOME": "/nonexistent"},
    "sitecustomize": {"PYTHONPATH": "{path}"},
}


@pytest.mark.parametrize("case", NEVER)
async def test_a_worker_that_dies_before_its_hello_shows_its_last_lines(cluster, case, tmp_path, took):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif 'miles_agents.worker' in sys.orig_argv:\n"
        "    sys.stderr.write('this node is not licensed\\n')\n    os._exit(5)\n"
    )
    env = {name: value.format(path=tmp_path) for name, value in NEVER[case].items()}
    at = time.perf_counter()
    error = await error_of(cluster.controller.spawn("never", Victim, dims={"gpus": 2}, env=env), WorkerNeverReady)
    took("spawn to error", at)
    assert error.code == "E-PEER-006"
    expected = "not licensed" if case == "sitecustomize" else "encodings"
    assert expected in error.evidence and "exit code" in error.what
    assert cluster.controller.find_mesh("never") is None
    assert all(len(devices.free) == 4 for devices in cluster.controller.inventory().nodes)


async def test_a_constructor_that_raises_is_the_users_own_error_and_nothing_is_left(cluster):
    from support.actors import RefusedToLive

    before = len(cluster.identities())
    spawning = cluster.controller.spawn("unborn", Victim, "raise", "coffee", dims={"gpus": 2})
    error = await error_of(spawning, RemoteError)
    assert isinstance(error, RefusedToLive) and error.code == "E-USER-001"
    assert "no life without coffee" in str(error) and "actors.py" in error.remote_traceback
    assert len(cluster.identities()) == before
    async with victims(cluster, "unborn") as mesh:  # the name and the slots are free again
        assert await mesh.echo.call_one(1) == 1


async def test_a_constructor_that_exits_is_a_death_with_its_code(cluster):
    error = await error_of(cluster.controller.spawn("quitter", Victim, "exit"), WorkerDied)
    assert "exit code 3" in error.what and "the constructor gives up" in error.evidence


@pytest.mark.parametrize(
    ("where", "problem"),
    [
        ("no_such_package.actors:Victim", "no module named 'no_such_package'"),
        ("support.actors:Viktim", "Viktim"),
        ("support.actors:EVADER", "not a subclass of Actor"),
    ],
)
async def test_a_class_that_cannot_be_loaded_is_named(cluster, where, problem):
    error = await error_of(cluster.controller.spawn("unknown", where), ActorFailedToStart)
    assert error.code == "E-CALL-007" and where.split(":")[0] in error.what and problem in error.evidence


async def test_a_module_that_fails_at_import_shows_the_users_traceback(cluster, tmp_path):
    (tmp_path / "broken_at_import.py").write_text("import json\njson.loads('{')\n")
    env = {"PYTHONPATH": str(tmp_path)}
    error = await error_of(cluster.controller.spawn("broken", "broken_at_import:Model", env=env), RemoteError)
    assert isinstance(error, ValueError) and "broken_at_import.py" in error.remote_traceback


async def test_evading_grandchildren_are_gone_after_a_stop(cluster, tmp_path):
    path = tmp_path / "evaders"
    async with victims(cluster, "parents", "evader", str(path)) as mesh:
        await eventually(lambda: len(reported(path, "evader")) == 2 and reported(path, "member"), 20.0)
        assert still_alive(reported(path))
        await mesh.stop(grace_s=0.3)
        assert still_alive(reported(path)) == []


async def test_evading_grandchildren_are_gone_after_the_worker_was_killed(cluster, tmp_path, took):
    path = tmp_path / "evaders"
    async with victims(cluster, "parents", "evader", str(path)) as mesh:
        await eventually(lambda: len(reported(path, "evader")) == 2 and reported(path, "member"), 20.0)
        at = kill(await mesh.pid.call_one())
        await eventually(lambda: still_alive(reported(path)) == [], 20.0)
        took("kill to clean", at)


async def test_a_child_that_holds_stdout_open_delays_no_error(cluster, tmp_path, took):
    path = tmp_path / "children"
    async with victims(cluster, "holder") as mesh:
        await mesh.leave_child_with_stdout.call_one(str(path))
        await eventually(lambda: reported(path, "child"), 20.0)
        pending = mesh.hang.call_one()
        at = kill(await mesh.pid.call_one())
        await error_of(pending, WorkerDied)
        took("kill to error", at)
        await eventually(lambda: still_alive(reported(path)) == [], 20.0)


async def test_a_stopped_worker_is_told_of_and_not_killed_and_goes_on_when_continued(cluster, took):
    async with victims(cluster, "sleeper", dims={"gpus": 2}) as mesh:
        first = mesh.slice(gpus=0)
        pid = await first.pid.call_one()
        at = kill(pid, signal.SIGSTOP)
        pending = first.echo.call_one("late")
        event = await cluster.event("worker_silent", "sleeper[0]")
        took("stop to event", at)
        assert "stopped" in event.text and "cannot show its stack" in event.fields["stack"]
        assert await mesh.slice(gpus=1).echo.call_one("fine") == "fine"
        assert alive(known(pid)) and mesh.failure is None
        kill(pid, signal.SIGCONT)
        assert await asyncio.wait_for(_value(pending), 20) == "late"
        await eventually(lambda: _state(cluster, "sleeper", 0) == "up", 20.0)
        assert await first.pid.call_one() == pid
        assert not cluster.events("worker_died", "sleeper")


async def _value(future):
    return await future


def _state(cluster, name, rank):
    meshes = {mesh["name"]: mesh for mesh in cluster.controller.status()["meshes"]}
    return meshes[name]["ranks"][rank]["state"]
